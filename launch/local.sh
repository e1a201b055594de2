#!/usr/bin/env bash
# Trains by several processes on this machine:
#
#   launch/local.sh --processes=N [--devices=K] [--dry-run] ARGS
#
# ARGS are those of flaxmlm.train. Each process has K CPU devices (1). Process 0
# prints here, the others into WORKDIR/process-I.log. Ctrl-C and SIGTERM go to
# all: they save and end, and the same line goes on. If one dies, the others are
# ended within ten seconds, and the exit code is that of the one.
set -euo pipefail
source "$(dirname "$0")/common.sh"

GRACE=10 # seconds from SIGTERM to SIGKILL

processes='' devices=1 workdir=''
for arg in "$@"; do
  case $arg in
    -h | --help) help ;;
    --dry-run) dry_run=1 ;;
    --processes=*) processes=${arg#*=} ;;
    --devices=*) devices=${arg#*=} ;;
    --workdir=*) workdir=${arg#*=} args+=("$arg") ;;
    *) args+=("$arg") ;;
  esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] ||
  fail "--processes=${processes:-?}: say how many, --processes=N"
[[ $devices =~ ^[1-9][0-9]*$ ]] ||
  fail "--devices=$devices isn't a number of devices a process"
[[ $workdir ]] || fail "name the run: --workdir=DIR"

python=python
[[ -x .venv/bin/python ]] && python=.venv/bin/python
logs=$workdir
[[ $workdir != gs://* ]] || logs=$(mktemp -d)
port=$("$python" -c 'import socket
with socket.socket() as s:
  s.bind(("127.0.0.1", 0))
  print(s.getsockname()[1])')

# train I: the command line of a process, in `line`.
train() {
  line=(
    env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
    "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1" JAX_PLATFORMS=cpu
    "JAX_NUM_CPU_DEVICES=$devices" "$python" -m flaxmlm.train "${args[@]}"
  )
}

if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    train "$i"
    show "${line[@]}"
  done
  exit
fi

pids=() # by process
signal_all() {
  ((${#pids[@]} == 0)) || kill "-$1" "${pids[@]}" 2>/dev/null || true
}
# Groups of their own: a Ctrl-C reaches each process once, from here.
set -m
trap 'signal_all INT' INT
trap 'signal_all TERM' TERM HUP
trap 'signal_all KILL' EXIT # who hasn't ended by then

mkdir -p "$logs"
for ((i = processes - 1; i >= 0; i--)); do
  train "$i"
  if ((i)); then
    "${line[@]}" >"$logs/process-$i.log" 2>&1 </dev/null &
  else
    "${line[@]}" </dev/null &
  fi
  pids[i]=$!
done
((processes == 1)) || say "processes 1 and on print to $logs/process-*.log"

while ((${#pids[@]})); do
  ended='' code=0
  wait -n -p ended "${pids[@]}" || code=$?
  [[ ${ended:-} ]] || continue # a signal came, and was handed on
  for i in "${!pids[@]}"; do
    [[ ${pids[i]} != "$ended" ]] || break
  done
  unset "pids[i]"
  ((code)) || continue
  ((i == 0)) || tail -n 1 "$logs/process-$i.log" >&2
  say "process $i ended with exit code $code, and so do the others"
  signal_all TERM
  for ((tenth = 0; tenth < 10 * GRACE; tenth++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.1
  done
  exit "$code"
done
