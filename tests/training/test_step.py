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
from mmdiff.microbatches import BatchLoss, Pieces
from mmdiff.training.step import init_state, make_step, noise_scale_of, step_of


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


def assert_close(one, other):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), one, other)


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


def spoils(where):
    """An optimizer of finite gradients whose second answer is not finite, in the update or in a number of its own."""

    def init(params):
        return {"count": jnp.zeros((), jnp.int32), "moment": params, "number": jnp.zeros(()), "best": jnp.full((), jnp.inf)}

    def update(grads, state, params=None):
        bad = jnp.where(state["count"] == 1, jnp.inf, 0.0)
        new = {"count": state["count"] + 1, "moment": jax.tree.map(jnp.add, grads, state["moment"]), "number": state["number"] + 1}
        updates = jax.tree.map(lambda g: -0.1 * g, grads)
        spoil = functools.partial(jax.tree.map, lambda x: x.at[(0,) * x.ndim].add(bad))
        if where == "update":
            updates = spoil(updates)
        else:
            new[where] = spoil(new[where])
        return updates, new | {"best": state["best"]}  # infinite on purpose, as that of a plateau before its first loss

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("where", ["update", "number"])
def test_a_non_finite_update_of_a_finite_gradient_is_never_kept(where):
    optimizer = spoils(where)
    step = jax.jit(make_step(toy.loss, optimizer))
    before, metrics = step(init_state(toy.init, optimizer, jax.random.key(0)), batch(0))
    assert metrics["skipped"] == 0
    after, metrics = step(before, batch(1))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1
    assert_same_bits((before.params, before.opt, before.ema), (after.params, after.opt, after.ema))
    assert int(after.step) == 2 and int(after.stats["skipped"]) == 1


def test_a_state_of_the_loss_that_is_not_finite_is_never_kept():
    def pieces(params, batch, key, **_):
        return Pieces((params - batch["x"].mean()) ** 2, {}, seen={"x": batch["x"][:3]})

    loss = BatchLoss(pieces=pieces, init=lambda params: jnp.zeros(3), update=lambda state, seen: state + seen["x"])
    optimizer = optax.sgd(0.1)
    state = init_state(lambda key: jnp.ones(()), optimizer, jax.random.key(0), loss)
    step = jax.jit(make_step(loss, optimizer))
    with pytest.raises(UserError, match="give it to init_state, too"):
        step(state.replace(stats={"skipped": state.stats["skipped"]}), {"x": jnp.arange(4.0)})
    state, metrics = step(state, {"x": jnp.arange(4.0)})
    assert metrics["skipped"] == 0 and state.stats["loss"].tolist() == [0, 1, 2]
    state = state.replace(stats=state.stats | {"loss": jnp.full(3, 3e38)})
    after, metrics = step(state, {"x": jnp.full(4, 3e37)})
    assert metrics["skipped"] == 1 and (after.params, after.stats["loss"][0]) == (state.params, np.float32(3e38))


def test_sums_are_float32_under_bfloat16():
    def loss(params, batch, key):
        error = (batch["x"].astype(jnp.bfloat16) - params.astype(jnp.bfloat16)) ** 2
        return error.mean(), {"half": error.max()}

    optimizer = optax.sgd(1.0)
    state = init_state(lambda key: jnp.ones(()), optimizer, jax.random.key(0))
    after, metrics = make_step(loss, optimizer, microbatches=2)(state, {"x": jnp.zeros(4)})
    assert {x.dtype for x in metrics.values()} == {jnp.dtype("float32")}
    assert {x.dtype for x in (after.ema, after.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_of_less_than_float32_are_refused(dtype):
    with pytest.raises(UserError, match=f"the parameter dense/kernel is {dtype}, .* float32: .*give {dtype} to the network's dtype"):
        init_state(lambda key: {"dense": {"kernel": jnp.ones((2, 2), dtype)}}, optax.adam(1e-3), jax.random.key(0))


def quadratic(params, batch, key):
    """One example's gradient is `params - x`: the mean of x sets the true gradient, its covariance the noise."""
    return 0.5 * ((params - batch["x"]) ** 2).sum(-1).mean(), {}


def test_the_noise_scale_of_a_quadratic():
    """Data N(0, diag(1, 4, 9, 16)) seen from p: G = p and tr(Sigma) = 30, whatever the batch."""
    optimizer, point, spread = optax.sgd(0.0), jnp.array([1.0, -2.0, 0.0, 1.0]), jnp.array([1.0, 2.0, 3.0, 4.0])
    state = init_state(lambda key: point, optimizer, jax.random.key(0))
    for size, parts in ((8, 2), (32, 4)):
        step = make_step(quadratic, optimizer, microbatches=parts, noise_scale=True)

        def moments(seed):
            x = spread * jax.random.normal(jax.random.key(seed), (size, 4))
            metrics = step(state, {"x": x})[1]
            return metrics["noise_scale/trace"], metrics["noise_scale/grad_sq"]

        trace, grad_sq = (np.asarray(values, np.float64) for values in jax.jit(jax.vmap(moments))(jnp.arange(20_000)))
        for values, truth in ((trace, 30.0), (grad_sq, 6.0)):
            assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values)), (size, parts, truth)
        means = {"noise_scale/trace": trace.mean(), "noise_scale/grad_sq": grad_sq.mean()}
        assert noise_scale_of(means) == pytest.approx(5.0, rel=0.1)


