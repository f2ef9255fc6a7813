#!/usr/bin/env bash
# One look at a GPU, in ten minutes at most: do the backends of attention agree there, and how fast does DiT-XL/2 train with each?
#
#   bash launch/gpu_check.sh [--out DIR] [--batch 64] [--config.KEY=VALUE ...]
#
# DIR (default: gpu_check) gets check.json and check.txt, written again after each part. The status is 1 where a backend differs. Without a
# GPU it says so, and that is all.
# PYTHON=... is used as it is where it has jax for GPUs and flax, optax and ml_collections; else .venv is made (options: launch/environment.sh).
set -euo pipefail
if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "there is no NVIDIA GPU here (nvidia-smi finds none): nothing was checked."
    exit 0
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if ! "$python" -c 'import flax, jax, ml_collections, optax; jax.devices("gpu")' >/dev/null 2>&1; then
    cd "$root"
    source launch/environment.sh
    environment "${EXTRAS:-cuda}"
    [[ $python == /* ]] || python=$root/$python
    cd "$OLDPWD"
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" "$root/launch/gpu_check.py" "$@"
