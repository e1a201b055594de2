#!/usr/bin/env bash
# Trains on a TPU slice of Google Kubernetes Engine: launch/gke.sh COMMAND ARGS
#
#   run ARGS    makes the cluster and the image if need be, trains as a JobSet
#               (gke.yaml), follows it, deletes the JobSet and so the chips.
#               ARGS are those of flaxmlm.train. The same line again goes on.
#   status      the JobSet, its pods and nodes
#   log         follows what the first host prints
#   delete      deletes the JobSet and the cluster
#
#   --spot      cheaper, and may be taken away: it is then started again
#   --dry-run   shows the commands and the JobSet, and runs none
#   --keep      doesn't follow; GKE lets the chips go when training ends
#
# The workdir is gs://BUCKET/…. An Autopilot cluster has nodes only while there
# are pods, but costs a fee by the hour itself. Keys: launch/cloud.env.

# Keys of cloud.env are read by name.
# shellcheck disable=SC2034,SC2153
set -euo pipefail
source "$(dirname "$0")/common.sh"

JOBSET=https://github.com/kubernetes-sigs/jobset/releases/download/v0.10.1

main() {
  local arg
  keep='' spot='' workdir='' command=''
  for arg in "$@"; do
    case $arg in
      -h | --help) help ;;
      --dry-run) dry_run=1 ;;
      --keep) keep=1 ;;
      --spot) spot=1 ;;
      --workdir=*) workdir=${arg#*=} args+=("$arg") ;;
      -*) args+=("$arg") ;;
      *) [[ ! $command ]] || fail "$arg: write --KEY=VALUE, in one piece"
        command=$arg ;;
    esac
  done
  read_keys PROJECT NAME REGION GKE_ACCELERATOR GKE_TOPOLOGY \
    GKE_CHIPS_PER_HOST BUCKET ALSO_COPY POLL_SECONDS
  need gcloud kubectl
  where=(--location="$REGION" --project="$PROJECT")
  IMAGE=$REGION-docker.pkg.dev/$PROJECT/flaxmlm/flaxmlm:$NAME
  case $command in
    run) run ;;
    status) kube get jobsets,pods,nodes --show-kind ;;
    log) kube logs --follow --tail=40 "job/$NAME-slice-0" ;;
    delete) delete ;;
    '') help ;;
    *) fail "$command: there is run, status, log and delete" ;;
  esac
}

# kubectl for this cluster, whatever the current context is.
kube() {
  cloud kubectl --context="gke_${PROJECT}_${REGION}_$NAME" "$@"
}

