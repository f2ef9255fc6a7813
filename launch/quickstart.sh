#!/usr/bin/env bash
# From nothing to a trained joint image-label diffusion model and its report:
#
#   bash launch/quickstart.sh [WORKDIR] [--config.KEY=VALUE ...]
#
# Installs mmdiff into .venv, trains configs/digits_joint.py into WORKDIR (default: runs/digits_joint), evaluates it, and prints the metrics
# and where the report is. Run again, it continues what was interrupted and repeats nothing that is done. Options: launch/environment.sh.
set -euo pipefail
start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

workdir=runs/digits_joint
if [[ ${1:---} != --* ]]; then
    workdir=$1
    shift
    [[ $workdir == /* ]] || workdir=$start/$workdir
fi
run=(--config configs/digits_joint.py --workdir "$workdir")

SECONDS=0
environment "${EXTRAS:-}"
echo "Training into $workdir"
"$python" -m mmdiff train "${run[@]}" "$@"
echo "Evaluating"
"$python" -m mmdiff eval "${run[@]}" --reuse  # with the config that the run has stored
echo
echo "Done in $SECONDS s. To sample sevens:"
echo "  $python -m mmdiff sample ${run[*]} --given label=7"
