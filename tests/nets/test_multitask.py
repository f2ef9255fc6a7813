"""MT-Diffusion's network: what each modality changes, what each head reads, the encoder made of the network, and training with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from filled import filled

from mmdiff import losses, sampling, schedules, times
from mmdiff.evals import accuracy
from mmdiff.nets import Classes, ClassGrid, Grid, MultiTaskDiT, Patches, Vector
from mmdiff.processes import Aggregate, Gaussian, Given, Hidden, MeanShift, absorbing, by_network, fold, identity, moving_target, velocity
from mmdiff.training.step import init_state, make_step

B, K, SHAPE = 3, 5, (4, 4, 1)
PATCHES = Patches(*SHAPE, 2)
BESIDE = {
    "label": Classes(K + 1, K),
    "other": Grid(PATCHES),
    "mask": Grid(PATCHES, head=False),
    "map": ClassGrid(Patches(4, 4, K, 2)),
    "features": Vector(6),
}
OPTIONS = dict(depth=2, width=16, heads=2, scan=False)


def inputs(seed=0, b=B):
    keys = jax.random.split(jax.random.key(seed), 4)
    images = {name: jax.random.normal(key, (b, *SHAPE)) for name, key in zip(("image", "other", "mask"), keys)}
    x = images | {"label": jnp.arange(b) % (K + 1), "features": jax.random.normal(keys[3], (b, 6))}
    x["map"] = jax.random.randint(jax.random.fold_in(keys[3], 1), (b, 4, 4), 0, K + 1)
    return x, {name: jnp.full(b, 0.3) for name in x}


NET = MultiTaskDiT(PATCHES, BESIDE, **OPTIONS)


@functools.cache
def weights():
    return filled(NET, *inputs())


compiled = jax.jit(NET.apply)


def run(x, t):
    return compiled(weights(), x, t)


def test_outputs_are_of_the_target_and_of_what_has_a_head():
    x, t = inputs()
    out = run(x, t)
    assert {name: value.shape for name, value in out.items()} == {
        "image": (B, *SHAPE), "label": (B, K), "other": (B, *SHAPE), "map": (B, 4, 4, K), "features": (B, 6)}  # fmt: skip
    assert all(value.dtype == jnp.float32 for value in out.values())
    half = jax.jit(NET.clone(dtype=jnp.bfloat16).apply)(weights(), x, t)
    assert all(value.dtype == jnp.float32 for value in half.values())
    np.testing.assert_allclose(half["image"], out["image"], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["image", *BESIDE])
def test_every_modality_is_seen_by_its_own_example_alone(name):
    x, t = inputs()
    out = run(x, t)
    moved = run({**x, name: x[name].at[0].set(inputs(1)[0][name][0] if name != "label" else 4)}, t)
    for key in out:
        assert np.abs(moved[key][0] - out[key][0]).max() > 1e-4, key
        np.testing.assert_allclose(moved[key][1:], out[key][1:], atol=1e-5)


@pytest.mark.parametrize("name", BESIDE)
def test_known_hidden_and_absent_are_told_apart_and_nothing_else(name):
    x, t = inputs()
    known, early, late, absent = (run(x, {**t, name: jnp.full(B, time)})["image"] for time in (0.0, 0.1, 0.9, 1.0))
    np.testing.assert_array_equal(early, late)
    clean = [run(x, {**t, "image": jnp.zeros(B), name: jnp.full(B, time)})["image"] for time in (0.5, 1.0)]
    np.testing.assert_array_equal(*clean)  # a clean image carries nothing
    assert min(np.abs(a - b).max() for a, b in [(known, early), (known, absent), (early, absent)]) > 1e-4


def test_scanned_layers_are_the_same_network():
    shapes = jax.eval_shape(NET.clone(scan=True).init, jax.random.key(0), *inputs())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sum(leaf.size for leaf in jax.tree.leaves(weights()))


def test_probabilities_enter_as_the_mean_of_the_classes():
    x, t = inputs()
    x |= {"label": jnp.asarray([0, 3, 4]), "map": x["map"] % K}
    hard = run(x, t)
    soft = run({**x, "label": jax.nn.one_hot(x["label"], K)}, t)
    np.testing.assert_allclose(soft["image"], hard["image"], atol=1e-5)
    maps = run({**x, "map": jax.nn.one_hot(x["map"], K)}, t)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), maps, hard)


def test_a_map_of_classes_enters_and_leaves_pixel_by_pixel():
    """Without blocks between, the class of a pixel changes the logits of its own patch alone, and a mask is no class."""
    net = MultiTaskDiT(PATCHES, {"map": ClassGrid(Patches(4, 4, K, 2))}, depth=1, width=32, heads=2, scan=False)
    x, t = ({name: tree[name] for name in ("image", "map")} for tree in inputs())
    x["map"] = jnp.full((B, 4, 4), K)
    params = filled(net, x, t)
    adaln = params["params"]["second"]["block_0"]["adaln"]
    params["params"]["second"]["block_0"]["adaln"] = jax.tree.map(np.zeros_like, adaln)  # the block is the identity
    masked = net.apply(params, x, t)["map"]
    moved = net.apply(params, {**x, "map": x["map"].at[1, 0, 3].set(2)}, t)["map"]
    change = np.abs(moved - masked).max(-1)
    assert change[1, :2, 2:].min() > 1e-3 and change[[0, 2]].max() == 0 and change[1, 2:].max() == change[1, :2, :2].max() == 0
    none = net.apply(params, {**x, "map": jnp.zeros((B, 4, 4, K))}, t)["map"]
    np.testing.assert_array_equal(none, masked)


def gradients(head):
    """Of the label's output with respect to the parameters, which are filled: nothing is zero by initialisation."""
    net = MultiTaskDiT(PATCHES, {"label": Classes(K + 1, K, head)}, **OPTIONS)
    x, t = ({name: tree[name] for name in ("image", "label")} for tree in inputs())
    params = filled(net, x, t)
    grads = jax.jit(jax.grad(lambda p: (net.apply(p, x, t)["label"] ** 2).sum()))(params)["params"]
    return {name: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree)) for name, tree in grads.items()}


