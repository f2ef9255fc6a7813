"""Sampling: the trajectory over the grid, what is pinned, and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import processes, sampling, schedules
from mmdiff.errors import UserError
from mmdiff.processes import Gaussian, Given, Hidden, Joint

PROCESS = Joint(image=Gaussian(schedules.flow()), label=processes.absorbing(4))
SHAPE = {"image": (3,), "label": ()}
GRID = sampling.uniform_grid(4)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def network(params, x, t):
    """Each output depends on everything."""
    image, label = x["image"], jax.nn.one_hot(x["label"], 5)
    mix = (image.sum(-1) + label @ jnp.arange(5.0) + t["image"] - t["label"])[:, None]
    return {"image": params * jnp.sin(mix + jnp.arange(3.0)), "label": params * jnp.cos(mix + jnp.arange(4.0))}


def test_uniform_grid():
    np.testing.assert_array_equal(sampling.uniform_grid(4), [1, 0.75, 0.5, 0.25, 0])
    assert float(sampling.uniform_grid(1000)[-1]) == 0 and sampling.uniform_grid(7).dtype == jnp.float32
    with pytest.raises(ValueError, match="at least one step"):
        sampling.uniform_grid(0)


def space_timesteps(count, steps):
    """`space_timesteps(count, [steps])` as published: which of 0 .. count - 1 are called."""
    stride, place, taken = (count - 1) / (steps - 1), 0.0, []
    for _ in range(steps):
        taken.append(round(place))
        place += stride
    return sorted(set(taken), reverse=True)


@pytest.mark.parametrize("steps, chain", [(250, 1000), (2, 1000), (27, 1000), (1000, 1000), (50, 4000), (7, 100)])
def test_the_published_spacing(steps, chain):
    grid = np.asarray(sampling.spaced_grid(steps, chain))
    np.testing.assert_array_equal(np.round(grid * chain), [*(i + 1 for i in space_timesteps(chain, steps)), 0])
    assert len(grid) == steps + 1 and grid[0] == 1 and (np.diff(grid) < 0).all()
    if steps == 250:
        assert np.round(grid[-4:] * chain).tolist() == [9, 5, 1, 0]
    for wrong in (1, chain + 1):
        with pytest.raises(UserError, match="2 <= steps"):
            sampling.spaced_grid(wrong, chain)


@pytest.mark.parametrize("schedule", [schedules.edm(), schedules.flow(), schedules.cosine()])
def test_karras_grid(schedule):
    """Equation 5, then 0: exactly for EDM's schedule, which it leaves uniform in t; for others in their own times."""
    i = np.arange(18)
    nodes = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    with jax.enable_x64(True):
        grid = sampling.karras_grid(schedule, 18)
        alpha, sigma = schedule(grid)
        np.testing.assert_allclose(sigma[:-1] / alpha[:-1], nodes, rtol=1e-11)
        assert grid[-1] == 0 and sigma[-1] == 0
        even = sampling.karras_grid(schedule, 18, rho=np.inf)[:-1]
        np.testing.assert_allclose(np.diff(0.5 * schedules.log_snr(schedule, even)), np.log(80 / 0.002) / 17, rtol=1e-9)
    coarse = np.asarray(sampling.karras_grid(schedule, 18))
    alpha, sigma = (np.asarray(c) for c in schedule(coarse))
    assert coarse.dtype == np.float32
    np.testing.assert_allclose(sigma[:-1] / alpha[:-1], nodes, rtol=2e-5)
    assert (coarse[0] == 1) == (float(schedule(1.0)[0]) == 1)
    with pytest.raises(UserError, match="sigma_max"):
        sampling.karras_grid(schedules.scaled_linear_beta(), 18)


