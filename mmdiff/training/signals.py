"""Signals: a run that is asked to stop saves itself first, in all of its processes after the same step."""

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


class Signals:
    """A context in which SIGTERM and the first Ctrl-C are noted, not obeyed.

    Attributes:
      signal: the signal that came; None until then.
    """

    def __init__(self):
        self.signal: int | None = None
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal, self._came = number, time.perf_counter()
        self.__exit__()  # the next one is obeyed

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
