#!/usr/bin/env bash
# A run on a GKE cluster that XPK made (pip install xpk). XPK writes the JobSet and builds no image here.
#
#   CLUSTER=c PROJECT=p ZONE=z IMAGE=i STORAGE=s launch/xpk.sh NAME -- \
#       python -m opsd_jax.train --config=configs/mini.py --workdir=/runs/mini --config.run_arms="()"
#
# STORAGE is what `xpk storage attach` mounts at /runs, on a bucket with hierarchical namespace (docs/guides/several-machines.md).
# DRY_RUN=1 prints the command and does nothing.
set -euo pipefail

TYPE=${TYPE:-v5litepod-16}
TYPE=${TYPE/#v5e-/v5litepod-}
SLICES=${SLICES:-1}
RESTARTS=${RESTARTS:-10}  # each is paid for; an error that comes again by 137 (out of memory), too

[[ $# -ge 3 && $2 == -- ]] || { echo "usage: $0 NAME -- COMMAND..." >&2; exit 2; }
name=$1
shift 2
for variable in CLUSTER PROJECT ZONE IMAGE STORAGE; do
  [[ -n ${!variable:-} ]] || { echo "error: $variable is not set" >&2; exit 1; }
done

# XPK restarts on 42 and 127-255 by itself, and on 43 (another process is gone) when told to; other codes are errors.
# It runs the command in a shell, hence `exec`: SIGTERM has to reach Python. Its own grace period is 30 s, in which no
# large checkpoint is written.
command=(xpk workload create --workload="$name" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
  --tpu-type="$TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" --storage="$STORAGE"
  --max-restarts="$RESTARTS" --restart-on-exit-codes=43 --termination-grace-period-seconds=300
  --command="exec$(printf ' %q' "$@")")
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  "${command[@]}"
fi
