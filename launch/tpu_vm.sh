#!/usr/bin/env bash
# A run on Cloud TPU VMs, from your own machine: launch/tpu_vm.sh VERB. tpu_vm.py has the verbs and the variables; it
# needs gcloud and any Python from 3.9 on, and no packages.
exec python3 "$(dirname "${BASH_SOURCE[0]}")/tpu_vm.py" "$@"
