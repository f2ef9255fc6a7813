#!/usr/bin/env bash
# Installs mmdiff with its test tools into .venv and runs the tests:
#
#   bash launch/test.sh [PYTEST ARGUMENTS]
#
# for example `bash launch/test.sh tests/laws -k gaussian`, or `-n 0` for one process. Without arguments, the default tier: every law and
# every path, some by one representative; `--all` adds the full grids, the long kills and the configs one by one.
# Options: launch/environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

environment "test${EXTRAS:+,$EXTRAS}"
export JAX_PLATFORMS=cpu
# Most of the time goes into compiling, which uses one core: one process for each, and a file stays together for its fixtures.
# A process that dies ends the run: without the limit pytest-xdist waits for the rest of its file for ever.
"$python" -m pytest -n logical --maxprocesses 8 --max-worker-restart 0 --dist loadfile "$@"