def test_the_noise_scale_needs_micro_batches_and_a_gradient():
    with pytest.raises(UserError, match="config.train.microbatches to 2 or more"):
        make_step(quadratic, optax.sgd(0.1), noise_scale=True)
    assert np.isnan(noise_scale_of({"noise_scale/trace": 3.0, "noise_scale/grad_sq": -0.1}))
    (_, plain), (_, more) = run(microbatches=4), run(microbatches=4, noise_scale=True)
    assert set(more[0]) - set(plain[0]) == {"noise_scale/trace", "noise_scale/grad_sq"}
    for one, other in zip(plain, more):
        assert_close(one, {name: other[name] for name in one})


def test_norms_by_group_add_up():
    groups = [("first", "first/"), ("kernels", "kernel$"), ("none", "bias")]
    (_, plain), (_, seen) = run(), run(norm_groups=groups)
    for one, other in zip(plain, seen):
        assert_close(one, {name: other[name] for name in one})
        for kind in ("grad_norm", "param_norm"):
            parts = {name.split("/")[1]: float(value) for name, value in other.items() if name.startswith(f"{kind}/")}
            assert set(parts) == {"first", "kernels", "none"} and parts["none"] == 0  # each parameter is in its first group
            np.testing.assert_allclose(sum(value**2 for value in parts.values()), other[kind] ** 2, rtol=1e-5)
            assert parts["first"] > 0 and parts["kernels"] > 0
    _, (metrics, *_) = run(norm_groups=[("first", "first/")])
    params = init_state(toy.init, toy.optimizer(), jax.random.key(0)).params["params"]
    np.testing.assert_allclose(metrics["param_norm/other"], np.linalg.norm(params["second"]["kernel"]), rtol=1e-6)


def test_the_step_that_a_config_asks_for():
    import types

    options = {"ema": 0.9, "microbatches": 2, "steps": 7}
    optimizer = toy.optimizer()
    experiment = types.SimpleNamespace(loss=toy.loss, optimizer=optimizer)
    state = init_state(toy.init, optimizer, jax.random.key(0))
    plain, asked = make_step(toy.loss, optimizer, ema=0.9, microbatches=2), step_of(experiment, options)
    (one, metrics), (other, same) = jax.jit(plain)(state, batch(0)), jax.jit(asked)(state, batch(0))
    assert_close((one.params, one.ema, dict(metrics)), (other.params, other.ema, dict(same)))
    more = step_of(experiment, options | {"noise_scale": True, "norm_groups": (("first", "first"),)})
    assert {"noise_scale/trace", "param_norm/first", "grad_norm/other"} <= set(jax.eval_shape(more, state, batch(0))[1])


@pytest.mark.slow
def test_the_core_of_training_loads_no_heavy_library():
    code = (
        "import sys, mmdiff.training.step, mmdiff.training.sharding\n"
        "print([m for m in ('tensorflow', 'orbax', 'clu', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_group_that_is_no_regular_expression_is_refused():
    with pytest.raises(UserError, match=r"norm_groups: '\(', the group 'a'"):
        make_step(lambda *_: None, optax.sgd(0.1), norm_groups=(("a", "("),))
