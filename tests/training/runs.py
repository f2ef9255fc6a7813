"""Training runs in processes of their own, cheaply: one server has jax imported and forks a child for every run.

A job is a dict: workdir, overrides {"train.steps": 8}, devices (simulated), and, optionally,
  process [index, count, port]   joins others;
  constants {"JOIN_SECONDS": 2}  sets those of mmdiff.training.distributed;
  kill [signal, when, seconds]   sends the signal `seconds` after the run has written of the step `when` in metrics.jsonl, or has
                                 begun to write a checkpoint ("save"), or has started ("start"), or when a file is there (its path);
                                 what SIGSTOP stops is killed later;
  file_limit                     no file may grow beyond that many bytes;
  takes                          where to write which examples were read, a JSON list per read;
  after                          waits until the run has written of that step in metrics.jsonl;
  bad_read                       which read fails;
  waits [read, file]             that read waits, ten minutes at most, until the file is there;
  leaves                         where to write every leaf of the final state (.npz);
  argv, env                      runs the command line instead, with these environment variables.
Its answer: status (exit status, negative for a signal), error (the UserError's message, or a traceback), seconds (from the last
signal that was sent, or from the start, to the end).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent


class Server:
    """The client's side; a context manager."""

    def __enter__(self):
        import xla_flags  # of the tests' folder, which is not on the path of the program below

        path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
        flags = [*xla_flags.IN_TURN, *xla_flags.CHEAP, *xla_flags.CHEAPEST]  # a job says how many devices it has
        env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=600)

    def run(self, *jobs):
        """Runs jobs side by side; returns their answers."""
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve():
    import ml_collections  # noqa: F401
    import toy  # noqa: F401

    import mmdiff.processes  # noqa: F401  (what a child would otherwise spend seconds on)
    import mmdiff.training.loop  # noqa: F401

    for line in sys.stdin:
        jobs = json.loads(line)
        before = [_marks(job) for job in jobs]
        children = [_fork(job) for job in jobs]
        began = time.perf_counter()
        answers = []
        for job, child, old in zip(jobs, children, before):
            if "kill" in job:
                number, when, seconds = job["kill"]
                while not _due(job, when, old) and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    time.sleep(0.01)
                time.sleep(seconds)
                os.kill(child, number)
                began = time.perf_counter()
        for job, child in zip(jobs, children):
            if "kill" in job and job["kill"][0] == signal.SIGSTOP:
                os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            error = _error(job)
            answers.append(
                {
                    "status": status,
                    "error": error.read_text() if error.exists() else "",
                    "seconds": time.perf_counter() - began,
                }
            )
        print(json.dumps(answers), flush=True)


def _fork(job):
    pathlib.Path(job["workdir"]).mkdir(parents=True, exist_ok=True)
    _error(job).unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = _train(job)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        _error(job).write_text(traceback.format_exc())
    finally:
        sys.modules["jax"].distributed.shutdown()  # as at the exit of an ordinary process: it waits for the others
        sys.stderr.flush()
        os._exit(status)


def _train(job):
    import jax
    import numpy as np
    import toy

    from mmdiff.__main__ import main
    from mmdiff.errors import UserError
    from mmdiff.training import distributed, loop

    os.dup2(os.open(str(_error(job)) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    jax.config.update("jax_num_cpu_devices", job.get("devices", 1))
    for name, value in job.get("constants", {}).items():
        setattr(distributed, name, value)
    if "argv" in job:
        os.environ.update(job.get("env", {}))
        return main(job["argv"])
    if "process" in job:
        index, count, port = job["process"]
        distributed.start(coordinator=f"127.0.0.1:{port}", processes=count, process=index)
    config = toy.get_config()
    config.update_from_flattened_dict(job.get("overrides", {}))
    while _step(job) < job.get("after", 0):
        time.sleep(0.01)
    if "file_limit" in job:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], resource.RLIM_INFINITY))
    experiment = toy.build(config)
    experiment = dataclasses.replace(experiment, train_data=functools.partial(_watched, experiment.train_data(), job))
    try:
        state = loop.train(experiment, config, job["workdir"], job.get("profile"))
    except UserError as error:
        _error(job).write_text(str(error))
        return 2
    if "leaves" in job:
        state = state.replace(key=jax.random.key_data(state.key))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        np.savez(job["leaves"], **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
    return 0


def _watched(source, job):
    """The source, which writes down what is read of it, and fails when it is told to."""
    take, reads = source.take, itertools.count()

    def watched(indices):
        read, (waiting, file) = next(reads), job.get("waits", (None, None))
        if read == job.get("bad_read"):
            raise OSError("the disk is gone")
        end = time.monotonic() + 600
        while read == waiting and not os.path.exists(file) and time.monotonic() < end:
            time.sleep(0.01)
        if "takes" in job:
            with open(job["takes"], "a") as file:
                file.write(json.dumps([int(index) for index in indices]) + "\n")
        return take(indices)

    object.__setattr__(source, "take", watched)
    return source


def _error(job):
    return pathlib.Path(job["workdir"] + f".error{job.get('process', [job.get('name', 0)])[0]}")


def _due(job, when, before):
    if os.sep in str(when):
        return os.path.exists(when)
    drafts, inode = _marks(job)
    if when == "save":
        return drafts - before[0]
    return when == "start" or inode != before[1] and _step(job) >= when


def _marks(job):
    """-> (the checkpoints that are being written or were when a run was killed, the inode of metrics.jsonl, which each run renews)."""
    drafts = {path.name for path in pathlib.Path(job["workdir"], "checkpoints").glob("*tmp*")}
    metrics = pathlib.Path(job["workdir"], "metrics.jsonl")
    return drafts, metrics.stat().st_ino if metrics.exists() else None


def _step(job):
    path = pathlib.Path(job["workdir"]) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:
        return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    serve()
