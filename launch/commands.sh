# shellcheck shell=bash
# Sourced by the scripts that call a cluster's tools: `run COMMAND ...` runs a command, or prints it where the script was given --dry-run.

dry=
exec 3>&1 # where a dry run prints, also from within $(...)

run() {
    if [[ -n $dry ]]; then
        quote "$@" >&3
    else
        "$@"
    fi
}

# The words as one line that a shell reads as the same words.
quote() {
    local word line=
    for word; do
        if [[ -z $word || $word == *[!A-Za-z0-9_@%+=:,./-]* ]]; then
            word="'${word//\'/\'\\\'\'}'"
        fi
        line+=" $word"
    done
    echo "${line# }"
}

refuse() {
    echo "mmdiff: error: $*" >&2
    exit 2
}

# The comment at the top of the script.
usage() {
    sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"
    exit 0
}

# value_of FLAG WORDS: the value of --flag VALUE or --flag=VALUE among the words; empty if it is not there.
value_of() {
    local flag=$1
    shift
    while (($#)); do
        case $1 in
            "$flag") echo "${2:-}"; return ;;
            "$flag="*) echo "${1#*=}"; return ;;
        esac
        shift
    done
}

# What a run does: the mmdiff command that its words begin with, train where they begin with none.
command_of() {
    case ${1:-} in
        sample | eval | cache) echo "$1" ;;
        *) echo train ;;
    esac
}

# The words of a run have to say what it works on, and where.
check_run() {
    local command
    command=$(command_of "$@")
    if [[ $command == eval && -n $(value_of --samples "$@") ]]; then
        return
    fi
    [[ -n $(value_of --config "$@") ]] || refuse "--config is missing: say what is trained, as in --config configs/digits_joint.py."
    if [[ $command == cache ]]; then
        [[ -n $(value_of --out "$@") ]] || refuse "--out is missing: name a folder that all hosts see, as in --out /mnt/runs/latents."
        return
    fi
    [[ -n $(value_of --workdir "$@") ]] || refuse "--workdir is missing: name a folder that all hosts see, as in --workdir /mnt/runs/digits."
    [[ $command != sample || -n $(value_of --format "$@") ]] ||
        refuse "--format is missing: several processes sample sets of images, --format npz or --format png."
}

# check_build PYTHON DEVICES WORDS: refuses what would not start on so many devices (0: unknown) as hosts start it, as far as this machine
# can know.
check_build() {
    local python=$1 devices=$2 command
    shift 2
    command=$(command_of "$@")
    [[ ${1:-} != "$command" ]] || shift
    run env JAX_PLATFORMS=cpu "$python" -m mmdiff "$command" --check "$devices" --distributed "$@" || exit 2
}
