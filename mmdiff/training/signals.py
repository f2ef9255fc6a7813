"""Signals: a run that is asked to stop saves a checkpoint first, in all of its processes after the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What asks a process to stop: a scheduler or a person; a closed terminal; what Slurm and its like can send before a time limit.
SAVING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name))
REPEATED = 1.0


class Signals:
    """A context that records the first signal to stop (one of SAVING) instead of ending. A signal that is ignored, as by nohup, stays so.

    Closing a terminal or ending a group of processes may deliver one signal twice: within REPEATED seconds it counts once, but for Ctrl-C.

    Attributes:
      signal: the signal that came; None until then.
    """

    def __init__(self):
        self.signal: int | None = None
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            wanted = [number for number in SAVING if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) or signal.SIG_DFL for number in wanted}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        now = time.perf_counter()
        if self.signal is None:
            self.signal, self._came = number, now
        elif number != self.signal or number == signal.SIGINT or now - self._came > REPEATED:
            self.__exit__()
            signal.raise_signal(number)  # as it was before: it ends the process

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal else "another process was stopped"

    def after(self) -> str:
        """How long ago that was, which a scheduler's grace period must allow for."""
        return f" {time.perf_counter() - self._came:.1f} s after it came" if self.signal else ""

    @property
    def status(self) -> int:
        return 128 + (self.signal or signal.SIGTERM)


def make_any_process_signalled(mesh: Mesh) -> Callable[[int | None], Any]:
    """`signal -> whether any process has one`: on the device, so that it is read with the step that it belongs to."""
    if jax.process_count() == 1:
        return lambda signal: signal is not None
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def any_process_signalled(signal):
        mine = np.full(jax.local_device_count(), signal is not None, np.int32)
        return largest(jax.make_array_from_process_local_data(spread, mine))

    return any_process_signalled