def test_the_middle_s_head_reads_half_of_the_network_and_the_output_s_all_of_it():
    middle, output = gradients("middle"), gradients("output")
    assert middle["first"] > 0 and middle["second"] == 0 and middle["image_out"] == 0
    assert output["first"] > 0 and output["second"] > 0 and output["image_out"] > 0
    with pytest.raises(ValueError, match="no head 'end'; choose middle, output or none"):
        Classes(11, 10, "end")


def test_what_is_missing_is_named():
    x, t = inputs()
    with pytest.raises(KeyError, match="no input or time for \\['mask'\\]"):
        NET.apply(weights(), {name: value for name, value in x.items() if name != "mask"}, t)


# ------------------------------------------------------------------------------------------------ the network as the encoder

PAIR = MultiTaskDiT(PATCHES, {"label": Classes(K + 1, K)}, **OPTIONS)
PAIR_SHAPE = {"image": SHAPE, "label": ()}
pair_apply = jax.jit(PAIR.apply)
IMAGE = Gaussian(schedules.flow(), velocity)


def aggregate(mixed=False):
    encode = by_network(pair_apply, IMAGE, SHAPE, "label", K, rms=0.7, mixed=mixed)
    return Aggregate(
        "image", {"label": MeanShift(encode, moving_target(), shared=True)}, image=IMAGE, label=absorbing(K, schedules.at_once()))


@functools.cache
def pair_params(seed=0):
    x, t = ({name: tree[name] for name in PAIR_SHAPE} for tree in inputs())
    return jax.tree.map(lambda leaf: leaf * (1 + 0.1 * seed), filled(PAIR, x, t))


def pairs(b=B, seed=0):
    x, _ = inputs(seed, b)
    return {"image": x["image"], "label": jnp.arange(b) % K, "index": jnp.arange(b)}


def test_the_network_s_encoding_is_of_the_class_alone_and_as_large_as_said():
    encode = by_network(pair_apply, IMAGE, SHAPE, "label", K, rms=0.7)
    table = encode(pair_params(), jnp.eye(K))
    np.testing.assert_allclose(jnp.sqrt((table**2).mean((1, 2, 3))), 0.7, rtol=1e-4)
    assert np.abs(table[0] - table[1]).max() > 0.1
    p = jax.nn.softmax(jax.random.normal(jax.random.key(3), (7, K)))
    np.testing.assert_allclose(encode(pair_params(), p), jnp.tensordot(p, table, 1), atol=1e-5)  # soft: the mean of E
    mixed = by_network(pair_apply, IMAGE, SHAPE, "label", K, rms=0.7, mixed=True)
    np.testing.assert_allclose(mixed(pair_params(), jnp.eye(K)), table, atol=1e-4)


