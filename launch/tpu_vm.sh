#!/usr/bin/env bash
# Trains, samples, evaluates or encodes on a Cloud TPU slice of any number of hosts, from your own machine, which needs the gcloud command:
#
#   NAME=dit ZONE=us-west4-a TYPE=v5litepod-16 bash launch/tpu_vm.sh [--dry-run] COMMAND [ARGUMENTS]
#
#   create [GCLOUD FLAGS]   asks for the slice and waits until it is there (flags such as --reserved, --service-account=..., --network=...)
#   install                 copies this checkout to every host and installs it; again after a change
#   run [sample | eval | cache] ARGUMENTS
#                           starts `python -m mmdiff train --distributed ARGUMENTS` on every host, or another command in the place of train;
#                           again, it continues the run, the set of samples or the cache
#   tail                    follows the log of the first host until the run ends; Ctrl-C leaves the run alone
#   stop                    sends SIGTERM to every host and waits: the run saves itself, and `run` continues it
#   delete                  gives the slice back, with everything on its disks
#   all [sample | eval | cache] ARGUMENTS
#                           create, install, run, tail
#
# `run` and `all` first build the config on your machine, and refuse what would not start before anything is paid for. That takes seconds,
# and mmdiff in .venv (options: launch/environment.sh), where it is installed once.
#
# NAME, ZONE, TYPE    the slice's name, place and kind: v4-32, v5litepod-16, v5p-32, v6e-16, ... (TYPE for create alone)
# PROJECT             default: gcloud's own
# RUNTIME             the image of the hosts; default: by TYPE
# SPOT=1              a cheaper slice that may be taken away: `delete` and `all`, with the same arguments, then continue the run
# BUCKET              a Cloud Storage bucket that every host mounts as /mnt/runs, for --workdir /mnt/runs/...; create it with
#                     --uniform-bucket-level-access --enable-hierarchical-namespace: only there is a folder renamed at once, which
#                     is what makes a checkpoint whole or absent
#
# The workdir must be one folder for all hosts, in the bucket or on a network file system; a slice of one host may use its disk.
#
# https://docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources, https://docs.cloud.google.com/tpu/docs/runtimes
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/commands.sh"

words=()
for word; do
    case $word in
        --dry-run) dry=1 ;;
        --help | -h) usage ;;
        *) words+=("$word") ;;
    esac
done
set -- ${words[@]+"${words[@]}"} # an empty array is an unset variable to the bash of macOS
command=${1:-}
shift $(($# > 0))

queued() { # queued VERB ARGUMENTS
    local verb=$1
    shift
    run gcloud compute tpus queued-resources "$verb" "$NAME" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} "$@"
}

host() { # host COMMAND ARGUMENTS: the part of launch/tpu_host.sh that runs there
    echo "${BUCKET:+BUCKET=$(quote "$BUCKET") }bash mmdiff/launch/tpu_host.sh $(quote "$@")"
}

everywhere() {
    queued ssh --node=all --worker=all "--command=$1"
}

create() {
    local runtime=${RUNTIME:-} nodes=("--node-id=$NAME") state
    if [[ -z $runtime ]]; then
        case $TYPE in
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v[234]-*) runtime=tpu-ubuntu2204-base ;;
            *) refuse "TYPE=$TYPE has no known image: the types are v4-N, v5litepod-N, v5p-N and v6e-N; for another one set RUNTIME too." ;;
        esac
    fi
    ((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$NAME")
    queued create "--accelerator-type=$TYPE" "--runtime-version=$runtime" "${nodes[@]}" ${SPOT:+--spot} "$@"
    while true; do
        state=$(queued describe "--format=value(state.state)") || state=unknown
        [[ -z $dry && $state != ACTIVE ]] || return 0
        echo "$NAME is $state" >&2
        if [[ $state == FAILED || $state == SUSPEND* ]]; then
            echo "mmdiff: error: there will be no $NAME: see why with gcloud's describe, then delete it." >&2
            exit 1
        fi
        sleep 30
    done
}

install() {
    local packed=${XDG_CACHE_HOME:-$HOME/.cache}/mmdiff/checkout.tar.gz
    run mkdir -p "$(dirname "$packed")"
    run tar -czf "$packed" --exclude=__pycache__ -C "$root" LICENSE README.md setup.py pyproject.toml configs launch mmdiff
    # Not `scp` and `ssh` of tpu-vm: these know one slice only.
    run gcloud compute tpus queued-resources scp "$packed" "$NAME:" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --node=all --worker=all
    everywhere "mkdir -p mmdiff && rm -rf mmdiff/configs mmdiff/launch mmdiff/mmdiff && tar -xzf checkout.tar.gz -C mmdiff && $(host install)"
}

start() {
    local flags=
    if ((slices > 1)) && [[ $(command_of "$@") == train ]]; then
        # Gradients of different slices are summed while the backward pass continues: https://docs.jax.dev/en/latest/xla_flags.html
        flags="LIBTPU_INIT_ARGS=$(quote "${LIBTPU_INIT_ARGS:---xla_tpu_enable_data_parallel_all_reduce_opt=true}") "
    fi
    everywhere "$flags$(host run "$@")"
}

# How many devices JAX sees on all slices: of v4 and v5p the number in TYPE counts cores, two in a chip. 0 where TYPE is not set.
devices() {
    local kind=${TYPE:-} number
    number=${kind##*-}
    case $kind in
        v4-* | v5p-*) echo $((number * slices / 2)) ;;
        *-*) echo $((number * slices)) ;;
        *) echo 0 ;;
    esac
}

