#!/usr/bin/env bash
# What a machine does for a run: launch/worker.sh COMMAND
#
#   install EXTRAS makes .venv with flaxmlm and its extras (tpu,gcs)
#   run ARGS       trains; exits 75 if it was stopped before its last step, or a
#                  process of it stalled
#   start ARGS     the same in tmux; what it prints goes to train.log
#   state          one line: "running | LAST LINE", "exit CODE | ..." or "none"
#   stop           lets it save and end; ends it if it doesn't in a minute
#
# The other scripts of this folder call it; a container begins with `run`.
set -euo pipefail
source "$(dirname "$0")/common.sh"

session=flaxmlm
STOPPED=75

install() {
  cmp -s setup.cfg .venv/setup.cfg && return
  # The images of TPU VMs have an older Python than flaxmlm needs; uv gets one.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --allow-existing --python '>=3.11,<3.14' .venv
  uv pip install --quiet --python .venv/bin/python --editable ".[$1]"
  cp setup.cfg .venv/
}

# RUNNER goes before the command (srun), LOG is appended to.
run() {
  local log=${LOG:-$(mktemp)} from python=python pid signalled=1 code
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
  touch "$log"
  from=$(($(wc -c <"$log") + 1))
  # A process group of its own: a signal reaches training once, from here.
  set -m
  # shellcheck disable=SC2086
  ${RUNNER:-} "$python" -m flaxmlm.train "$@" >>"$log" 2>&1 </dev/null &
  pid=$!
  echo "$pid" >"$log.pid"
  tail -f -c "+$from" --pid="$pid" "$log" &
  trap 'signalled=1; kill -TERM "$pid" 2>/dev/null || true' TERM HUP
  trap 'signalled=1; kill -INT "$pid" 2>/dev/null || true' INT
  while [[ $signalled ]]; do
    signalled='' code=0
    wait "$pid" || code=$?
  done
  wait
  # train exits 0 too when a signal stopped it, and says so at the end.
  if ((code == 0)) && tail -c "+$from" "$log" | tail -n 20 |
    grep -q '^stopped after step'; then
    code=$STOPPED
  fi
  # The code of a stall is 75 too; but of several tasks, srun takes the largest.
  if ((code)) && tail -c "+$from" "$log" |
    grep -q '^error: process [0-9]* stalls: '; then
    code=$STOPPED
  fi
  rm -f "$log.pid"
  [[ ${LOG:-} ]] || rm -f "$log"
  return "$code"
}

running() { tmux has-session -t "=$session" 2>/dev/null; }

start() {
  running && return
  rm -f train.exit
  tmux new-session -d -s "$session" launch/worker.sh session "$@"
}

session() {
  local code=0
  LOG=train.log run "$@" || code=$?
  echo "$code" >train.exit
}

state() {
  local last=''
  [[ -e train.log ]] && last=" | $(tail -n 1 train.log | cut -c -200)"
  if running; then
    echo "running$last"
  elif [[ -e train.exit ]]; then
    echo "exit $(<train.exit)$last"
  else
    echo none
  fi
}

stop() {
  local signal second
  for signal in TERM KILL; do
    running || return 0
    kill "-$signal" "$(<train.log.pid)" 2>/dev/null || true
    for ((second = 0; second < 60; second++)); do
      running || return 0
      sleep 1
    done
  done
}

case ${1:-} in
  install | run | start | session | state | stop) "$@" ;;
  *) help ;;
esac
