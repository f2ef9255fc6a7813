#!/usr/bin/env bash
# Builds the pages of the API from the docstrings into docs/ (not in git):
#
#   bash launch/docs.sh [FOLDER]
#
# Open docs/index.html. Options: launch/environment.sh.
set -euo pipefail
start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

folder=${1:-docs}
[[ $folder == "${1:-}" && $folder != /* ]] && folder=$start/$folder
environment "docs${EXTRAS:+,$EXTRAS}"
JAX_PLATFORMS=cpu "$python" launch/api_pages.py "$folder"
echo "$folder/index.html"
