"""The read-outs of images and texts in one space: against exact answers, with and without the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled

from mmdiff import nets, schedules
from mmdiff.evals import alignment
from mmdiff.evals.evaluator import costs, example_keys
from mmdiff.processes import Gaussian, x0

SHAPE, D, N = (4, 4, 1), 6, 5
QUERY = Gaussian(schedules.scaled(schedules.scaled_linear_beta(), 0.5), x0)


@functools.cache
def aligner(two_way=False):
    net = nets.DualStream(
        nets.Patches(*SHAPE, 2), nets.Tokens(3, 6, 6), D, depth=2, width=16, heads=2, shared=1, head_depth=1, two_way=two_way)
    x = {"image": jnp.zeros((1, *SHAPE)), "text": jnp.ones((1, 3), jnp.int32), "query": jnp.zeros((1, D))}
    params = filled(net, x, dict.fromkeys(x, jnp.ones(1)))
    return alignment.Aligner(net, QUERY, D, SHAPE), params


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_cache_changes_nothing(guidance):
    align, params = aligner()
    images = np.asarray(jax.random.normal(jax.random.key(1), (N, *SHAPE)))
    plain, cached = (
        align(params, jax.random.key(2), images, steps=3, seeds=2, guidance=guidance, cached=cached, batch=N) for cached in (False, True))
    np.testing.assert_allclose(plain, cached, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(plain, axis=-1), 1, atol=1e-5)
    assert np.abs(plain - align(params, jax.random.key(2), images[::-1], steps=3, seeds=2, guidance=guidance, batch=N)).max() > 1e-3


def test_absent_images_do_not_count():
    align, params = aligner()
    keys = example_keys(jax.random.key(3), N)
    bare = [jax.jit(align.function(2, cached=cached))(params, keys, {}) for cached in (False, True)]
    np.testing.assert_allclose(*bare, atol=2e-5)
    told = jax.jit(align.function(2))(params, keys, {"image": jnp.ones((N, *SHAPE))})
    assert np.abs(bare[0] - told).max() > 1e-3


def test_costs_are_seconds_per_image():
    ways = {name: (lambda p, k, g: g["x"] * p, {"x": jnp.ones((n, 2))}, n) for name, n in (("few", 2), ("many", 8))}
    found = costs(jnp.ones(()), jax.random.key(0), ways, repeats=2)
    assert set(found) == {"few", "many"} and all(value > 0 for value in found.values())
