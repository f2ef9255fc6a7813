#!/usr/bin/env bash
# Trains, samples, evaluates or encodes on the GPUs of a Slurm cluster, one process per GPU; from a folder that all nodes see:
#
#   NODES=2 GPUS=8 bash launch/slurm.sh [--dry-run] [sample | eval | cache] --config FILE --workdir DIR [--config.KEY=VALUE ...]
#
# Installs mmdiff into .venv (options: launch/environment.sh), builds the config there and then, so that what would not start is refused
# before it waits, and hands itself to sbatch. Within an allocation (salloc) it starts at once.
# Five minutes before the time limit, and when it is preempted, every process gets SIGTERM, saves and exits with 143; the job then puts
# itself back into the queue, and continues the run or the set of samples. The log is WORKDIR/slurm-JOB.log; `scancel JOB` ends it for good.
#
# NODES=1     machines
# GPUS=8      GPUs of each machine
# CPUS=8      cores for each GPU
# SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_TIMELIMIT, ... are sbatch's own: https://slurm.schedmd.com/sbatch.html
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
set -- ${words[@]+"${words[@]}"}
check_run "$@"
venv=${VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
nodes=${NODES:-1} gpus=${GPUS:-8} cpus=${CPUS:-8}
[[ $nodes$gpus$cpus =~ ^[0-9]+$ ]] || refuse "NODES, GPUS and CPUS are numbers, not '$nodes', '$gpus' and '$cpus'."

submit() {
    local workdir
    workdir=$(value_of --workdir "$@")
    workdir=${workdir:-.} # where the log is
    run "$BASH" -c "cd $(quote "$root") && source launch/environment.sh && VENV=$(quote "$venv") environment ${EXTRAS:-cuda}"
    check_build "$venv/bin/python" $((nodes * gpus)) "$@"
    run mkdir -p "$workdir"
    # --wrap: a script of its own would be copied away from the checkout. --signal: to the processes, not to this script.
    run sbatch --job-name=mmdiff "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" "--cpus-per-task=$cpus" \
        --signal=TERM@300 --requeue --open-mode=append "--output=$workdir/slurm-%j.log" \
        "--wrap=exec $(quote env "VENV=$venv" "CPUS=$cpus" bash "$root/launch/slurm.sh" "$@")"
}

start() {
    local command status=0 cancelled=
    command=$(command_of "$@")
    [[ ${1:-} != "$command" ]] || shift
    # scancel, and a preemption after which Slurm itself requeues the job, signal this script too; the time limit does not.
    trap 'cancelled=1' TERM
    # JAX takes one GPU for each process of a node, by its number there: each must see them all. A process that is done must not end the
    # others, which may still be saving (if one dies, JAX ends the rest itself). The flag lets communication overlap with computation:
    # https://docs.jax.dev/en/latest/gpu_performance_tips.html
    run env "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_gpu_enable_latency_hiding_scheduler=true" \
        srun "--cpus-per-task=$cpus" --gpu-bind=none --kill-on-bad-exit=0 \
        "$venv/bin/python" -m mmdiff "$command" --distributed "$@" || status=$?
    if [[ -n $dry || $status =~ ^(143|138)$ && -z $cancelled ]]; then # 128 + SIGTERM, or SIGUSR1 of another --signal
        run scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    submit "$@"
    [[ -z $dry ]] || SLURM_JOB_ID=JOB start "$@" # what the job will do; the last command after a preemption alone
else
    start "$@"
fi
