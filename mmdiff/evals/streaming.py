"""A function of single examples over as many as there are, block by block on all devices of a process, with bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def count_of(count: int, size: int) -> int:
    """How many blocks of `size` hold `count` examples."""
    return -(-count // size)


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays one after another; a single one as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def stream(
    function: Callable, params: Any, key: jax.Array, given: Any, count: int, size: int, *, blocks: Sequence[int] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[tuple[int, Any]]:
    """`function(params, keys, given)` over `count` examples -> (k, its results as NumPy arrays [n, ...]) of every block k, in turn.

    Block k holds the examples k size .. (k + 1) size - 1. Each is computed by one device, all by the same program, the last one with its
    last example repeated: so the bits of a result depend on `size` at most, not on how many devices or processes share the work.

    >>> double = lambda params, keys, given: 2 * given
    >>> [(k, found.tolist()) for k, found in stream(double, None, jax.random.key(0), np.arange(5), 5, 2, blocks=[0, 2])]
    [(0, [0, 2]), (2, [8])]

    Args:
      function: maps keys [size] and a pytree of arrays [size, ...] to such a pytree, every example on its own.
      key: example i's key is `fold_in(key, i)`.
      given: pytree of what rows can be taken of, `array[rows]`.
      blocks: which; all by default.
      devices: by default all of this process; each computes one block of a call.
    """
    blocks = range(count_of(count, size)) if blocks is None else blocks
    if not len(blocks):
        return
    devices = (jax.local_devices() if devices is None else list(devices))[: len(blocks)]
    fold = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
    if len(devices) == 1:
        run, place = jax.jit(function), lambda tree: tree
    else:
        mesh, split = Mesh(np.array(devices), ("block",)), PartitionSpec("block")
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        specs = {"in_specs": (PartitionSpec(), split, split), "out_specs": split}
        run = jax.jit(jax.shard_map(function, mesh=mesh, check_vma=False, **specs))
        place = lambda tree: jax.device_put(tree, NamedSharding(mesh, split))  # noqa: E731
    waiting = None  # the devices compute the next call while what the last one has found is used
    for start in range(0, len(blocks), len(devices)):
        call = list(blocks[start : start + len(devices)])
        whole = np.array(call + call[-1:] * (len(devices) - len(call)))
        rows = np.minimum(whole[:, None] * size + np.arange(size), count - 1)
        taken = jax.tree.map(lambda array: joined([array[block] for block in rows]), given)  # noqa: B023 (used at once)
        found = run(params, place(fold(key, rows.reshape(-1).astype(np.uint32))), place(taken))
        if waiting:
            yield from _parts(*waiting, count, size)
        waiting = call, found
    yield from _parts(*waiting, count, size)


def _parts(call: Sequence[int], found: Any, count: int, size: int) -> Iterator[tuple[int, Any]]:
    found = jax.device_get(found)
    for place, block in enumerate(call):
        rows = slice(place * size, place * size + min(size, count - block * size))
        yield block, jax.tree.map(lambda array: array[rows], found)  # noqa: B023 (used at once)
