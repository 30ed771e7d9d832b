#!/usr/bin/env bash
# Runs a command as N processes of one run on this machine, each with its own pretended CPU devices.
#
#   launch/local_multiprocess.sh 2 -- python -m opsd_jax.train --config=configs/mini.py:smoke --workdir=/tmp/opsd-two
#
#   DEVICES=2   devices of each process
#   PORT=...    of process 0; a free one is chosen
#
# Every line of output begins with [number of its process]. When one process fails, the others are ended. Ctrl-C or
# SIGTERM lets all save and stop (code 42); a second one kills. The exit code is that of the process that ended badly
# first, or 42, or 0.
set -euo pipefail

if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || $2 != -- ]]; then
  echo "usage: $0 N -- COMMAND [ARGUMENT...]" >&2
  exit 2
fi
count=$1
shift 2

port=${PORT:-$((20000 + RANDOM % 20000))}
if [[ -z ${PORT:-} ]]; then
  while (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done  # somebody listens there
fi
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-2}"
export PYTHONUNBUFFERED=1
export OPSD_COORDINATOR=127.0.0.1:$port OPSD_NUM_PROCESSES=$count

prefixed() {
  trap '' INT TERM
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '%s\n' "$1$line"; done
}

pids=()
asked=0
stop() {
  asked=$((asked + 1))
  if ((asked == 1)); then
    echo "asking all processes to save and stop" >&2
    kill -TERM "${pids[@]}" 2> /dev/null || true
  else
    kill -KILL "${pids[@]}" 2> /dev/null || true
  fi
}
trap stop INT TERM

for ((i = 0; i < count; i++)); do
  OPSD_PROCESS_ID=$i "$@" > >(prefixed "[$i] ") 2>&1 &
  pids+=($!)
done

code=0
deadline=
left=("${!pids[@]}")
while ((${#left[@]})); do
  running=()
  for i in "${left[@]}"; do
    if kill -0 "${pids[i]}" 2> /dev/null; then
      running+=("$i")
      continue
    fi
    status=0
    { wait "${pids[i]}" || status=$?; } 2> /dev/null
    ((status == 0)) || echo "process $i of $count ended with code $status" >&2
    if ((code == 0 || code == 42)) && ((status != 0)); then
      code=$status
    fi
  done
  left=(${running[@]+"${running[@]}"})
  ((${#left[@]})) || break
  if ((code != 0 && code != 42)); then
    # A process that waits for a dead one cannot save: TERM is for commands that tidy up.
    if [[ -z $deadline ]]; then
      echo "ending the others" >&2
      for i in "${left[@]}"; do kill -TERM "${pids[i]}" 2> /dev/null || true; done
      deadline=$((SECONDS + 3))
    elif ((SECONDS > deadline)); then
      for i in "${left[@]}"; do kill -KILL "${pids[i]}" 2> /dev/null || true; done
    fi
  fi
  sleep 0.2
done
exit "$code"
