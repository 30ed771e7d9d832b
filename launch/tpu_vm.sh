#!/usr/bin/env bash
# A run on Cloud TPU VMs, from your own machine: queued resources, one slice or several.
#
#   launch/tpu_vm.sh create                  asks for the TPU and waits until it is there; again goes on waiting
#   launch/tpu_vm.sh setup                   copies this checkout to all workers, installs it, mounts BUCKET as runs/
#   launch/tpu_vm.sh run -- COMMAND...       starts the command of a laptop on all workers; again continues the run
#   launch/tpu_vm.sh logs                    follows the log of one worker (WORKER=0, NODE=0)
#   launch/tpu_vm.sh stop                    all workers save and stop (code 42)
#   launch/tpu_vm.sh delete                  gives the TPU back; the bucket stays
#
#   launch/tpu_vm.sh run -- python -m opsd_jax.train --config=configs/mini.py --workdir=runs/mini --config.run_arms="()"
#
# DRY_RUN=1 prints the gcloud commands and runs none. Set the variables below here or in the environment.
set -euo pipefail

NAME=${NAME:-opsd}                        # of the queued resource and of its nodes
PROJECT=${PROJECT:-}                      # your Google Cloud project
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}                # v5litepod-16, v5p-8, v5p-32, v6e-16, ...
VERSION=${VERSION:-}                      # runtime; empty: the usual one for TYPE
SLICES=${SLICES:-1}                       # more than 1: multislice, put config.mesh.data across them
SPOT=${SPOT:-0}                           # 1: cheaper, may be taken away
BUCKET=${BUCKET:-}                        # without gs://; hierarchical namespace, see docs/guides/several-machines.md
WAIT_S=${WAIT_S:-7200}                    # how long `create` waits
POLL_S=${POLL_S:-30}
WORKER=${WORKER:-0}                       # whose log; all for every worker of the node
NODE=${NODE:-0}                           # of which slice

fail() {
  echo "error: $*" >&2
  exit 1
}

gcloud_() { # gcloud, or its command line with DRY_RUN=1
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%s' gcloud
    printf ' %q' "$@"
    echo
  else
    gcloud "$@"
  fi
}

[[ -n $PROJECT ]] || fail "PROJECT is not set: PROJECT=my-project $0 ..."
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$SLICES: give a whole number, at least 1"
place=(--zone="$ZONE" --project="$PROJECT")
if ((SLICES == 1)); then
  nodes=("$NAME")
else
  nodes=()
  for ((i = 0; i < SLICES; i++)); do nodes+=("$NAME-$i"); done
fi

runtime() {
  case $TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "TYPE=$TYPE: set VERSION, the runtime for it" ;;
  esac
}

state() {
  gcloud_ compute tpus queued-resources describe "$NAME" "${place[@]}" --format="value(state.state)"
}

on_all() { # a command on every worker of every slice, at the same time; fails if it fails anywhere
  local pids=() node pid bad=0
  for node in "${nodes[@]}"; do
    if [[ ${DRY_RUN:-0} == 1 ]]; then
      gcloud_ compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1"
      continue
    fi
    gcloud_ compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1" &
    pids+=($!)
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || bad=1; done
  ((bad == 0)) || fail "the command failed on a worker, see above"
}

create() {
  local version now waited=0 shape options=()
  version=${VERSION:-$(runtime)}
  if ((SLICES == 1)); then shape=(--node-id="$NAME"); else shape=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  [[ $SPOT != 1 ]] || options+=(--spot)
  if [[ ${DRY_RUN:-0} == 1 ]] || ! state > /dev/null 2>&1; then
    gcloud_ compute tpus queued-resources create "$NAME" "${shape[@]}" "${place[@]}" --accelerator-type="$TYPE" \
      --runtime-version="$version" --scopes=https://www.googleapis.com/auth/cloud-platform \
      ${options[@]+"${options[@]}"}
  fi
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    state
    return
  fi
  while true; do
    now=$(state)
    case $now in
      ACTIVE)
        echo "$NAME is ACTIVE"
        return
        ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "$NAME is $now: $0 delete, then create again (gcloud compute tpus queued-resources describe tells why)"
        ;;
    esac
    ((waited < WAIT_S)) ||
      fail "$NAME is still $now after $WAIT_S s; it stays in the queue: create again to go on waiting"
    echo "$NAME is $now; waited $waited of $WAIT_S s"
    sleep "$POLL_S"
    waited=$((waited + POLL_S))
  done
}

setup() {
  local root pack node
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  pack=$(mktemp -d)/opsd.tar.gz
  # What git tracks, as it lies here, and new files that it does not ignore.
  git -C "$root" ls-files -z --cached --others --exclude-standard | tar -C "$root" --null -T - -czf "$pack"
  for node in "${nodes[@]}"; do
    gcloud_ compute tpus tpu-vm scp "$pack" "$node:opsd.tar.gz" "${place[@]}" --worker=all
  done
  on_all "mkdir -p opsd && tar -xzf opsd.tar.gz -C opsd && bash opsd/launch/tpu_worker.sh setup $BUCKET"
  rm -r "$(dirname "$pack")"
}

run() {
  [[ ${1:-} == -- && $# -gt 1 ]] || fail "usage: $0 run -- COMMAND..."
  shift
  on_all "bash opsd/launch/tpu_worker.sh run$(printf ' %q' "$@")"
}

case ${1:-} in
  create) create ;;
  setup) setup ;;
  run) run "${@:2}" ;;
  logs)
    gcloud_ compute tpus tpu-vm ssh "${nodes[NODE]}" "${place[@]}" --worker="$WORKER" \
      --command="tail -n 100 -F opsd/log.txt"
    ;;
  # One process is enough: it tells the others, and all save the same step.
  stop)
    gcloud_ compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" --worker=0 \
      --command="bash opsd/launch/tpu_worker.sh stop"
    ;;
  delete) gcloud_ compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet ;;
  *) fail "usage: $0 create | setup | run -- COMMAND... | logs | stop | delete (the head of this file says more)" ;;
esac
