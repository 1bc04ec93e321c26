#!/usr/bin/env bash
# Trains on TPU VMs, from asking for a slice to giving it back; launch/README.md leads through it.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'END'
launch/tpu.sh COMMAND: training on TPU VMs of Google Cloud

  create [OPTIONS]    asks for the slice and waits for it; OPTIONS are gcloud's, such as --spot or --reserved
  sync                copies what git tracks, as it is in the working tree, to all workers and sets them up
  run CONFIG [--set KEY=VALUE ...]
                      starts training on all workers; each starts it again when it fails
  logs [--worker N] [--slice N]
                      follows the log of a worker (default: 0 and 0)
  status              how the slice is, and whether the workers train
  stop                has training save a checkpoint and end
  resume              goes on with the last `run`, with the same code; in place of a slice that was preempted
                      or deleted it makes a new one, as `create` made that one
  keep                resumes whenever that is needed, until training has ended
  delete [--yes]      gives the slice back, with all that is on its disks

Settings, from the environment:
  NAME      of the slice                                           (required)
  ZONE      such as us-west4-a                                     (required)
  TYPE      of the slice, such as v5litepod-16                     (required to make one)
  PROJECT   of Google Cloud                                        (default: the one in gcloud's configuration)
  SLICES    how many slices train together                         (default: 1)
  RUNTIME   the image of the VMs                                   (default: Google's for TYPE and JAX)
  SETUP     a command for `sync`, run by all workers, such as one that fetches weights (default: none)
  EVERY     seconds between two looks at the slice                 (default: 30)
  PATIENCE  seconds that `stop` gives training to save and end     (default: 600)
END
}

say() { echo "launch/tpu.sh: $*" >&2; }

fail() {
  say "$*"
  exit 1
}

needs() { # needs SETTING EXAMPLE
  [ -n "${!1:-}" ] || fail "$1 is not set: export $1=$2 (launch/tpu.sh --help has all settings)"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
}

wait_until_active() {
  local now last=''
  while now=$(state); do
    [ "$now" = "$last" ] || say "$NAME is $now"
    last=$now
    case $now in
      ACTIVE) return ;;
      SUSPENDED) fail "$NAME was preempted: launch/tpu.sh resume makes a new one" ;;
      FAILED) fail "$NAME could not be made; gcloud compute tpus queued-resources describe $NAME says why" ;;
    esac
    sleep "$EVERY"
  done
  fail "cannot tell how $NAME is; when gcloud works again, launch/tpu.sh sync waits on"
}

make_slice() { # make_slice OPTIONS
  local nodes=(--node-id="$NAME")
  needs TYPE v5litepod-16
  case $TYPE in
    v5litepod-*) : "${RUNTIME:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${RUNTIME:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${RUNTIME:=v2-alpha-tpuv6e}" ;;
    *) : "${RUNTIME:=tpu-ubuntu2204-base}" ;;
  esac
  if ((SLICES > 1)); then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${nodes[@]}" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "$@"
  wait_until_active
}

