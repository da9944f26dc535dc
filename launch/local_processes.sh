#!/usr/bin/env bash
# Trains with N processes on this machine, which meet on a free port and share out the emulated devices (collectives by gloo):
#
#     bash launch/local_processes.sh N [arguments of launch.train]
#     bash launch/local_processes.sh 2 --config=configs/quickstart.py --config.workdir=runs/two
#
# Every line is printed with its process's number. SIGTERM and SIGINT go on to all. When one process fails the others are stopped; the exit
# status is that of the first that failed, 0 when none did.
#
# Environment: PYTHON       the interpreter, in place of .venv's
#              LEAVE_RUNNING=1  do not stop the others when one fails: they find out themselves (--peer_timeout)
#              DRY_RUN=1    print the commands and run nothing
set -uo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

grace=20 # seconds between SIGTERM and SIGKILL

[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || fail "the first argument is the number of processes, e.g. bash launch/local_processes.sh 2"
count="$1"
shift
cd "$root" || exit 1
if [ -n "${PYTHON:-}" ]; then
  python="$PYTHON"
elif [ -z "${DRY_RUN:-}" ]; then
  ensure_venv ""
fi

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# gloo reports its connections on stdout, from every thread
label() { sed -u -e '/\[Gloo\] Rank/d' -e '/connected peer ranks/d' -e "s/^/[$1] /"; }

pids=() labels=() failed=0

stop_all() {
  kill -s "$1" "${pids[@]}" 2>/dev/null || true
}

start() {
  local out err
  exec {out}> >(label "$1") && labels+=("$!")
  exec {err}> >(label "$1" >&2) && labels+=("$!")
  set -m # a process group of its own: a Ctrl-C comes once, by the trap
  "$python" -m launch.train "${@:2}" >&"$out" 2>&"$err" {out}>&- {err}>&- &
  set +m
  pids+=("$!")
  exec {out}>&- {err}>&-
}

# The process that ended, in `ended` and its status in `status`; a signal that the trap handled only interrupts the wait.
next_end() {
  while :; do
    ended=""
    wait -n -p ended "${pids[@]}"
    status=$?
    [ -n "${ended:-}" ] && return
    [ "$status" -eq 127 ] && return 1
  done
}

if [ -n "${DRY_RUN:-}" ]; then
  port=PORT
else
  port="$(free_port)"
fi
trap 'stop_all TERM' TERM
trap 'stop_all INT' INT
for ((index = 0; index < count; index++)); do
  place=(--coordinator="127.0.0.1:$port" --num_processes="$count" --process_id="$index")
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$python" -m launch.train "$@" "${place[@]}" && echo
  else
    start "$index" "$@" "${place[@]}"
  fi
done
[ -n "${DRY_RUN:-}" ] && exit 0

while [ "${#pids[@]}" -gt 0 ] && next_end; do
  for index in "${!pids[@]}"; do
    [ "${pids[$index]}" = "$ended" ] && number="$index" && unset "pids[$index]"
  done
  if [ "$status" -ne 0 ]; then
    [ "$failed" -eq 0 ] && failed="$status"
    say "process $number ended with status $status"
    if [ -z "${LEAVE_RUNNING:-}" ] && [ -z "${killer:-}" ] && [ "${#pids[@]}" -gt 0 ]; then
      say "stopping the others"
      stop_all TERM
      (sleep "$grace" && kill -s KILL "${pids[@]}") >/dev/null 2>&1 &
      killer=$!
    fi
  fi
done
[ -n "${killer:-}" ] && kill "$killer" 2>/dev/null
for pid in "${labels[@]}"; do
  wait "$pid" 2>/dev/null
done
exit "$failed"
