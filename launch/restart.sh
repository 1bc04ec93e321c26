#!/usr/bin/env bash
# Runs a command, such as training, and again when it fails: launch/restart.sh python -m sparqle_jax.train ...
#
# Training then goes on from its last checkpoint. It is not started again
#   after 0 (done), 2 (a mistake in the configuration), 3 (the numbers or the data are at fault) and 130
#   (Ctrl-C), nor more than RESTARTS times (100), PAUSE seconds (30) apart;
#   after a SIGTERM to this script, which waits for the command to end. It is not passed on: whoever shuts a
#   host down sends it to every process, and a second one would interrupt training while it saves.
set -uo pipefail

RESTARTS=${RESTARTS:-100}
PAUSE=${PAUSE:-30}
end=ended
trap 'end=stopped' TERM INT # bash runs this when the command has ended

for ((restart = 1; ; restart++)); do
  "$@"
  status=$?
  case $status in 0 | 2 | 3 | 130) end=ended && break ;; esac
  if [ $end = stopped ] || ((restart > RESTARTS)); then break; fi
  echo "launch/restart.sh: status $status; again in $PAUSE seconds (restart $restart of $RESTARTS)" >&2
  sleep "$PAUSE"
  if [ $end = stopped ]; then break; fi
done
echo "launch/restart.sh: $end with status $status" >&2 # launch/worker.sh reads this line
exit "$status"