# Builds the config here, from the folder and by the paths that the hosts will have.
check_here() {
    local config venv=${VENV:-$root/.venv}
    config=$(value_of --config "$@")
    [[ -z $config || $config == configs/* || $config != /* && ! -e $root/$config ]] ||
        refuse "$config does not come with the checkout that the hosts get: put the config below configs/ and name it so."
    [[ $venv == /* ]] || venv=$PWD/$venv
    run cd "$root"
    run "$BASH" -c "$(quote "$venv/bin/python" -c 'import mmdiff') 2>/dev/null || { source launch/environment.sh && VENV=$(quote "$venv") environment ''; }"
    check_build "$venv/bin/python" "$(devices)" "$@"
}

case $command in
    create | all) settings="NAME ZONE TYPE" ;;
    install | run | tail | stop | delete) settings="NAME ZONE" ;;
    "") refuse "no command: choose one of create, install, run, tail, stop, delete, all (see --help)." ;;
    *) refuse "there is no command $command: choose one of create, install, run, tail, stop, delete, all (see --help)." ;;
esac
for setting in $settings; do
    [[ -n ${!setting:-} ]] || refuse "$setting is not set: give it in front of the command, as in NAME=dit ZONE=us-west4-a TYPE=v5litepod-16."
done
slices=${SLICES:-1}
[[ $slices =~ ^[1-9][0-9]*$ ]] || refuse "SLICES=$slices: give a number of slices, 1 or more."
if [[ $command == run || $command == all ]]; then # before a slice is paid for
    check_run "$@"
    for flag in --workdir --out --samples; do
        [[ -z ${BUCKET:-} || -z $(value_of "$flag" "$@") || $(value_of "$flag" "$@") == /mnt/runs/* ]] ||
            refuse "with BUCKET $flag must be below /mnt/runs, where the bucket is, as in $flag /mnt/runs/digits."
    done
    if ((slices > 1)) && [[ $(command_of "$@") == train && -z $(value_of --config.train.mesh.slices "$@") ]]; then
        set -- "$@" "--config.train.mesh.slices=$slices"
    fi
    check_here "$@"
fi

case $command in
    create) create "$@" ;;
    install) install ;;
    run) start "$@" ;;
    stop) everywhere "$(host stop)" ;;
    delete) queued delete --force --quiet ;;
    all)
        create
        install
        start "$@"
        ;;
esac
if [[ $command == tail || $command == all ]]; then
    queued ssh --node=0 --worker=0 "--command=$(host tail)"
fi
