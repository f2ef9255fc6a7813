#!/usr/bin/env bash
# Trains, samples, evaluates or encodes on several TPU slices that are joined by the data-centre network: launch/tpu_vm.sh with SLICES.
#
#   NAME=dit ZONE=us-west4-a TYPE=v5litepod-16 SLICES=2 bash launch/multislice.sh [--dry-run] COMMAND [ARGUMENTS]
#
# Commands and settings are those of `launch/tpu_vm.sh --help`. One queued resource holds all slices and tells each host its slice (the
# MEGASCALE values that jax.distributed reads), and train.mesh.slices=SLICES is added to the training arguments: each slice has the whole
# model, and only gradients travel between them. The slices come and go together.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/commands.sh"
case " $* " in *" --help "* | *" -h "*) usage ;; esac
[[ ${SLICES:-} =~ ^[0-9]+$ && $SLICES -gt 1 ]] || refuse "SLICES must be 2 or more: give it in front of the command, as in SLICES=2."
export SLICES
exec "$BASH" "$root/launch/tpu_vm.sh" "$@"
