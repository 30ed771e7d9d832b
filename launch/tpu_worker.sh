#!/usr/bin/env bash
# What tpu_vm.sh does on each worker, in the folder of the checkout.
#
#   tpu_worker.sh setup [BUCKET]   installs Python, the package, and gcsfuse if there is a bucket; mounts it as runs/
#   tpu_worker.sh run COMMAND...   starts the command in the background, and again whenever another process was lost
#   tpu_worker.sh status           one line: idle, running, ended CODE, or lost (ended without a code, as by a reboot)
#   tpu_worker.sh stop             asks the command to save and stop, and waits until it has
#
# Files: log.txt, run.command, run.code (at the end). run.lock is locked while the command or its supervisor lives: the
# kernel frees it at a reboot, too. log.txt is copied to runs/logs/ in the bucket, where it outlives the machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RESTARTS=${RESTARTS:-10}  # at most, for one `run`

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

is_running() { [[ -e run.lock ]] && ! flock --shared -n run.lock true; }  # shared: two may ask at once

apt_get() { # waits for other users of apt: a new machine installs its updates
  local try
  for ((try = 1; try <= 30; try++)); do
    sudo apt-get -o DPkg::Lock::Timeout=60 "$@" && return
    echo "apt-get failed, attempt $try of 30" >&2
    sleep "${PAUSE_S:-10}"
  done
  return 1
}

install_gcsfuse() {
  local keys=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" > /dev/null
  echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  apt_get update -q && apt_get install -qy gcsfuse
}

is_mounted() { mountpoint -q runs && timeout 60 ls runs > /dev/null 2>&1; }  # ls fails where gcsfuse has died

# Makes runs/ the bucket that `setup` was given, if one was; after a reboot it is an empty folder of this machine, in
# which a run would begin at step 0.
mount_bucket() {
  local bucket
  [[ -f run.bucket ]] || { echo "error: $(hostname) is not set up: tpu_vm.sh setup" >&2; return 1; }
  bucket=$(< run.bucket)
  [[ -n $bucket ]] || return 0
  if is_mounted; then return 0; fi
  sudo umount -l runs 2> /dev/null || true
  if [[ -n $(ls -A runs) ]]; then
    echo "error: $(hostname): runs/ is not the bucket $bucket, and holds files of this machine: move them away" >&2
    return 1
  fi
  # On large TPU machines gcsfuse would remember for ever what other workers have long changed, and on small ones write
  # all but 4 files at a time through the boot disk. 9: the lock of the run, which gcsfuse must not keep.
  gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --write-global-max-blocks=1600 \
    "$bucket" runs 9>&- || { echo "error: $(hostname): the bucket $bucket cannot be mounted as runs/" >&2; return 1; }
  mkdir -p runs/logs
}

setup() {
  if is_running; then fail "a command runs here, which would be changed while it runs: tpu_vm.sh stop"; fi
  export PATH=$HOME/.local/bin:$PATH
  command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --allow-existing --python 3.12 venv  # the Python of TPU VMs is older than 3.11
  uv pip install --python venv/bin/python -e ".[tpu${EXTRAS:+,$EXTRAS}]" -c constraints/py312.txt
  mkdir -p runs
  if [[ -n ${1:-} ]] && ! command -v gcsfuse > /dev/null; then install_gcsfuse; fi
  printf '%s' "${1:-}" > run.bucket
  mount_bucket
}

run() {
  local words
  printf -v words '%q ' "$@"
  if is_running; then
    [[ -f run.command && $(< run.command) == "$words" ]] ||
      fail "another command runs here already: $(cat run.command). tpu_vm.sh stop ends it"
    echo "$(hostname): runs already, log in opsd/log.txt"
    return
  fi
  exec 9> run.lock
  flock -w 5 9 || fail "another command is being started here"
  mount_bucket || exit 1  # with the lock: of two at once, each would unmount the bucket of the other
  rm -f run.code run.stop run.pid
  echo "$words" > run.command
  export PATH=$PWD/venv/bin:$PATH RESTARTS
  # setsid: it lives on when the ssh connection ends.
  setsid nohup bash launch/tpu_worker.sh supervise "$@" >> log.txt 2>&1 < /dev/null &
  exec 9>&-
  # Ends within 5 s: what is wrong with the command is said here.
  if flock -w "${SETTLE_S:-5}" run.lock true && [[ $(cat run.code) != 0 ]]; then
    tail -n 20 log.txt >&2
    exit 1
  fi
  echo "$(hostname): started, log in opsd/log.txt"
}

copy_log() { # nowhere, where the bucket is not mounted: runs/logs exists in it alone
  if [[ -s run.bucket && -d runs/logs ]]; then timeout 60 cp log.txt "runs/logs/$(hostname).txt"; fi
}

# Whether the command is to be started again after this code: it saved at a signal that nobody here sent (42), another
# process is gone (43, 134), it was killed (137), ended before it could save (143), or lost the bucket.
may_continue() {
  [[ ! -e run.stop ]] || return 1
  case $1 in
    42 | 43 | 134 | 137 | 143) return 0 ;;
    0) return 1 ;;
    *) [[ -s run.bucket ]] && ! is_mounted ;;
  esac
}

supervise() { # with the lock of the run as descriptor 9, which the command inherits
  local start code=1 pid copier
  (while sleep "${COPY_S:-60}" && is_running; do copy_log || true; done) 9>&- &
  copier=$!
  for ((start = 0; start <= RESTARTS; start++)); do
    if ((start > 0)); then sleep "${PAUSE_S:-10}"; fi
    if [[ -e run.stop ]]; then
      code=42
      break
    fi
    printf '\n%s  start %d of at most %d: %s\n' "$(date -u +%FT%TZ)" $((start + 1)) $((RESTARTS + 1)) "$*"
    mount_bucket || continue
    "$@" &
    pid=$!
    echo "$pid" > run.pid
    code=0
    wait "$pid" || code=$?
    rm -f run.pid
    echo "ended with code $code"
    may_continue "$code" || break
  done
  kill "$copier" 2> /dev/null || true
  copy_log || true
  echo "$code" > run.code
}

status() {
  local state=idle
  if is_running; then
    state=running
  elif [[ -f run.code ]]; then
    state="ended $(< run.code)"
  elif [[ -f run.command ]]; then
    state=lost
  fi
  echo "worker $(hostname) $state"
}

stop() {
  is_running || fail "nothing runs here"
  touch run.stop  # not to be started again
  if [[ -f run.pid ]]; then kill -TERM "$(< run.pid)" 2> /dev/null || true; fi  # none between two starts
  flock -w "${STOP_S:-600}" run.lock true || fail "still running after ${STOP_S:-600} s, see opsd/log.txt"
  echo "$(hostname): stopped"
}

case ${1:-} in
  setup | run | supervise | status | stop) "$@" ;;
  *) echo "usage: $0 setup [BUCKET] | run COMMAND... | status | stop" >&2; exit 2 ;;
esac
