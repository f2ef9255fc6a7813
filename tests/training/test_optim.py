"""Optimizers for large batches: rules for the rate, scanned layers as separate ones, and states that are sharded like the weights."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from mmdiff import nets
from mmdiff.errors import UserError
from mmdiff.training import optim, sharding
from mmdiff.training.step import init_state, make_step

RATE = 0.01
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(RATE, weight_decay=0.1),
    "lion": lambda: optax.lion(RATE, weight_decay=0.1),
    "muon": lambda: optax.contrib.muon(RATE, consistent_rms=0.2, muon_weight_dimension_numbers=optim.muon_dimensions),
    "lamb": lambda: optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(0.1), optim.trust_ratio(), optax.scale_by_learning_rate(RATE)),
}  # fmt: skip
DEPTH = 2


def rates(losses, **options):
    """The rates that `plateau` takes for these losses."""
    rule = optim.plateau(**{"rate": 1.0, "warmup_steps": 4, "patience": 3, "start": 0.2, "floor": 1e-6} | options)
    update, state, found = jax.jit(lambda state, value: rule.update(jnp.ones(()), state, value=value)), rule.init(None), []
    for value in losses:
        step, state = update(state, value)
        found.append(-float(step))
    return found


def test_plateau_warms_up_and_halves():
    """Four rising rates; then the best loss is that of update 4, and after patience 3 without a tenth less, the fourth such halves."""
    flat = [9.0] * 4 + [5.0] + [4.9, 4.6, 4.9, 4.9] + [4.4] + [4.4] * 4 + [4.4]
    halved = [1.0] * 5 + [0.5] * 5 + [0.25]  # 4.4 < 0.9 * 5 is better: the wait begins anew
    np.testing.assert_allclose(rates(flat), [0.2, 0.4, 0.6, 0.8, *halved], rtol=1e-6)
    np.testing.assert_allclose(rates([1.0] * 40, floor=0.3)[-1], 0.3, rtol=1e-6)


def test_plateau_of_losses_below_zero():
    """Worse is worse there, too: -0.95 is no improvement on -1, -1.2 is."""
    worse = rates([0.0] * 4 + [-1.0] + [-0.95] * 9)
    assert worse[-1] < 0.5 + 1e-6
    better = rates([0.0] * 4 + [-1.0, -0.95, -0.95, -0.95, -1.2, -1.2, -1.2, -1.2])
    assert better[-1] == 1.0


def test_the_step_gives_the_optimizer_its_loss():
    def loss(params, batch, key):
        return params["w"] ** 2, {}

    chain = optax.chain(optax.clip_by_global_norm(0.5), optim.plateau(0.1, 0, 100))
    step = jax.jit(make_step(loss, chain))
    state = init_state(lambda key: {"w": jnp.asarray(3.0)}, chain, jax.random.key(0))
    state, _ = step(state, {"index": jnp.arange(2, dtype=jnp.uint32)})
    assert float(state.opt[1].best) == 9.0 and float(state.params["w"]) == pytest.approx(3 - 0.1 * 0.5)


@pytest.mark.parametrize("rule, expected", [("none", 1e-4), ("linear", 16e-4), ("sqrt", 4e-4)])
def test_rules_for_the_rate(rule, expected):
    assert optim.scaled(1e-4, 4096, 256, rule) == pytest.approx(expected)
    assert optim.scaled(1e-4, 256, 256, rule) == 1e-4


def test_bad_rules_and_batches():
    with pytest.raises(UserError, match="scale_rule is 'cubic': choose one of none, linear, sqrt"):
        optim.scaled(1e-4, 256, 256, "cubic")
    with pytest.raises(UserError, match="both must be positive"):
        optim.scaled(1e-4, 256, 0, "sqrt")


def test_warmup():
    np.testing.assert_allclose([optim.warmup(2.0, 4)(step) for step in (0, 1, 3, 4, 100)], [0.5, 1.0, 2.0, 2.0, 2.0])
    assert optim.warmup(2.0, 0)(0) == 2.0


def network(scan=True):
    return nets.DiT(nets.Patches(4, 4, 2, 2), classes=3, depth=DEPTH, width=64, heads=4, scan=scan)


def shapes(scan=True):
    return jax.eval_shape(network(scan).init, jax.random.key(0), jnp.zeros((1, 4, 4, 2)), jnp.ones(1), jnp.zeros(1, jnp.int32))


def normal(seed, scale=1.0):
    """Random arrays like the parameters. As parameters they have gradients; adaLN-Zero starts as the identity."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.standard_normal(x.shape)).astype(np.float32), shapes())


def init(key):
    return normal(0, 0.1)


def unscanned(params):
    """The same weights as of a network with scan=False."""
    params = dict(params["params"])
    blocks = params.pop("blocks")
    return {"params": params | {f"block_{i}": jax.tree.map(lambda x: x[i], blocks) for i in range(DEPTH)}}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scanned_layers_are_updated_as_separate_ones(name):
    optimizer, params = OPTIMIZERS[name](), init(jax.random.key(0))
    apart = unscanned(params)
    assert jax.tree.structure(apart) == jax.tree.structure(shapes(scan=False))
    states = optimizer.init(params), optimizer.init(apart)
    update = jax.jit(optimizer.update)
    for seed in (1, 2):
        grads = normal(seed)
        one, first = update(grads, states[0], params)
        other, second = update(unscanned(grads), states[1], apart)
        states = first, second
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
        jax.tree.map(close, unscanned(one), other)
        assert all(x.any() for x in jax.tree.leaves(one))
        params, apart = optax.apply_updates(params, one), optax.apply_updates(apart, other)


