#!/usr/bin/env bash
# Trains on one Cloud TPU VM: launch/tpu_vm.sh COMMAND [OPTIONS] [ARGS]
#
#   run ARGS              creates the VM, copies the code, installs, trains in
#                         tmux, fetches the workdir, deletes the VM. ARGS are
#                         those of flaxmlm.train. However it ends, the VM is
#                         deleted; the same line again goes on.
#   status                what there is, and the last line of training
#   log                   follows what training prints
#   fetch --workdir=DIR   brings the workdir back as it is now
#   delete                deletes the VM
#
#   --dry-run             shows the commands, and runs none
#   --keep                leaves the VM, to be deleted by you; it trains on
#                         after a Ctrl-C
#
# Project, zone and type come from launch/cloud.env (cloud.env.example).
set -euo pipefail
source "$(dirname "$0")/tpu.sh"

check() {
  [[ ! $spot ]] || fail "--spot is for launch/tpu_pod.sh, one host or many"
  [[ $workdir != *..* ]] || fail "--workdir=$workdir: write it without .."
}

create() {
  cloud gcloud compute tpus tpu-vm create "$NAME" "${where[@]}" \
    --accelerator-type="$ACCELERATOR" --version="$RUNTIME" --quiet \
    --scopes=https://www.googleapis.com/auth/cloud-platform
}

list() {
  cloud gcloud compute tpus tpu-vm list "${where[@]}" --quiet \
    --format='csv[no-heading](name.basename(),state)'
}

remove() {
  cloud gcloud compute tpus tpu-vm delete "$NAME" "${where[@]}" --quiet
}

main "$@"
