"""The processes of one run: how they find each other, and how they stop when one of them is lost.

Every process runs the same command and sees the same workdir. Nothing here imports jax before it is needed, so that a mistake in a
flag answers at once.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from mmdiff import console, files
from mmdiff.errors import UserError
from mmdiff.remote import RemotePath
from mmdiff.training.peers import Peers

JOIN_SECONDS = 300  # how long a process waits for the others to start: those of a large job come minutes apart
HEARTBEAT_SECONDS = 60  # a process that has been silent for so long is gone: a live one is heard every few seconds, even while it computes
LEAVE_SECONDS = 30  # how long a process that failed waits for the others to fail as well

ENVIRONMENT = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}
MOST_PROCESSES = 1_000_000
RANKS = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
# What an error says that comes of a process that is gone: of Gloo (CPU), NCCL (GPU) and the coordination service.
LOST = re.compile(r"gloo|nccl|connection (reset|closed)|socket closed|heartbeat|barrier (failed|timed out)", re.IGNORECASE)


def address(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> dict[str, str | int]:
    """What flags, or else environment variables, say of the run: {"coordinator": "HOST:PORT", "processes": N, "process": I}.

    Environment variables (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID) may leave some to be detected, flags not.

    Raises:
      UserError: one flag without the others, no HOST:PORT, no number, or a process that is not in 0..N-1.
    """
    found = {name: value for name, value in zip(ENVIRONMENT, (coordinator, processes, process)) if value is not None}
    names = {name: f"--{name}" for name in ENVIRONMENT}
    if found and len(found) < len(names):
        missing = " and ".join(names[name] for name in names if name not in found)
        raise UserError(f"--coordinator, --processes and --process go together: {missing} is missing.")
    if not found:
        names = ENVIRONMENT
        found = {name: os.environ[key] for name, key in names.items() if os.environ.get(key)}
    for name, least in (("processes", 1), ("process", 0)):
        text = str(found.get(name, least))
        if not text.isdecimal() or len(text) > 20 or int(text) < least:
            raise UserError(f"{names[name]} must be an integer of {least} or more, not {text!r}.")
        if name in found:
            found[name] = int(text)
    if found.get("processes", 1) > MOST_PROCESSES:
        raise UserError(f"{names['processes']} must be at most {MOST_PROCESSES:,}, not {found['processes']}.")
    port = re.fullmatch(r"[^\s:/]+:(\d{1,5})|\[[^\s/]+\]:(\d{1,5})", found.get("coordinator", "localhost:1"))
    if not port or not 1 <= int(port[1] or port[2]) <= 65535:
        allowed = "the HOST:PORT of process 0, with a port of 1 to 65535"
        raise UserError(f"{names['coordinator']} must be {allowed}, not {found['coordinator']!r}.")
    if found.get("process", 0) >= found.get("processes", math.inf):
        last = found["processes"] - 1
        raise UserError(f"{names['process']} is {found['process']}, but {names['processes']} is {last + 1}: it must be 0 to {last}.")
    return found


def start(**where: str | int) -> None:
    """Joins the other processes of the run. Call it before the first computation.

    Args:
      **where: the answer of `address`. What it leaves out is detected: from the metadata of a TPU slice, Slurm, Open MPI or an
        indexed Job of Kubernetes. (Under Slurm and Open MPI JAX gives every process one GPU: start as many as there are.)

    A run whose processes do not find each other within JOIN_SECONDS ends with a sentence and status 1: started again, they may. So does
    a process when another is gone, at once if it was killed and after HEARTBEAT_SECONDS if it is silent (see `peers`). Where JAX detects
    the address of process 0 (everywhere but under Slurm), it ends the process itself: with SIGABRT, status 134.

    Raises:
      UserError: nothing is detected, or the port of process 0 is in use.
    """
    import jax

    where = _slurm() | where

    def give_up():
        whom = f"all {where['processes']} of them" if "processes" in where else "all of them"
        at = f" at {where['coordinator']}" if "coordinator" in where else ""
        _say(f"the processes of this run did not find each other within {JOIN_SECONDS} s: start {whom}, and let each reach process 0{at}.")
        os._exit(1)

    # JAX aborts without a sentence when its own time is over, so it gets more.
    timer = threading.Timer(JOIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    reach = {"coordinator_address": where.get("coordinator"), "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    try:
        if {"coordinator", "process"} <= where.keys() and where.get("processes") != 1:
            reach = _relayed(where["coordinator"], where["process"])
        jax.distributed.initialize(
            num_processes=where.get("processes"),
            process_id=where.get("process"),
            initialization_timeout=JOIN_SECONDS + 60,
            **reach,
        )
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        remedy = "name them by --coordinator HOST:PORT --processes N --process I"
        raise UserError(f"cannot join the other processes ({str(error).rstrip('.')}): {remedy}.") from error
    finally:
        timer.cancel()
    # JAX has taken SIGTERM, to note it. Until the trainer asks for it there is nothing to save: it ends the process, as ever.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _slurm() -> dict[str, str | int]:
    """What Slurm says of the processes, by JAX's own rules: process 0 is on the first node of the step, its port of the job's number."""
    job, nodes, process = (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_NODELIST", "PROCID"))
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)  # of "node7,node9" or "gpu[003-004,7]"
    if not (job.isdecimal() and process.isdecimal() and first) or "OMPI_COMM_WORLD_RANK" in os.environ:  # mpirun within a job
        return {}
    return {"coordinator": f"{first[1]}{first[2] or ''}:{61440 + int(job) % 4096}", "process": int(process)}


def rank() -> tuple[str, int]:
    """-> (variable, I): the number of this process, as a variable of its launcher says; ("", 0) without one."""
    return next(((key, int(os.environ[key])) for key in RANKS if os.environ.get(key, "").isdecimal()), ("", 0))


def lost(error: BaseException | None) -> bool:
    """Whether an error comes of another process that is gone."""
    import jax

    return jax.distributed.is_initialized() and isinstance(error, (RuntimeError, ValueError)) and LOST.search(str(error)) is not None


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """A context (and decorator) for what all processes do together: if one fails, it ends, and so do the others.

    At the exit of a process JAX waits for all others, while these wait for its part of a sum: so a process that failed does not
    wait for long. That another one is gone is known by an error where the connections of its sums break (CPU), else by `peers`.
    """
    import jax

    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if lost(error):
            reason = " ".join(str(error).split())
            _end(f"another process of this run is gone ({reason})")
        _leave(in_peace=False)
        if jax.distributed.is_initialized():
            timer = threading.Timer(LEAVE_SECONDS, os._exit, [2 if isinstance(error, UserError) else 1])
            timer.daemon = True
            timer.start()
        raise
    except BaseException:  # SystemExit: it is saved, as all are
        _leave(in_peace=True)
        raise
    _leave(in_peace=True)


def joined(where: dict[str, str | int] | None) -> contextlib.AbstractContextManager[None]:
    """A context: the processes at this `address`, None for none, have found each other, and end together."""
    if where is None:
        return contextlib.nullcontext()
    start(**where)
    return exit_together()


def check_encodes_alone(workdir: str | None, several: bool) -> None:
    """Raises UserError where several processes are to encode by the network of the run in `workdir`, if there is one."""
    if workdir is not None and several:
        raise UserError("--distributed is for published encoders: a run's own network encodes in one process, leave it out.")


def check_one_writer(workdir: str | os.PathLike, several: bool) -> None:
    """Raises UserError where several processes are to train at an address."""
    if several and isinstance(files.target(workdir), RemotePath):
        raise UserError(f"one process trains at {workdir}: for several mount the bucket (gcsfuse, s3fs) and name the folder.")


def from_first(act: Callable[[], Any]) -> Any:
    """What `act` returns (JSON) in process 0, in every process, or the UserError that it raises there; the others do not act."""
    import jax

    from mmdiff import hosts

    if jax.process_count() == 1:
        return act()
    answer = ""
    if jax.process_index() == 0:
        try:
            answer = json.dumps({"value": act()})
        except UserError as error:
            answer = json.dumps({"error": str(error)})
    answer = json.loads(hosts.gather_bytes(answer.encode())[0])
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def first_of_all(text: str | None) -> str | None:
    """The first text that a process has, in every process; None if none has any."""
    import jax

    from mmdiff import hosts

    if jax.process_count() == 1:
        return text
    return next((found.decode() for found in hosts.gather_bytes((text or "").encode()) if found), None)


_peers: Peers | None = None
_ending = threading.Lock()


def _relayed(coordinator: str, process: int) -> dict[str, str | int]:
    """Ties this process to the others; -> arguments for `jax.distributed.initialize`. Raises UserError if the port is in use."""
    global _peers
    host, _, port = coordinator.rpartition(":")
    _peers = Peers(process, lambda other: _end(f"process {other} of this run is gone"), HEARTBEAT_SECONDS)
    atexit.register(_leave, in_peace=True)
    try:
        inner = _peers.connect(host.strip("[]"), int(port)) if process else _peers.serve(int(port))
    except OSError as error:
        raise UserError(f"process 0 cannot serve at {coordinator} ({os.strerror(error.errno)}): name a free port.") from error
    bind = {} if process else {"coordinator_bind_address": f"127.0.0.1:{inner}"}
    return {"coordinator_address": f"127.0.0.1:{inner}", "heartbeat_timeout_seconds": 2 * HEARTBEAT_SECONDS, **bind}


def _leave(in_peace: bool) -> None:
    if _peers:
        _peers.leave(in_peace)


def _end(reason: str) -> NoReturn:
    """Ends this process, whatever it waits for, with one sentence and a status after which a launcher starts it again."""
    with _ending:
        _say(f"{reason}: see its log; the same command continues from the last checkpoint.")
        os._exit(1)


def _say(text: str) -> None:
    console.say(f"mmdiff: error: {text}")
