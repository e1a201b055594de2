#!/usr/bin/env bash
# Makes a token store on Cloud Dataflow: launch/prepare_dataflow.sh COMMAND ARGS
#
#   run ARGS    prepares, and waits for it. ARGS are those of flaxmlm.prepare,
#               with gs:// paths; after a -- those of Apache Beam, such as
#               --max_num_workers=50
#   status      the jobs of this name
#   delete      cancels those that run
#
#   --dry-run   shows the commands, and runs none
#
# If it is interrupted, the job is cancelled. Keys: launch/cloud.env.

# Keys of cloud.env are read by name.
# shellcheck disable=SC2153
set -euo pipefail
source "$(dirname "$0")/common.sh"

main() {
  local arg command='' beam=()
  while (($#)); do
    arg=$1
    shift
    case $arg in
      -h | --help) help ;;
      --dry-run) dry_run=1 ;;
      --) beam=("$@") && break ;;
      -*) args+=("$arg") ;;
      *) [[ ! $command ]] || fail "$arg: write --KEY=VALUE, in one piece"
        command=$arg ;;
    esac
  done
  read_keys PROJECT NAME REGION BUCKET
  need gcloud
  where=(--region="$REGION" --project="$PROJECT")
  case $command in
    run) run "${beam[@]}" ;;
    status) jobs_of all ;;
    delete) delete ;;
    '') help ;;
    *) fail "$command: there is run, status and delete" ;;
  esac
}

run() {
  local python=python scratch=/tmp/wheel
  [[ " ${args[*]} " == *' --out=gs://'* ]] ||
    fail "name the store by --out=gs://BUCKET/…"
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
  if [[ ! $dry_run ]]; then
    scratch=$(mktemp -d)
    trap 'clean_up $? '"$scratch" EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
  fi
  # The workers install this very code, and what reads buckets.
  cloud "$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch" . gcsfs
  local wheels=("$scratch"/{flaxmlm,gcsfs}-*.whl)
  cloud "$python" -m flaxmlm.prepare --runner=DataflowRunner "${args[@]}" -- \
    --project="$PROJECT" --region="$REGION" --job_name="$NAME" \
    --temp_location="$BUCKET/dataflow/tmp" \
    --staging_location="$BUCKET/dataflow/staging" \
    --extra_package="${wheels[0]}" --extra_package="${wheels[1]}" "$@" &
  child=$!
  wait "$child"
}

# jobs_of STATUS: the jobs of this name (all, active).
jobs_of() {
  cloud gcloud dataflow jobs list "${where[@]}" --status="$1" \
    --filter="name=$NAME" --format='csv[no-heading](id,name,state)'
}

delete() {
  local rows ids
  if [[ $dry_run ]]; then
    jobs_of active
    cloud gcloud dataflow jobs cancel JOB_ID "${where[@]}"
    return
  fi
  rows=$(jobs_of active)
  mapfile -t ids < <(cut -d, -f1 <<<"$rows")
  if [[ $rows ]]; then
    gcloud dataflow jobs cancel "${ids[@]}" "${where[@]}"
  else
    say "$NAME: no job runs"
  fi
}

clean_up() {
  trap - EXIT
  trap '' HUP INT TERM
  rm -rf "$2"
  [[ ! ${child:-} ]] || kill "$child" 2>/dev/null || true
  (($1 == 0)) || delete || say "error: COULD NOT CANCEL $NAME; it costs money" \
    "while it runs: $self delete, or https://console.cloud.google.com"
  exit "$1"
}

main "$@"
