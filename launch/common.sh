# shellcheck shell=bash
# What several scripts of this folder use; sourced by them. They all work in the
# folder above.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
self=launch/${0##*/}
dry_run='' args=()

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 2; } # what was asked for is wrong
die() { say "error: $*"; exit 1; } # something else is

# The comment at the head of a script is its help.
help() { sed -n '2,/^[^#]\|^$/s/^# \{0,1\}//p' "$self"; exit 0; }

# Runs a command, or shows it on a dry run.
cloud() {
  if [[ $dry_run ]]; then
    show "$@"
  else
    "$@"
  fi
}

# Prints a command as one could type it.
show() {
  local arg key line=''
  for arg in "$@"; do
    if [[ ! $arg =~ ^[A-Za-z0-9_./:=@,+-]+$ ]]; then
      key=''
      [[ $arg =~ ^(--[a-z_.-]+=) ]] && key=${BASH_REMATCH[1]}
      arg=${arg#"$key"}
      arg=$key${arg@Q}
    fi
    line+=" $arg"
  done
  printf '%s\n' "${line# }"
}

# Waits so that a signal isn't kept waiting.
pause() { sleep "$1" & wait $!; }

# The keys of launch/cloud.env: what each looks like, as a regular expression.
declare -A KEYS=(
  [PROJECT]='[a-z][a-z0-9.:-]{4,}'
  [NAME]='[a-z]([a-z0-9-]{0,38}[a-z0-9])?'
  [ZONE]='[a-z]+-[a-z]+[0-9]+-[a-z]'
  [ACCELERATOR]='v[0-9]+[a-z]*-[0-9]+'
  [RUNTIME]='[a-z0-9.-]+'
  [REGION]='[a-z]+-[a-z]+[0-9]+'
  [GKE_ACCELERATOR]='tpu[a-z0-9-]+'
  [GKE_TOPOLOGY]='[0-9]+x[0-9]+(x[0-9]+)?'
  [GKE_CHIPS_PER_HOST]='[1-9][0-9]*'
  [BUCKET]='gs://[a-z0-9._-]+'
  [ALSO_COPY]='[^/].*|'
  [POLL_SECONDS]='[0-9]+(\.[0-9]+)?'
)

# need PROGRAM...: stops if one isn't there.
need() {
  local name
  for name in "$@"; do
    [[ $dry_run ]] || command -v "$name" >/dev/null ||
      fail "$name is missing; install it, or see what would be run: --dry-run"
  done
}

# read_keys KEY...: reads launch/cloud.env and checks the keys that are named.
read_keys() {
  local file=${CLOUD_ENV:-launch/cloud.env} key line
  [[ -e $file ]] ||
    fail "$file is missing; copy launch/cloud.env.example and fill it in"
  while read -r line || [[ $line ]]; do
    key=${line%%=*}
    [[ -z $line || $line == '#'* ]] || [[ -v KEYS[$key] && $line == *=* ]] ||
      fail "$file: '$line' isn't KEY=VALUE with one of ${!KEYS[*]}"
  done <"$file"
  ALSO_COPY=''
  # shellcheck source=/dev/null
  source "$file"
  for key in "$@"; do
    [[ ${!key:-} ]] || [[ $key == ALSO_COPY ]] || fail "$file: $key is missing"
    [[ ${!key:-} =~ ^(${KEYS[$key]})$ ]] ||
      fail "$file: $key=${!key} doesn't look like ${KEYS[$key]}"
  done
}

# The files that a run needs elsewhere: the code, and what the arguments name.
code_files() {
  local arg value
  for arg in "${args[@]}"; do
    [[ $arg == --config=* ]] || continue
    value=${arg#*=}
    [[ -f $value ]] || fail "--config=$value: there is no such file"
    [[ $value != /* && $value != *..* ]] ||
      fail "--config=$value is outside this folder; move it in"
  done
  for value in $ALSO_COPY; do
    [[ -e $value ]] || fail "ALSO_COPY=$ALSO_COPY: there is no $value"
  done
  {
    # shellcheck disable=SC2086 # words
    printf '%s\n' flaxmlm configs launch pyproject.toml setup.cfg README.md \
      LICENSE $ALSO_COPY
    for arg in "${args[@]}"; do
      value=${arg#*=}
      [[ $arg != --config*=?* || $value == /* || $value == *..* ]] ||
        compgen -G "$value" || true
    done
  } | sort -u
}
