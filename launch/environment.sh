# shellcheck shell=bash
# Sourced by the launch scripts: `environment EXTRAS` makes .venv with mmdiff and those extras of setup.py (none, or a comma-separated list),
# and leaves the path of its Python in $python.
#
# PYTHON=python3.12   which Python to use (default: the first of python3, python3.13, 3.12, 3.11 that is new enough)
# VENV=DIR            where the virtual environment is (default: .venv)
# EXTRAS=cuda         an accelerator on top of the CPU: cuda or tpu (default: none, so nothing for GPUs is downloaded)

# On a CPU every step takes and returns some 100 MB; in huge pages that costs a hundredth of the page faults (10-15 % of a step).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

fail() {
    echo "mmdiff: error: $*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.11 or newer."
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "mmdiff needs Python 3.11 or newer; install one, or name it: PYTHON=/path/to/python3.12 bash $0"
}

environment() {
    local extras=$1 venv=${VENV:-.venv} stamp base uv package
    python=$venv/bin/python
    # The stamp is the whole of setup.py and the extras: any change installs again, no change installs nothing.
    stamp=$(echo "extras: $extras"; cat setup.py)
    if [[ -x $python && -f $venv/mmdiff.stamp && $stamp == "$(cat "$venv/mmdiff.stamp")" ]]; then
        return
    fi
    if ! "$python" -c 'import pip' 2>/dev/null; then
        base=$(find_python)
        "$base" -m venv "$venv" || fail "$base cannot create a virtual environment: install its venv package, such as python3-venv."
    fi
    echo "Installing mmdiff${extras:+[$extras]} into $venv: a minute or two, once"
    # uv installs several times faster than pip, but does not read pip's settings: where it fails, pip gets its turn.
    uv=$(command -v uv || true)
    if [[ -z $uv ]] && "$python" -m pip install --quiet --disable-pip-version-check uv; then
        uv=$venv/bin/uv
    fi
    package=.${extras:+[$extras]}
    "${uv:-false}" pip install --quiet --python "$python" --editable "$package" ||
        "$python" -m pip install --quiet --disable-pip-version-check --editable "$package"
    echo "$stamp" >"$venv/mmdiff.stamp"
}
