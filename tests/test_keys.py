"""Seeds: each of 64 bits is a run of its own."""

import jax
import numpy as np
import pytest

from mmdiff.errors import UserError
from mmdiff.keys import key_of

SEEDS = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 7 * 2**32, 2**63, 2**63 + 1, 2**64 - 1]


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_no_two_seeds_have_one_key(generator):
    with jax.default_prng_impl(generator):
        assert len({data(key_of(seed)) for seed in SEEDS}) == len(SEEDS)
        for seed in SEEDS[:5]:  # those that jax keeps apart have its key: runs of before continue
            assert data(key_of(seed)) == data(jax.random.key(seed))
        samples = [float(jax.random.normal(key_of(seed))) for seed in (0, 2**32, 2**40)]
        assert len(set(samples)) == 3


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None, True, float("nan")])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(UserError, match=r"^--seed must be an integer from 0 to 2\*\*64 - 1, not "):
        key_of(seed, "--seed")