def test_muon_takes_the_matrices_of_the_layers():
    params = init(jax.random.key(0))
    chosen = {
        jax.tree_util.keystr(path, simple=True, separator="/"): dims
        for path, dims in jax.tree_util.tree_leaves_with_path(
            optim.muon_dimensions(params), is_leaf=lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers))
    }
    kernels = ("adaln", "attention/out", "attention/qkv", "mlp/in", "mlp/out")
    assert chosen == {f"params/blocks/{kernel}/kernel": optax.contrib.MuonDimensionNumbers(1, 2) for kernel in kernels}
    joint = {"params": {"blocks": {"image_qkv": {"kernel": jnp.zeros((2, 4, 12))}}, "label_out": {"kernel": jnp.zeros((4, 3))}}}
    assert len(jax.tree.leaves(optim.muon_dimensions(joint), is_leaf=lambda x: hasattr(x, "output_axis"))) == 1
    optimizer = OPTIMIZERS["muon"]()
    updates, _ = jax.jit(optimizer.update)(normal(1), optimizer.init(params), params)
    for matrix in updates["params"]["blocks"]["mlp"]["in"]["kernel"]:  # every layer's own update is nearly orthonormal
        values = np.linalg.svd(matrix / np.linalg.norm(matrix, 2), compute_uv=False)
        assert values.min() > 0.3


def test_lamb_s_ratio_is_the_layer_s():
    params = {"blocks": {"kernel": jnp.stack([jnp.full((2, 2), 3.0), jnp.zeros((2, 2))])}, "bias": jnp.full(4, 2.0), "zero": jnp.ones(2)}
    updates = {"blocks": {"kernel": jnp.ones((2, 2, 2))}, "bias": jnp.full(4, -0.5), "zero": jnp.zeros(2)}
    scaled, _ = optim.trust_ratio().update(updates, optax.EmptyState(), params)
    np.testing.assert_allclose(scaled["blocks"]["kernel"], np.stack([np.full((2, 2), 3.0), np.ones((2, 2))]))  # |w| = 0: as it is
    np.testing.assert_allclose(scaled["bias"], np.full(4, -2.0))
    assert not scaled["zero"].any()


def loss(params, batch, key):
    out = network().apply(params, batch["x"], batch["t"], batch["label"])
    return ((out - batch["x"]) ** 2).mean(), {}


def losses_of(optimizer, axes, devices, steps=3):
    mesh = sharding.make_mesh(axes, jax.devices()[:devices])
    rng = np.random.default_rng(0)
    batches = [
        {
            "x": rng.normal(size=(8, 4, 4, 2)).astype(np.float32),
            "t": rng.uniform(size=8).astype(np.float32),
            "label": rng.integers(0, 4, 8).astype(np.int32),
        }
        for _ in range(steps)
    ]
    abstract = sharding.abstract_state(init, optimizer, mesh, sharding.TRANSFORMER_RULES)
    state = sharding.init_sharded_state(init, optimizer, jax.random.key(0), mesh, sharding.TRANSFORMER_RULES)
    program = sharding.lower_step(make_step(loss, optimizer), abstract, batches[0], mesh).compile()
    seen = []
    for batch in batches:
        state, metrics = program(state, sharding.shard_batch(batch, mesh))
        seen.append(float(metrics["loss"]))
    return seen, state


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_on_eight_devices(name):
    alone, _ = losses_of(OPTIMIZERS[name](), {}, 1)
    together, state = losses_of(OPTIMIZERS[name](), {"data": 2, "fsdp": 2, "tensor": 2}, 8)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert alone[-1] < alone[0]

    # Every array of the optimizer that belongs to a parameter lies where the parameter lies.
    def specs(tree):
        return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}

    params, opt = specs(state.params), specs(state.opt)
    axes = set()
    for path, moment in opt.items():
        owner = next((params[name] for name in params if path.endswith(f"/{name}")), None)
        assert (owner is None) == (moment.ndim < 1 or "ns_coeffs" in path), path
        if owner is not None:
            assert moment.sharding.spec == owner.sharding.spec and moment.shape == owner.shape, path
            axes |= {axis for axis in moment.sharding.spec if axis}
    assert axes == {"fsdp", "tensor"}


@pytest.mark.parametrize("mask", [None, optim.all_but("logit_")])
def test_scales_of_norms_do_not_decay(mask):
    """Without gradients kernels and biases shrink, a norm's scale does not, whatever else is left out of the decay."""
    one = jnp.ones(2)
    params = {"params": {"norm": {"scale": one, "bias": one}, "out": {"kernel": jnp.ones((2, 2))}, "logit_scale": one}}
    train = ml_collections.ConfigDict({"steps": 10, "learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 0.5, "clip": 1.0})
    optimizer = optim.adamw(train, mask)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    shrunk = jax.tree.map(lambda u: bool((u < 0).all()), updates)["params"]
    assert shrunk == {"norm": {"scale": False, "bias": True}, "out": {"kernel": True}, "logit_scale": mask is None}
