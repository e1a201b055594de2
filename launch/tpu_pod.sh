#!/usr/bin/env bash
# Trains on all hosts of a TPU slice: launch/tpu_pod.sh COMMAND [OPTIONS] [ARGS]
#
#   run ARGS    queues for the slice, copies the code, installs, trains in tmux
#               on each host, deletes the slice. ARGS are those of
#               flaxmlm.train. However it ends, the slice is deleted; the same
#               line again goes on.
#   status      what there is, and the last line of training
#   log         follows what training prints
#   delete      deletes the slice, or takes the request back
#
#   --spot      cheaper, and may be taken away: it is then queued for again, and
#               training goes on, until the steps are done
#   --dry-run   shows the commands, and runs none
#   --keep      leaves the slice, to be deleted by you; Ctrl-C lets it train on
#
# The workdir is gs://BUCKET/…, or by absolute path a folder that all hosts
# share. Project, zone and type come from launch/cloud.env (cloud.env.example).
set -euo pipefail
source "$(dirname "$0")/tpu.sh"

check() {
  [[ $workdir == gs://* || $workdir == /* ]] || fail "--workdir=$workdir: on a \
pod it is gs://BUCKET/… or, by absolute path, a folder that all hosts share"
}

create() {
  cloud gcloud compute tpus queued-resources create "$NAME" "${where[@]}" \
    --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" --quiet ${spot:+--spot} \
    --scopes=https://www.googleapis.com/auth/cloud-platform
}

list() {
  cloud gcloud compute tpus queued-resources list "${where[@]}" --quiet \
    --format='csv[no-heading](name.basename(),state.state)'
}

remove() {
  cloud gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" \
    --force --quiet
}

main "$@"
