#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every host of a slice, in the home folder:
#
#   [BUCKET=name] bash mmdiff/launch/tpu_host.sh install | run [sample | eval | cache] ARGUMENTS | tail | stop
#
# The checkout is in mmdiff, the log in mmdiff.log, the number of the process in mmdiff.pid.
set -euo pipefail
home=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

is_alive() {
    [[ -f $home/mmdiff.pid ]] && grep -qs mmdiff "/proc/$(cat "$home/mmdiff.pid")/cmdline"
}

mount_bucket() {
    [[ -n ${BUCKET:-} ]] && ! mountpoint -q /mnt/runs || return 0
    if ! command -v gcsfuse >/dev/null; then
        # https://docs.cloud.google.com/storage/docs/cloud-storage-fuse/install
        local key=/usr/share/keyrings/cloud.google.asc
        curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        # A new host is still updating itself: wait for its lock.
        sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
        sudo apt-get -qq -o DPkg::Lock::Timeout=300 install gcsfuse
    fi
    sudo install -d -o "$USER" /mnt/runs
    # No metadata is kept: what another host has just written must be seen.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$BUCKET" /mnt/runs
}

install_checkout() {
    if [[ ! -x .venv/bin/python ]]; then
        # The images come with Python 3.10, which is too old; uv brings its own.
        [[ -x ~/.local/bin/uv ]] || curl -fsSL https://astral.sh/uv/install.sh | sh
        ~/.local/bin/uv venv --quiet --seed --python 3.12 .venv
    fi
    environment tpu
    mount_bucket
}

start() {
    ! is_alive || fail "a run is alive on this host: stop it first."
    install_checkout # nothing to do, unless the host was restarted
    local command=train
    case $1 in
        train | sample | eval | cache)
            command=$1
            shift
            ;;
    esac
    # Without SIGHUP the process outlives the connection, and when the host shuts down SIGTERM is what it gets.
    trap '' HUP
    "$python" -m mmdiff "$command" --distributed "$@" >>"$home/mmdiff.log" 2>&1 </dev/null &
    echo $! >"$home/mmdiff.pid"
}

stop() {
    if is_alive; then
        local pid
        pid=$(cat "$home/mmdiff.pid")
        kill "$pid"
        timeout 600 tail --pid="$pid" -f /dev/null || fail "the run is still alive ten minutes after SIGTERM: see mmdiff.log."
    fi
}

command=$1
shift
case $command in
    install) install_checkout ;;
    run) start "$@" ;;
    tail) tail --pid="$(cat "$home/mmdiff.pid")" -n 50 -F "$home/mmdiff.log" ;;
    stop) stop ;;
esac