@pytest.mark.slow
def test_an_unbound_encoder_is_refused_and_a_bound_one_is_any_other():
    process, params = aggregate(), pair_params()
    data, t = pairs(), {name: jnp.full(B, 0.5) for name in PAIR_SHAPE}
    k = jax.random.split(jax.random.key(0), B)
    with pytest.raises(ValueError, match="the encoder of 'label' is the network: use process.bind"):
        process.corrupt(k, process.select(data), t)
    table = by_network(pair_apply, IMAGE, SHAPE, "label", K, rms=0.7)(params, jnp.eye(K))
    fixed = Aggregate("image", {"label": MeanShift(lambda p: jnp.tensordot(p, table, 1), moving_target())}, process.parts)
    one, other = (each.corrupt(k, each.select(data), t) for each in (process.bind(params), fixed))
    np.testing.assert_allclose(one.xt["image"], other.xt["image"], atol=1e-6)
    assert fixed.bind(params) is fixed

    shape, grid = PAIR_SHAPE, sampling.uniform_grid(3)
    draws = [sampling.sample(each, pair_apply, params, k, grid, shape)["image"] for each in (process, fixed)]
    np.testing.assert_allclose(*draws, atol=1e-4)
    given = {"label": jnp.asarray([0, 1, 2])}
    samplers = [sampling.make_sampler(each, pair_apply, shape, ("label",)) for each in (process, fixed)]
    draw = [sampler(params, k, given, steps=3, guidance=2.0) for sampler in samplers]
    np.testing.assert_allclose(draw[0]["image"], draw[1]["image"], atol=1e-4)
    scores = [accuracy.denoising_losses(each, pair_apply, params, k, {"image": data["image"]}, "label", K, shape, 2)
              for each in (process, fixed)]  # fmt: skip
    np.testing.assert_allclose(*scores, atol=1e-4)


def loss_of(process):
    return losses.diffusion(process, pair_apply, times.shared("image", "label"), functools.partial(losses.weighted, label=0.1))


def test_no_gradient_passes_through_the_network_as_encoder():
    """The gradient is that of a fixed table, although the network made it."""
    process, params, batch = aggregate(), pair_params(), pairs()
    bound = process.bind(params)
    both = (loss_of(process), loss_of(bound))
    grads = [jax.jit(jax.grad(lambda p, loss=loss: loss(p, batch, jax.random.key(1))[0]))(params) for loss in both]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *grads)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_training_encodes_with_the_averaged_parameters(microbatches):
    process, batch = aggregate(), pairs(4)
    loss = losses.prepared(losses.combine(one=(1.0, loss_of(process))), lambda batch, keys: {})
    step = make_step(loss, optax.sgd(0.0), microbatches=microbatches)
    state = init_state(lambda key: pair_params(), optax.sgd(0.0), jax.random.key(0), loss)
    other = state.replace(ema=pair_params(1))
    key = jax.random.fold_in(state.key, 0)
    values = [float(jax.jit(step)(each, batch)[1]["loss"]) for each in (state, other)]
    assert abs(values[0] - values[1]) > 1e-5
    whole = jax.jit(loss)
    expected = [float(whole(pair_params(), batch, key, average=each.ema)[0]) for each in (state, other)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ laws of the whole system


def masked(weight=moving_target()):
    return Aggregate(
        "image", {"masked": MeanShift(identity, weight)}, image=Gaussian(schedules.flow(), velocity), masked=Hidden(0.0), mask=Given(1.0))


def test_without_the_known_the_network_that_is_told_is_the_one_that_is_not():
    """Section 9's test 20, its second half: a network fed X only as absent is a function of z_t alone, whatever X is."""
    net = MultiTaskDiT(PATCHES, {"masked": Grid(PATCHES), "mask": Grid(PATCHES, head=False)}, **OPTIONS)
    process, shape = masked(), {"image": SHAPE, "masked": SHAPE, "mask": SHAPE}
    k = jax.random.split(jax.random.key(0), B)
    x, _ = inputs()
    x = {name: x[key] for name, key in zip(shape, ("image", "other", "mask"))}
    t = {name: jnp.full(B, 0.4 if name == "image" else 1.0) for name in shape}
    params = filled(net, x, t)
    noised = [process.corrupt(k, {**x, **other}, t) for other in ({}, {"masked": -x["masked"], "mask": 1 - x["mask"]})]
    apply = jax.jit(net.apply)
    out = [apply(params, *process.inputs(each.xt, each.t)) for each in noised]
    jax.tree.map(np.testing.assert_array_equal, *out)
    plain = process.chain.corrupt(fold(k, "image"), x["image"], t["image"])
    np.testing.assert_array_equal(noised[0].xt["image"], plain.xt)


def test_prepared_entries_depend_on_the_example_alone():
    seen = {}

    def loss(params, batch, key):
        seen["mask"] = batch["mask"]
        return jnp.zeros(()), {}

    wrapped = losses.prepared(loss, lambda batch, keys: {"mask": jax.vmap(jax.random.normal)(keys)})
    key = jax.random.key(4)
    wrapped(None, {"index": jnp.arange(6)}, key)
    whole = seen["mask"]
    wrapped(None, {"index": jnp.asarray([5, 2])}, key)
    np.testing.assert_array_equal(seen["mask"], whole[jnp.asarray([5, 2])])
    assert len(np.unique(whole)) == 6 and wrapped.init(None) is None
