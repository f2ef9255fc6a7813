"""The step: against the same arithmetic written out, and its invariances."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from mmdiff.errors import UserError
from mmdiff.training.step import init_state, make_step


def batch(step, size=16):
    index = np.arange(step * size, (step + 1) * size, dtype=np.uint32)
    return {"x": np.random.default_rng(step).normal(size=(size, 4)).astype(np.float32), "index": index}


def run(steps=3, **options):
    optimizer = toy.optimizer()
    step = jax.jit(make_step(toy.loss, optimizer, **options))
    state, seen = init_state(toy.init, optimizer, jax.random.key(0)), []
    for i in range(steps):
        state, metrics = step(state, batch(i))
        seen.append(metrics)
    return state, seen


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_it_is_the_textbook_update():
    optimizer, learning_rate, decay = optax.sgd(0.1), 0.1, 0.15
    state = init_state(toy.init, optimizer, jax.random.key(0))
    step = jax.jit(make_step(toy.loss, optimizer, ema=decay))
    differentiate = jax.jit(jax.value_and_grad(toy.loss, has_aux=True))
    params = ema = state.params
    for i in range(3):
        key = jax.random.fold_in(state.key, i)
        (value, extra), grads = differentiate(params, batch(i), key)
        params = jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)
        d = min(decay, (1 + i) / (10 + i))
        ema = jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
        state, metrics = step(state, batch(i))
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
        np.testing.assert_allclose(metrics["error"], extra["error"], rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, state.params, params)
    jax.tree.map(close, state.ema, ema)
    assert int(state.step) == 3 and set(metrics) == {"loss", "loss/x", "error", "grad_norm", "param_norm", "skipped"}


@pytest.mark.parametrize("microbatches", [2, 16])
def test_microbatches_change_nothing_but_rounding(microbatches):
    (one, metrics), (many, other) = run(), run(microbatches=microbatches)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (one.params, one.ema), (many.params, many.ema))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), metrics, other)


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(UserError, match="16 cannot be split into 3"):
        run(microbatches=3)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_batch_is_void_and_counted(bad, microbatches):
    optimizer = toy.optimizer()
    step = jax.jit(make_step(toy.loss, optimizer, microbatches=microbatches))
    before, _ = step(init_state(toy.init, optimizer, jax.random.key(0)), batch(0))
    poisoned = batch(1)
    poisoned["x"][3, 2] = bad
    after, metrics = step(before, poisoned)
    assert_same_bits((before.params, before.opt, before.ema), (after.params, after.opt, after.ema))
    assert int(after.stats["skipped"]) == 1 and metrics["skipped"] == 1 and not np.isfinite(metrics["loss"])
    assert int(after.step) == 2  # the data moves on
    again, metrics = step(after, batch(2))
    assert int(again.stats["skipped"]) == 1 and metrics["skipped"] == 0 and np.isfinite(metrics["loss"])


def test_a_non_finite_gradient_of_a_finite_loss_is_void():
    optimizer = optax.sgd(0.1)

    def loss(params, batch, key):
        return jnp.sqrt(params * batch["x"].mean()), {}  # at 0: value 0, slope infinite

    state = init_state(lambda key: jnp.ones(()), optimizer, jax.random.key(0))
    after, metrics = make_step(loss, optimizer)(state, {"x": jnp.zeros(4)})
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    assert_same_bits(state.params, after.params)


def test_sums_are_float32_under_bfloat16():
    def loss(params, batch, key):
        error = (batch["x"].astype(jnp.bfloat16) - params.astype(jnp.bfloat16)) ** 2
        return error.mean(), {"half": error.max()}

    optimizer = optax.sgd(1.0)
    state = init_state(lambda key: jnp.ones((), jnp.bfloat16), optimizer, jax.random.key(0))
    after, metrics = make_step(loss, optimizer, microbatches=2)(state, {"x": jnp.zeros(4)})
    assert {x.dtype for x in metrics.values()} == {jnp.dtype("float32")}
    assert after.ema.dtype == jnp.float32 and after.params.dtype == jnp.bfloat16


def test_the_core_of_training_loads_no_heavy_library():
    code = (
        "import sys, mmdiff.training.step, mmdiff.training.sharding\n"
        "print([m for m in ('tensorflow', 'orbax', 'clu', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
