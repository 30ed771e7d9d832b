#!/usr/bin/env bash
# A command on GKE, waited for: launch/gke.sh NAME -- COMMAND... gke.py has the variables; it needs kubectl and any
# Python from 3.9 on, and no packages.
exec python3 "$(dirname "${BASH_SOURCE[0]}")/gke.py" "$@"
