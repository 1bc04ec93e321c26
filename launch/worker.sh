#!/usr/bin/env bash
# What launch/tpu.sh (and launch/skypilot.yaml) has each worker do, in its copy of the project.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$HOME/.local/bin:$PATH"

fail() {
  echo "$(hostname): $*" >&2
  exit 1
}

# launch/restart.sh and what it starts hold the lock, so no process can be forgotten.
running() { ! flock --shared --nonblock lock true; }

setup() { # setup COMMAND: makes the environment and runs the command in it
  if ! command -v uv >/dev/null; then curl -LsSf https://astral.sh/uv/install.sh | sh; fi
  uv venv --quiet --allow-existing --python 3.12 # the images have Python 3.10, which is too old
  uv pip install --quiet --editable '.[tpu,gcs]'
  bash -c "$1"
  touch ready
}

start() { # start new|again ARGUMENTS: of training; "again" may find it running
  local kind=$1
  shift
  [ -f ready ] || fail "This worker is not set up: launch/tpu.sh sync"
  exec 9>lock
  if ! flock --nonblock 9; then
    [ "$kind" = new ] || return 0
    fail "Training is running already: launch/tpu.sh logs follows it, launch/tpu.sh stop ends it."
  fi
  echo "launch/worker.sh: $(date --utc): python -m sparqle_jax.train $* --distributed" >>train.log
  nohup setsid launch/restart.sh python -m sparqle_jax.train "$@" --distributed \
    >>train.log 2>&1 </dev/null &
  echo $! >pid
}

stop() {
  running || return 0
  kill -TERM "$(cat pid)" || true # launch/restart.sh, so that it starts nothing again; then training
  pkill -TERM --parent "$(cat pid)" || true
}

wait_for_end() { # wait_for_end SECONDS
  flock --shared --timeout "$1" lock true || fail "Training has not ended after $1 seconds."
}

status() {
  local state=running
  if ! running; then
    state=$(tail -n 1 train.log 2>/dev/null | grep --only-matching 'ended with status [0-9]*$') ||
      state='not running'
  fi
  echo "$(hostname): $state"
}

follow() { exec tail -n 100 -F train.log; }

case $1 in
  setup) setup "$2" ;;
  start) start "${@:2}" ;;
  stop) stop ;;
  wait) wait_for_end "$2" ;;
  status) status ;;
  follow) follow ;;
esac
