# shellcheck shell=bash
# A run on Cloud TPU; sourced by tpu_vm.sh and tpu_pod.sh. Those define
#
#   check    refuses what wouldn't work
#   create   asks for the machines
#   list     prints NAME,STATE of all machines of the zone
#   remove   deletes the machines, whatever their state
#
# The machines are looked at again and again, and what is missing is done next.
# So the same line, started again, takes over whatever is there.
# shellcheck disable=SC2153 # NAME and the like are keys of cloud.env

GIVE_UP=3 # starts on the same machines; commands without an answer

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  local arg command=''
  keep='' spot='' workdir=''
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
  read_keys PROJECT NAME ZONE ACCELERATOR RUNTIME ALSO_COPY POLL_SECONDS
  need gcloud tar
  where=(--zone="$ZONE" --project="$PROJECT")
  remote=flaxmlm/launch/worker.sh
  case $command in
    run) run ;;
    status) status ;;
    log) on 0 "tail -n 40 -f flaxmlm/train.log" ;;
    fetch)
      [[ $workdir ]] || fail "which run? name it by --workdir=DIR"
      fetch ;;
    delete) delete ;;
    '') help ;;
    *) fail "$command: there is run, status, log, fetch and delete" ;;
  esac
}

run() {
  [[ $workdir ]] || fail "name the run: --workdir=DIR"
  check
  files=$(code_files) || exit 2
  if [[ $dry_run ]]; then
    say "# These would be run; looks at the machines come in between."
    state
    create
    start
    look
    finish
    return
  fi
  scratch=$(mktemp -d)
  trap 'clean_up $?' EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  local now silent=0 starts=0 answered='' before=''
  while :; do
    now=$(state)
    [[ $now == "$before" ]] || say "$NAME: $now"
    before=$now
    case $now in
      none)
        starts=0 answered=''
        create || now=silent ;;
      waiting) pause "$POLL_SECONDS" ;;
      ready)
        if now=$(look); then answered=1; else now=silent; fi
        case $now in
          running*) pause "$POLL_SECONDS" ;;
          done) break ;;
          bad\ input) fail "train refused its arguments, see above" ;;
          start)
            ((starts++ < GIVE_UP)) || give_up
            start || pause "$POLL_SECONDS" ;;
        esac ;;
      preempted)
        [[ $spot ]] || die "$NAME was taken away"
        remove || now=silent ;;
      failed) die "Google Cloud couldn't provide $NAME" ;;
    esac
    if [[ $now != silent ]]; then
      silent=0
    elif ((++silent < GIVE_UP)); then
      pause "$POLL_SECONDS"
    elif [[ $spot && $answered ]]; then # Google may be late to say so
      say "$NAME doesn't answer; it is replaced"
      remove || true
      silent=0
    else
      give_up
    fi
  done
  say "all steps are done"
  trained=1
}

give_up() { die "gave up on $NAME after $GIVE_UP tries, see above"; }

# state: what there is: none, waiting, ready, preempted, failed; or silent.
state() {
  local rows
  rows=$(list) || { echo silent; return; }
  if [[ $dry_run ]]; then
    printf '%s\n' "$rows"
    return
  fi
  case $(sed -n "s/^$NAME,//p" <<<"$rows") in
    '') echo none ;;
    READY | ACTIVE) echo ready ;;
    PREEMPTED | TERMINATED | SUSPENDED) echo preempted ;;
    STOPPED | FAILED) echo failed ;;
    *) echo waiting ;;
  esac
}

# on WORKER COMMAND: runs a command on a worker, or on all.
on() {
  cloud gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" \
    --worker="$1" --ssh-flag=-oConnectTimeout=10 \
    --ssh-flag=-oServerAliveInterval=15 --quiet --command="$2"
}

# look: what the workers do, in a word or two.
look() {
  local answers
  answers=$(on all "$remote state || echo none") || return
  if [[ $dry_run ]]; then
    printf '%s\n' "$answers"
    return
  fi
  sed -n 's/^running | /  /p; s/^exit [0-9]* | /  /p' <<<"$answers" >&2
  case $'\n'$answers in
    *$'\n'exit\ 2\ *) echo "bad input" ;;
    *$'\n'exit\ [1-9]* | *$'\n'none*) echo start ;;
    *$'\n'running*) echo running ;;
    *$'\n'exit\ 0*) echo "done" ;;
    *) return 1 ;;
  esac
}

# start: code, packages, training, on all workers. Each does nothing twice.
start() {
  local names
  mapfile -t names <<<"$files"
  send flaxmlm.tgz "" "${names[@]}" || return
  # What the machine has of the run already is newer.
  if on_machine && [[ -e $workdir ]]; then
    send run.tgz "[ -e flaxmlm/$(show "$workdir") ] || " "$workdir" || return
  fi
  on all "$remote stop && $remote install tpu,gcs" || return
  on all "$remote start $(show "${args[@]}")"
}

# send BUNDLE CONDITION NAMES: files, to all workers.
send() {
  local bundle=${scratch:-/tmp}/$1
  cloud tar -czf "$bundle" --exclude=__pycache__ "${@:3}" || return
  cloud gcloud compute tpus tpu-vm scp "$bundle" "$NAME:$1" "${where[@]}" \
    --worker=all --quiet || return
  on all "mkdir -p flaxmlm && { $2tar -xzf $1 -C flaxmlm; }"
}

# on_machine: whether the workdir is there alone.
on_machine() { [[ $workdir != gs://* && $workdir != /* ]]; }

# fetch: brings the workdir back.
fetch() {
  if ! on_machine; then
    say "the run is in $workdir"
    return
  fi
  local bundle=${scratch:-/tmp}/run.tgz
  on 0 "tar -czf run.tgz -C flaxmlm $(show "$workdir")" &&
    cloud gcloud compute tpus tpu-vm scp "$NAME:run.tgz" "$bundle" \
      "${where[@]}" --worker=0 --quiet &&
    cloud tar -xzf "$bundle" && cloud rm "$bundle"
}

# finish: saves, fetches and deletes, as far as there is something.
finish() {
  [[ ! $keep || ${trained:-} || $dry_run ]] || return 0 # it goes on there
  if [[ $dry_run || $(state) == ready ]]; then
    [[ ${trained:-} ]] || on all "$remote stop" || true
    fetch || say "could not fetch $workdir"
  fi
  [[ $keep ]] || delete
}

# delete: until nothing is left, or it is said.
delete() {
  local tries now
  for ((tries = 0; tries < GIVE_UP; tries++)); do
    if [[ $dry_run ]]; then
      remove
      return
    fi
    [[ $(state) == none ]] || remove || true
    now=$(state)
    if [[ $now == none ]]; then
      say "$NAME: nothing is left"
      return
    fi
    pause "$POLL_SECONDS"
  done
  die "COULD NOT DELETE $NAME ($now). It costs money until it is gone: \
$self delete, or https://console.cloud.google.com"
}

clean_up() {
  trap - EXIT
  trap '' HUP INT TERM
  if [[ $keep ]]; then
    say "$NAME is kept, and costs money until: $self delete"
  else
    say "cleaning up $NAME; please wait"
  fi
  finish
  rm -rf "$scratch"
  exit "$1"
}

status() {
  local now
  now=$(state)
  if [[ $dry_run ]]; then
    printf '%s\n' "$now"
  else
    say "$NAME: $now"
    [[ $now == ready ]] || return 0
  fi
  on all "$remote state"
}
