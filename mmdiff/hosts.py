"""Work that the processes of a run share: which part is whose, and how what each has found comes together.

All processes call these functions together and in the same order. Alone, a process has all of the work, and nothing is sent.
"""

from __future__ import annotations

import io

import jax
import numpy as np

PIECE = 2**26  # bytes of each process that are sent at once


def is_first() -> bool:
    """Whether this process is the one that speaks for all."""
    return jax.process_index() == 0


def part(count: int) -> range:
    """This process's share of `count` things: consecutive ones, as many as the others have or one more or less."""
    process, processes = jax.process_index(), jax.process_count()
    return range(count * process // processes, count * (process + 1) // processes)


def gather(array: np.ndarray) -> list[np.ndarray]:
    """The arrays of all processes, of any shapes, by rank: their bytes, since JAX would make float32 of float64.

    >>> gather(np.array([1.0]))
    [array([1.])]
    """
    array = np.asarray(array)
    if jax.process_count() == 1:
        return [array]
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    found = (np.load(io.BytesIO(content), allow_pickle=False) for content in gather_bytes(buffer.getvalue()))
    return [other if other.dtype == array.dtype else other.view(array.dtype) for other in found]  # NumPy's files have no bfloat16


def joined(array: np.ndarray) -> np.ndarray:
    """The rows of all processes: those of process 0, of process 1, ... A process without rows gives an array of its kind, [0, ...].

    >>> joined(np.arange(3))
    array([0, 1, 2])
    """
    found = [other for other in gather(array) if len(other)]
    return found[0] if len(found) == 1 else np.concatenate(found) if found else array


def gather_bytes(content: bytes) -> list[bytes]:
    """What each process has, by rank."""
    from jax.experimental import multihost_utils

    lengths = multihost_utils.process_allgather(np.array(divmod(len(content), 2**31), np.uint32)).reshape(-1, 2).astype(np.int64)
    lengths = lengths[:, 0] * 2**31 + lengths[:, 1]
    most = int(lengths.max())
    size = min(PIECE, 1 << max(12, (most - 1).bit_length()))  # few sizes, each of which is a program
    parts: list[list[np.ndarray]] = [[] for _ in lengths]
    for start in range(0, most, size):
        piece = np.zeros(size, np.uint8)
        mine = content[start : start + size]
        piece[: len(mine)] = np.frombuffer(mine, np.uint8)
        sent = multihost_utils.process_allgather(piece.view(np.uint32)).reshape(len(lengths), -1)
        for rank, row in enumerate(sent):
            parts[rank].append(np.ascontiguousarray(row).view(np.uint8)[: max(0, lengths[rank] - start)])
    return [b"".join(part.tobytes() for part in each) for each in parts]