delete_slice() {
  gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

slices() { # their names
  if ((SLICES == 1)); then echo "$NAME"; else seq -f "$NAME-%g" 0 $((SLICES - 1)); fi
}

on() { # on SLICE WORKERS COMMAND...: the words of the command arrive as they are
  gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" --worker="$2" --command="$(printf '%q ' "${@:3}")"
}

on_all() { # on_all COMMAND...: on the other slices also where it fails on one
  local slice failed=''
  for slice in $(slices); do on "$slice" all "$@" || failed=yes; done
  [ -z "$failed" ]
}

worker=sparqle_jax/launch/worker.sh

# The top folders are removed first: what is gone here must not stay there.
# shellcheck disable=SC2016  # expanded on the worker
unpack='
set -euo pipefail
mkdir -p sparqle_jax && cd sparqle_jax
flock --shared --nonblock lock true ||
  { echo "Training is running: launch/tpu.sh stop comes before sync." >&2; exit 1; }
rm -f ready
tar -tf ../sparqle_jax.tar | cut -d/ -f1 | sort -u | xargs rm -rf
tar -xf ../sparqle_jax.tar
launch/worker.sh setup "$1"'

copy_code() { # copy_code ARCHIVE: and sets the workers up
  local slice
  for slice in $(slices); do
    gcloud compute tpus tpu-vm scp "$1" "$slice:sparqle_jax.tar" "${where[@]}" --worker=all
  done
  on_all bash -c "$unpack" unpack "$(<"$memory/setup")"
}

# What is needed to resume stays on this machine: the workers' disks go with the workers.
remember() { # remember FILE WORDS...
  local word
  mkdir -p "$memory"
  for word in "${@:2}"; do printf '%s\0' "$word"; done >"$memory/$1"
}

recall() { # recall FILE COMMAND: sets `words`; COMMAND is the one that remembers them
  [ -f "$memory/$1" ] || fail "$memory/$1 is not there: on this machine, $2 comes first"
  mapfile -d '' -t words <"$memory/$1"
}

create() {
  remember create "$@"
  make_slice "$@"
}

sync() {
  local tree
  wait_until_active
  mkdir -p "$memory"
  echo "${SETUP:-}" >"$memory/setup"
  git update-index -q --refresh || true # else `git stash` takes a file with a new date for a changed one
  tree=$(git stash create)              # a commit of the working tree, on no branch; '' if HEAD is the same
  git archive --output="$memory/new.tar" "${tree:-HEAD}"
  copy_code "$memory/new.tar"
  mv "$memory/new.tar" "$memory/code.tar"
}

run() {
  [ $# -gt 0 ] || fail "run what? launch/tpu.sh run CONFIG [--set KEY=VALUE ...]"
  [ -f "$memory/code.tar" ] || fail "nothing was copied to $NAME: launch/tpu.sh sync comes first"
  tar -tf "$memory/code.tar" "$1" >/dev/null 2>&1 ||
    fail "$1 is not in what was copied to $NAME: git add it, then launch/tpu.sh sync"
  remember run "$@"
  on_all $worker start new "$@"
}

logs() {
  local number=0 slice=0
  while (($#)); do
    case $1 in
      --worker) number=${2:-} ;;
      --slice) slice=${2:-} ;;
      *) fail "logs has no $1: launch/tpu.sh logs [--worker N] [--slice N]" ;;
    esac
    shift 2 || fail "logs: a number is missing"
  done
  on "$(slices | sed -n "$((slice + 1))p")" "$number" $worker follow
}

status() {
  echo "$NAME: $(state)"
  on_all $worker status
}

stop() {
  on_all $worker stop # all before waiting for any: they save together
  on_all $worker wait "$PATIENCE"
}

resume() {
  local arguments
  recall run "launch/tpu.sh run"
  arguments=("${words[@]}")
  case $(state) in
    ACTIVE) ;;
    SUSPENDED | FAILED)
      recall create "launch/tpu.sh create"
      delete_slice
      make_slice "${words[@]}"
      ;;
    '')
      recall create "launch/tpu.sh create"
      make_slice "${words[@]}"
      ;;
    *) wait_until_active ;;
  esac
  on_all test -f sparqle_jax/ready || copy_code "$memory/code.tar"
  on_all $worker start again "${arguments[@]}"
}

keep() {
  local workers
  while true; do
    workers='not running'
    if [ "$(state)" = ACTIVE ]; then workers=$(on_all $worker status) || workers='not running'; fi
    case $workers in
      *'not running'*) launch/tpu.sh resume || say "will try again in $EVERY seconds" ;;
      *running*) ;;
      *'status '[1-9]*) fail "training has ended: $workers" ;;
      *) say "training is done" && return ;;
    esac
    sleep "$EVERY"
  done
}

delete() {
  local answer=y
  if [ "${1:-}" != --yes ]; then
    read -r -p "Delete $NAME in $ZONE, with all that is on its disks? [y/N] " answer || true
  fi
  [ "$answer" = y ] || fail "$NAME is not deleted"
  delete_slice
}

command=${1:-}
case $command in
  create | sync | run | logs | status | stop | resume | keep | delete) shift ;;
  -h | --help) usage && exit ;;
  *)
    usage >&2
    exit 2
    ;;
esac
command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
needs NAME first
needs ZONE us-west4-a
SLICES=${SLICES:-1} EVERY=${EVERY:-30} PATIENCE=${PATIENCE:-600}
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
memory=runs/launch/$NAME
"$command" "$@"
