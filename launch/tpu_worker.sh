#!/usr/bin/env bash
# What tpu_vm.sh does on each worker, in the folder of the checkout.
#
#   tpu_worker.sh setup [BUCKET]   installs Python, the package, and gcsfuse if there is a bucket; mounts it as runs/
#   tpu_worker.sh run COMMAND...   starts the command in the background: log.txt, run.pid, at its end run.code
#   tpu_worker.sh stop             asks it to save and stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_running() { [[ -f run.pid ]] && kill -0 "$(cat run.pid)" 2> /dev/null; }

setup() {
  export PATH=$HOME/.local/bin:$PATH
  command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --allow-existing --python 3.12 venv  # the Python of TPU VMs is older than 3.11
  uv pip install --python venv/bin/python -e ".[tpu]" -c constraints/py312.txt
  mkdir -p runs
  local bucket=${1:-}
  if [[ -z $bucket ]]; then
    echo "no BUCKET: runs/ is a folder of this worker; more than one worker needs a bucket" >&2
  elif ! mountpoint -q runs; then
    if ! command -v gcsfuse > /dev/null; then
      local keys=/usr/share/keyrings/cloud.google.asc
      curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" > /dev/null
      echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
      sudo apt-get update -q && sudo apt-get install -qy gcsfuse
    fi
    # On TPU machines gcsfuse would remember for ever what other workers have long changed.
    gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" runs
  fi
}

run() {
  if is_running; then
    echo "error: a command runs already (process $(cat run.pid)): tpu_vm.sh stop, or look at its logs" >&2
    exit 1
  fi
  rm -f run.code
  export PATH=$PWD/venv/bin:$PATH
  printf '\n%s  %s\n' "$(date -u +%FT%TZ)" "$*" >> log.txt
  # setsid: it lives on when the ssh connection ends.
  setsid nohup bash -c '"$@" & echo $! > run.pid; wait $!; echo $? > run.code; echo "ended with code $(cat run.code)"' \
    run "$@" >> log.txt 2>&1 < /dev/null &
  sleep "${SETTLE_S:-5}"
  if [[ -f run.code && $(cat run.code) != 0 ]]; then
    tail -n 20 log.txt >&2
    exit 1
  fi
  echo "$(hostname): started, log in opsd/log.txt"
}

stop() {
  is_running || { echo "error: nothing runs here" >&2; exit 1; }
  kill -TERM "$(cat run.pid)"
}

case ${1:-} in
  setup) setup "${@:2}" ;;
  run) run "${@:2}" ;;
  stop) stop ;;
  *) echo "usage: $0 setup [BUCKET] | run COMMAND... | stop" >&2; exit 2 ;;
esac