run() {
  [[ $workdir == gs://* ]] || fail "--workdir=$workdir: on GKE, gs://BUCKET/…"
  files=$(code_files) || exit 2
  manifest=$(jobset)
  if [[ $dry_run ]]; then
    say "# These would be run, the creating ones if there is nothing yet."
  else
    scratch=$(mktemp -d)
    trap 'clean_up $?' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
  fi
  make_cluster
  if [[ $dry_run ]]; then
    ended
    make_image
    kube apply -f -
    printf '%s\n' "$manifest"
    [[ $keep ]] || { last_line && remove; }
    return
  fi
  local before
  before=$(ended)
  if [[ $before != "$NAME " ]]; then
    [[ ! $before ]] || remove
    make_image
    kube apply -f - <<<"$manifest"
  fi
  [[ $keep ]] || follow
}

# ended: the JobSet's name, and Completed or Failed; nothing if there is none.
ended() {
  kube get jobset "$NAME" --ignore-not-found \
    -o 'jsonpath={.metadata.name} {.status.terminalState}'
}

last_line() { kube logs --tail=1 "job/$NAME-slice-0" --container=train; }


# jobset: gke.yaml, filled in.
jobset() {
  local text key arg chips=1 size list=''
  local HOSTS ARGS
  for size in ${GKE_TOPOLOGY//x/ }; do chips=$((chips * size)); done
  ((chips % GKE_CHIPS_PER_HOST == 0)) || fail "GKE_TOPOLOGY=$GKE_TOPOLOGY has \
$chips chips, which GKE_CHIPS_PER_HOST=$GKE_CHIPS_PER_HOST doesn't divide"
  HOSTS=$((chips / GKE_CHIPS_PER_HOST))
  for arg in "${args[@]}"; do # as JSON, which is YAML too
    arg=${arg//\\/\\\\}
    list+=", \"${arg//\"/\\\"}\""
  done
  ARGS="[${list#, }]"
  text=$(<launch/gke.yaml)
  [[ $spot ]] || text=$(grep -v gke-spot <<<"$text")
  for key in NAME HOSTS GKE_ACCELERATOR GKE_TOPOLOGY IMAGE \
    GKE_CHIPS_PER_HOST ARGS; do
    text=${text//"@$key@"/"${!key}"}
  done
  printf '%s\n' "$text"
}

# exists COMMAND: whether something is there; never, on a dry run.
exists() { [[ ! $dry_run ]] && "$@" >/dev/null 2>&1; }

make_cluster() {
  local number=PROJECT_NUMBER pool=$PROJECT.svc.id.goog
  exists gcloud container clusters describe "$NAME" "${where[@]}" ||
    cloud gcloud container clusters create-auto "$NAME" "${where[@]}" --quiet
  cloud gcloud container clusters get-credentials "$NAME" "${where[@]}" --quiet
  kube apply --server-side -f "$JOBSET/manifests.yaml"
  # The pods may read and write the bucket.
  if [[ $dry_run ]]; then
    cloud gcloud projects describe "$PROJECT" --format='value(projectNumber)'
  else
    number=$(gcloud projects describe "$PROJECT" \
      --format='value(projectNumber)')
  fi
  cloud gcloud storage buckets add-iam-policy-binding "$BUCKET" --quiet \
    --project="$PROJECT" --role=roles/storage.objectUser \
    --member="principal://iam.googleapis.com/projects/$number/locations/\
global/workloadIdentityPools/$pool/subject/ns/default/sa/default"
}

make_image() {
  local context=${scratch:-/tmp}/image names
  mapfile -t names <<<"$files"
  exists gcloud artifacts repositories describe flaxmlm "${where[@]}" ||
    cloud gcloud artifacts repositories create flaxmlm "${where[@]}" \
      --repository-format=docker --quiet
  cloud mkdir -p "$context"
  cloud cp -r --parents "${names[@]}" "$context"
  cloud cp launch/Dockerfile "$context"
  cloud gcloud builds submit "$context" --tag="$IMAGE" --project="$PROJECT" \
    --region="$REGION" --quiet
}

# follow: until the JobSet has ended.
follow() {
  local now silent=0
  while :; do
    pause "$POLL_SECONDS"
    if now=$(ended); then
      silent=0
      case $now in
        "$NAME ") last_line || true ;;
        "$NAME Completed") break ;;
        *) die "the JobSet ended: ${now:-deleted}" ;;
      esac
    else
      ((++silent < 10)) || die "the cluster doesn't answer"
    fi
  done
  say "all steps are done"
}

remove() { kube delete jobset "$NAME" --ignore-not-found --timeout=300s; }

clean_up() {
  local code=$1
  trap - EXIT
  trap '' HUP INT TERM
  rm -rf "$scratch"
  if [[ $keep && $code == 0 ]]; then
    say "$NAME runs; see $self status; its chips go when it ends"
  elif ! remove; then
    say "error: COULD NOT DELETE the JobSet $NAME. It costs money until it is" \
      "gone: $self delete, or https://console.cloud.google.com"
    code=1
  fi
  say "the cluster is kept, without chips, for a fee by the hour, until:" \
    "$self delete"
  exit "$code"
}

delete() {
  cloud gcloud container clusters delete "$NAME" "${where[@]}" --quiet
}

main "$@"
