#!/usr/bin/env bash
# From nothing to a trained joint image-label diffusion model and its report:
#
#   bash launch/quickstart.sh [WORKDIR]
#
# Installs mmdiff into .venv, trains configs/digits_joint.py into WORKDIR (default: runs/digits_joint), evaluates it, and prints the figures
# and where the report is. Run again, it continues what was interrupted and repeats nothing that is done. Options: launch/environment.sh.
set -euo pipefail
start=$(pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

workdir=${1:-runs/digits_joint}
[[ $# -eq 0 || $workdir == /* ]] || workdir=$start/$workdir
SECONDS=0
environment "${EXTRAS:-}"
echo "Installed after $SECONDS s"
"$python" -m mmdiff train --config configs/digits_joint.py --workdir "$workdir"
"$python" -m mmdiff eval --config configs/digits_joint.py --workdir "$workdir"
echo "Done in $SECONDS s. Draw samples with:"
echo "  $python -m mmdiff sample --config configs/digits_joint.py --workdir $workdir --given label=7"
