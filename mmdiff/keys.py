"""From a seed to a random key: all 64 bits count. jax is imported only where it is needed: the command line checks seeds before."""

from __future__ import annotations

import operator
import zlib
from typing import Any

from mmdiff.errors import UserError


def key_of(seed: int, name: str = "config.seed") -> Any:
    """The typed key of a seed in 0..2**64-1; no two seeds have the same one.

    `jax.random.key` keeps the lower 32 bits alone unless jax counts in 64 bits: its key data are (upper, lower) half, as here.

    Raises:
      UserError: it is no integer, negative, or has more than 64 bits; `name` is what it is called there.

    >>> import jax
    >>> bool((jax.random.key_data(key_of(0)) == jax.random.key_data(jax.random.key(0))).all())
    True
    """
    import jax
    import numpy as np

    check_seed(seed, name)
    upper, lower = divmod(int(seed), 2**32)
    key = jax.random.key(np.uint32(lower))
    if not upper:
        return key
    words = np.tile(np.array([upper, lower], np.uint32), jax.random.key_data(key).size // 2)  # of some generators two such pairs
    return jax.random.wrap_key_data(words)


def key_of_use(seed: int, use: str) -> Any:
    """The random key of "sample", "eval", "grid" or "metrics"; neither training nor another use has it."""
    import jax
    import numpy as np

    return jax.random.fold_in(key_of(seed, "the seed"), np.uint32(zlib.crc32(use.encode())))


def check_seed(seed: int, name: str = "config.seed") -> None:
    """Raises UserError unless `key_of` takes the seed."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**64 or isinstance(seed, bool):
        raise UserError(f"{name} must be an integer from 0 to 2**64 - 1, not {seed!r}.")
