"""Training runs in processes of their own, cheaply: one server has jax imported and forks a child for every run.

A job is a dict: workdir, overrides {"train.steps": 8}, devices (simulated), and, optionally,
  process [index, count, port]   joins others through jax.distributed;
  kill [signal, line, seconds]   sends the signal `seconds` after metrics.jsonl has reached that step;
  file_limit                     no file may grow beyond that many bytes;
  leaves                         where to write every leaf of the final state (.npz).
Its answer: status (exit status, negative for a signal), error (the UserError's message, or a traceback), seconds.
"""

from __future__ import annotations

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
        path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(self, *jobs):
        """Runs jobs side by side; returns their answers."""
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve():
    import ml_collections  # noqa: F401
    import toy  # noqa: F401

    import mmdiff.training.loop  # noqa: F401  (what a child would otherwise spend seconds on)

    for line in sys.stdin:
        jobs = json.loads(line)
        children = [_fork(job) for job in jobs]
        began = time.perf_counter()
        answers = []
        for job, child in zip(jobs, children):
            if "kill" in job:
                number, step, seconds = job["kill"]
                while _step(job) < step and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    time.sleep(0.01)
                time.sleep(seconds)
                os.kill(child, number)
        for job, child in zip(jobs, children):
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
        sys.stderr.flush()
        os._exit(status)


def _train(job):
    import jax
    import numpy as np
    import toy

    from mmdiff.errors import UserError
    from mmdiff.training import loop

    os.dup2(os.open(str(_error(job)) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    jax.config.update("jax_num_cpu_devices", job.get("devices", 1))
    if "process" in job:
        index, count, port = job["process"]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
    config = toy.get_config()
    config.update_from_flattened_dict(job.get("overrides", {}))
    if "file_limit" in job:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], resource.RLIM_INFINITY))
    try:
        state = loop.train(toy.build(config), config, job["workdir"])
    except UserError as error:
        _error(job).write_text(str(error))
        return 2
    if "leaves" in job:
        state = state.replace(key=jax.random.key_data(state.key))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        np.savez(job["leaves"], **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
    return 0


def _error(job):
    return pathlib.Path(job["workdir"] + f".error{job.get('process', [0])[0]}")


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
