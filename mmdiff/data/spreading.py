"""One program on several devices of a process, each of which computes batches of its own: what one computes has the bits of any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


class Spread:
    """`function(variables, *batch)`, compiled for each device as if it were alone (of a program for several, the last digits may differ).

    >>> double, devices = Spread(lambda scale, x: scale * x), jax.local_devices()[:1]
    >>> [found] = double(double.place(2.0, devices), [(jax.device_put(3.0, devices[0]),)])
    >>> float(found)
    6.0
    """

    def __init__(self, function: Callable[..., Any]):
        self._jitted, self._programs = jax.jit(function), {}

    @staticmethod
    def place(variables: Any, devices: Sequence[jax.Device]) -> list[Any]:
        """The variables on each device."""
        return [jax.device_put(variables, device) for device in devices]

    def __call__(self, placed: Sequence[Any], batches: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The results of batches, each with the variables beside it, on their device. Nothing is waited for but what is compiled."""
        keys = [
            (jax.tree.structure(both), tuple((leaf.sharding, leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(both)))
            for both in zip(placed, batches)]
        new = [place for place, key in enumerate(keys) if key not in self._programs]
        if new:
            lowered = [self._jitted.lower(placed[place], *batches[place]) for place in new]
            with ThreadPoolExecutor(len(new)) as threads:
                self._programs.update(zip((keys[place] for place in new), threads.map(lambda one: one.compile(), lowered)))
        return [self._programs[key](variables, *batch) for key, variables, batch in zip(keys, placed, batches)]