def test_a_trajectory_may_start_below_one():
    process = Gaussian(schedules.flow(), processes.x0)
    grid = sampling.uniform_grid(3, 0.6)
    np.testing.assert_allclose(grid, [0.6, 0.4, 0.2, 0], atol=1e-7)
    apply = lambda params, x, t: 0.3 * x  # noqa: E731
    xt = process.corrupt(keys(2), jnp.ones((2, 3)), jnp.full(2, 0.6)).xt
    out = sampling.sample(process, apply, None, keys(2), grid, (3,), start=xt, history=True)
    np.testing.assert_array_equal(out[0], xt)
    by_hand = xt
    for t, s in zip(grid[:-1], grid[1:]):
        by_hand = process.step(keys(2), by_hand, 0.3 * by_hand, jnp.full(2, t), jnp.full(2, s))
    np.testing.assert_allclose(out[-1], by_hand, rtol=1e-6)
    # A joint: one modality from a draft, the other from its prior.
    grids = {"image": grid, "label": sampling.uniform_grid(3)}
    joint = sampling.sample(PROCESS, network, 1.0, keys(2), grids, SHAPE, start={"image": xt}, history=True)
    np.testing.assert_array_equal(joint["image"][0], xt)
    np.testing.assert_array_equal(joint["label"][0], [4, 4])
    draw = sampling.make_sampler(PROCESS, network, SHAPE, grid=lambda steps: (sampling.uniform_grid(steps, 0.6), ()))
    start = {"image": xt, "label": jnp.asarray([4, 1])}
    drawn = draw(1.0, keys(2), {}, steps=3, guidance=1.0, start=start, history=True)
    np.testing.assert_array_equal(drawn["label"][0], [4, 1])
    assert drawn["label"][-1][1] == 1  # an unmasked token stays
    for wrong, match in [
        (dict(), "that of 'image' starts at t = 0.6, where there is no prior"), (dict(start=xt), "a dict of arrays"),
        (dict(start={"sound": xt}), "'sound': it must be one of"), (dict(start={"image": xt[:1]}), "has shape"),
        (dict(start={"image": xt * jnp.nan}), "finite"), (dict(start={"image": xt, "label": jnp.asarray([0, 7])}), "integers in 0..4"),
        (dict(start={"label": start["label"]}, given={"label": start["label"]}), "the modalities that are sampled"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=match):
            sampling.sample(PROCESS, network, 1.0, keys(2), grids, SHAPE, **wrong)
    with pytest.raises(UserError, match="starts at t = 0.6"):
        sampling.sample(process, apply, None, keys(2), grid, (3,))


@pytest.mark.parametrize("heun", [False, True])
def test_shapes_types_and_determinism(heun):
    run = jax.jit(lambda k: sampling.sample(PROCESS, network, 1.0, k, GRID, SHAPE, heun=heun))
    out = run(keys(6))
    assert out["image"].shape == (6, 3) and out["image"].dtype == jnp.float32
    assert out["label"].shape == (6,) and out["label"].dtype == jnp.int32
    assert ((out["label"] >= 0) & (out["label"] < 4)).all()  # no mask is left
    jax.tree.map(np.testing.assert_array_equal, out, run(keys(6)))
    assert (out["image"] != run(keys(6, seed=1))["image"]).any()


def test_a_leaf_process_needs_no_names():
    process = Gaussian(schedules.flow(), processes.x0)
    out = sampling.sample(process, lambda params, x, t: jnp.full_like(x, params), 0.7, keys(5), GRID, (2, 2))
    np.testing.assert_allclose(out, np.full((5, 2, 2), 0.7), rtol=1e-6)  # a belief that never changes is reached
    tokens = sampling.sample(processes.uniform(4), lambda p, x, t: 50 * jax.nn.one_hot(x * 0 + 2, 4), None, keys(5), GRID, (7,))
    np.testing.assert_array_equal(tokens, np.full((5, 7), 2))


def test_the_network_sees_the_grid_and_what_is_pinned():
    seen = []

    def spy(params, x, t):
        jax.debug.callback(lambda t, label: seen.append((t["image"][0].item(), t["label"][0].item(), label[0].item())), t, x["label"])
        return network(params, x, t)

    label = jnp.asarray([3, 1])
    out = sampling.sample(PROCESS, spy, 1.0, keys(2), GRID, SHAPE, given={"label": label})
    jax.effects_barrier()
    assert sorted(seen, reverse=True) == [(1.0, 0.0, 3), (0.75, 0.0, 3), (0.5, 0.0, 3), (0.25, 0.0, 3)]
    np.testing.assert_array_equal(out["label"], label)
    seen.clear()
    out = sampling.sample(PROCESS, spy, 1.0, keys(2), GRID, SHAPE, absent=("label",))
    jax.effects_barrier()
    assert {entry[1:] for entry in seen} == {(1.0, 4)}
    np.testing.assert_array_equal(out["label"], [4, 4])


def test_given_images_come_back_bit_for_bit():
    image = jax.random.normal(jax.random.key(3), (2, 3))
    out = jax.jit(lambda x: sampling.sample(PROCESS, network, 1.0, keys(2), GRID, SHAPE, given={"image": x}, heun=True))(image)
    np.testing.assert_array_equal(out["image"], image)


def test_every_modality_may_have_its_own_grid():
    """Label first, then the image: two-stage sampling is a pair of grids."""
    grids = {"image": jnp.asarray([1.0, 1.0, 0.5, 0.0]), "label": jnp.asarray([1.0, 0.0, 0.0, 0.0])}
    out = sampling.sample(PROCESS, network, 1.0, keys(4), grids, SHAPE)
    first = sampling.sample(PROCESS, network, 1.0, keys(4), jnp.asarray([1.0, 0.0]), SHAPE, absent=("image",))
    np.testing.assert_array_equal(out["label"], first["label"])


def test_bad_arguments_are_refused():
    def run(process=PROCESS, shape=SHAPE, count=2, grid=GRID, **options):
        return sampling.sample(process, network, 1.0, keys(count), grid, shape, **options)

    with pytest.raises(KeyError, match="no modality .*text"):
        run(given={"text": jnp.zeros(2)})
    with pytest.raises(KeyError, match="no modality .*text"):
        run(absent=("text",))
    with pytest.raises(ValueError, match="only one"):
        run(Gaussian(schedules.flow()), (3,), given={"image": jnp.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"given 'label' has shape \(3,\), but 2 keys"):
        run(given={"label": jnp.zeros(3, jnp.int32)})
    with pytest.raises(ValueError, match=r"given 'image' has shape \(2, 4\)"):
        run(given={"image": jnp.zeros((2, 4))})
    with pytest.raises(ValueError, match="both given and absent"):
        run(given={"label": jnp.zeros(2, jnp.int32)}, absent=("label",))
    with pytest.raises(ValueError, match="grids of different lengths"):
        run(grid={"image": GRID, "label": GRID[:3]})
    for grid in (GRID[1:], GRID[:-1], GRID[::-1], GRID[:1], 2 * GRID, {"image": GRID, "label": jnp.asarray([1, 0.2, 0.5, 0.2, 0])}):
        with pytest.raises(ValueError, match="from 1 down to 0"):
            run(grid=grid)


def test_strided_sampling_is_a_coarser_grid():
    """For a token whose law needs no network to be known, every stride samples the same law."""
    process = processes.absorbing(3)
    law = np.asarray([0.6, 0.3, 0.1])

    def apply(params, x, t):
        return jnp.broadcast_to(jnp.log(law), (*x.shape, 3))

    for steps in (1, 3, 50):
        out = sampling.sample(process, apply, None, keys(4000), sampling.uniform_grid(steps), (2,))
        np.testing.assert_allclose(np.bincount(np.asarray(out).ravel()) / 8000, law, atol=0.025)


def test_a_transform_of_one_modality_acts_at_every_step():
    joint = sampling.sample(PROCESS, network, 5.0, keys(8), GRID, SHAPE, transforms=[sampling.only("image", sampling.clip(-0.1, 0.1))])
    assert float(jnp.abs(joint["image"]).max()) <= 0.1 + 1e-6


# ---------------------------------------------------------------------------------------------------------------- guidance


def inputs(count=6):
    x = {"image": jax.random.normal(jax.random.key(0), (count, 3)), "label": jnp.arange(count) % 4}
    return x, {"image": jnp.linspace(0.1, 0.9, count), "label": jnp.zeros(count)}


def test_guidance_is_linear_between_the_branches():
    x, t = inputs()
    conditional = network(1.0, x, t)
    bare = network(1.0, {**x, "label": jnp.full(6, 4)}, {**t, "label": jnp.ones(6)})
    for w, expected in ((1.0, conditional["image"]), (0.0, bare["image"]), (2.5, 2.5 * conditional["image"] - 1.5 * bare["image"])):
        out = jax.jit(lambda x, t, w=w: sampling.guided(network, w, ("label",), PROCESS)(1.0, x, t))(x, t)
        np.testing.assert_allclose(out["image"], expected, atol=1e-6)
        np.testing.assert_allclose(out["label"], conditional["label"], atol=1e-6)  # what is dropped is not guided by itself
    traced = jax.jit(lambda w: sampling.guided(network, w, ("label",), PROCESS)(1.0, x, t))(2.5)
    np.testing.assert_allclose(traced["image"], 2.5 * conditional["image"] - 1.5 * bare["image"], atol=1e-5)


def test_guided_sampling():
    label = jnp.asarray([0, 1, 2, 3])

    def draw(apply, **options):
        return jax.jit(lambda k: sampling.sample(PROCESS, apply, 1.0, k, GRID, SHAPE, **options))(keys(4))

    plain = draw(network, given={"label": label})
    one = draw(sampling.guided(network, 1.0, ("label",), PROCESS), given={"label": label})
    np.testing.assert_allclose(one["image"], plain["image"], atol=1e-6)
    unconditional = draw(network, absent=("label",))
    nothing = draw(sampling.guided(network, 0.0, ("label",), PROCESS), given={"label": label})
    np.testing.assert_allclose(nothing["image"], unconditional["image"], atol=1e-6)
    strong = draw(sampling.guided(network, 3.0, ("label",), PROCESS), given={"label": label})
    np.testing.assert_array_equal(strong["label"], label)
    assert float(jnp.abs(strong["image"] - plain["image"]).max()) > 1e-3


def test_a_sampler_guides_during_its_interval():
    given = {"label": jnp.asarray([0, 1, 2, 3])}

    def images(during, guidance):
        draw = sampling.make_sampler(PROCESS, network, SHAPE, ("label",), guided_during=during)
        return jax.jit(lambda k: draw(1.0, k, given, steps=4, guidance=guidance)["image"])(keys(4))

    np.testing.assert_array_equal(images(("image", 0.0, 1.0), 3.0), images(None, 3.0))
    np.testing.assert_allclose(images(("image", 0.0, 0.1), 3.0), images(None, 1.0), atol=1e-6)  # no step starts in there
    assert np.abs(images(("image", 0.2, 0.7), 3.0) - images(None, 3.0)).max() > 1e-3
    for during in (("sound", 0.0, 1.0), ("image", 0.5), ("image", 0.7, 0.2), ("image", 0.2, 1.5)):
        with pytest.raises(UserError, match="sound|guided_during|low < high"):
            sampling.make_sampler(PROCESS, network, SHAPE, ("label",), guided_during=during)


def test_interval_guidance():
    x, t = inputs()
    w = sampling.interval(3.0, 0.3, 0.7, of="image")
    np.testing.assert_array_equal(w(t), np.where((np.asarray(t["image"]) > 0.3) & (np.asarray(t["image"]) <= 0.7), 3.0, 1.0))
    out = sampling.guided(network, w, ("label",), PROCESS)(1.0, x, t)["image"]
    full = sampling.guided(network, 3.0, ("label",), PROCESS)(1.0, x, t)["image"]
    inside = np.asarray(w(t)) == 3.0
    np.testing.assert_allclose(out[inside], full[inside], atol=1e-6)
    np.testing.assert_allclose(out[~inside], network(1.0, x, t)["image"][~inside], atol=1e-6)


def test_guidance_by_a_value_with_features():
    """The dropped value may be an array of one example's shape, as the null of a `Given` may."""
    def apply(params, x, t):
        return {"image": x["image"] + x["features"].sum(-1, keepdims=True)}

    process = Joint(image=Gaussian(schedules.flow()), features=Given(np.asarray([1.0, 0, 0, 0])))
    x = {"image": jnp.zeros((2, 3)), "features": jnp.ones((2, 4))}
    t = {"image": jnp.ones(2), "features": jnp.zeros(2)}
    out = sampling.guided(apply, 2.0, ("features",), process)(None, x, t)
    np.testing.assert_allclose(out["image"], np.full((2, 3), 7.0))


def test_the_process_owns_its_null():
    random = processes.Categorical((0.2, 0.3, 0.5))
    process = Joint(
        depth=Gaussian(schedules.flow()), words=processes.absorbing(5), vqd=processes.MaskReplace(6, schedules.vqd_paper(4)),
        chain=processes.Markov(np.asarray([[[0.0, 0, 1], [0, 0, 1], [0, 0, 1]]]), classes=2), text=Given(7), array=Hidden(0.5),
        uniform=processes.uniform(3), random=random, mixed=processes.mixed(3, 0.9))
    nulls = {"words": 5, "vqd": 6, "chain": 2, "text": 7, "array": 0.5}
    assert {name: process.null(name) for name in nulls} == nulls
    for name in set(process.parts) - set(nulls):
        with pytest.raises(UserError, match=f"modality '{name}': .* has no null: at t = 1 it is random"):
            process.null(name)
        with pytest.raises(UserError, match="has no null"):
            sampling.guided(network, 2.0, (name,), process)
        with pytest.raises(UserError, match="has no null"):
            sampling.make_sampler(process, network, {}, drop=(name,))
    with pytest.raises(UserError, match="no modality 'sound' to drop"):
        process.null("sound")
    for drop in ({"words": 0}, {"depth": 0.0}, "words"):
        with pytest.raises(UserError, match="by name"):
            sampling.guided(network, 2.0, drop, process)
    aggregate = processes.Aggregate("image", {}, image=Gaussian(schedules.flow()), label=processes.absorbing(4))
    np.testing.assert_array_equal(aggregate.null_like("label", jnp.zeros(3, jnp.int32)), [4, 4, 4])


def test_guidance_of_the_first_channels():
    """`forward_with_cfg` of the published DiT: eps, rest = out[:3], out[3:]; eps = u + w (c - u), the rest is the conditional one's."""
    x, t = inputs()
    conditional, bare = network(1.0, x, t), network(1.0, {**x, "label": jnp.full(6, 4)}, {**t, "label": jnp.ones(6)})
    out = sampling.guided(network, 2.5, ("label",), PROCESS, {"image": 2})(1.0, x, t)["image"]
    np.testing.assert_allclose(out[:, :2], (2.5 * conditional["image"] - 1.5 * bare["image"])[:, :2], atol=1e-6)
    np.testing.assert_array_equal(out[:, 2], conditional["image"][:, 2])
    few, all_of_them = (
        sampling.make_sampler(PROCESS, network, SHAPE, ("label",), channels=channels)(
            1.0, keys(2), {"label": jnp.asarray([0, 1])}, steps=1, guidance=3.0)["image"]
        for channels in ({"image": 1}, None))  # fmt: skip
    np.testing.assert_allclose(few[:, 0], all_of_them[:, 0], atol=1e-6)
    assert (few[:, 1:] != all_of_them[:, 1:]).any()
    for channels in ({"sound": 3}, {"image": -1}, {"image": 1.5}):
        with pytest.raises(UserError, match="number of guided channels"):
            sampling.guided(network, 2.0, ("label",), PROCESS, channels)


@pytest.mark.parametrize("w", [float("nan"), float("inf"), 1e39, np.asarray([2.0, float("nan")])])
def test_weights_of_guidance_are_finite(w):
    for make in (lambda: sampling.guided(network, w, ("label",), PROCESS), lambda: sampling.autoguided(network, w, 0.5),
                 lambda: sampling.interval(w, 0.2, 0.8, of="image")):  # fmt: skip
        with pytest.raises(UserError, match="must be finite"):
            make()
    with pytest.raises(UserError, match="low < t <= high"):
        sampling.interval(2.0, 0.8, 0.2, of="image")


def test_autoguidance():
    x, t = inputs()
    for w, expected in ((1.0, network(1.0, x, t)), (0.0, network(0.5, x, t))):
        out = sampling.autoguided(network, w, 0.5)(1.0, x, t)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), out, expected)
