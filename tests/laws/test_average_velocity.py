"""Laws of average velocities: the identity that trains them, steps of any length, and what a few calls make of a joint law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import keys

from mmdiff import losses, nets, processes, sampling, schedules, times
from mmdiff.errors import UserError
from mmdiff.nets.target import compiling_for
from mmdiff.processes import Gaussian, Joint, absorbing, velocity

FLOW = Gaussian(schedules.flow(), velocity)
M, C = 0.3, 0.6  # the data N(m, c^2), of which everything is known


def moments(t):
    return (1 - t) * M, jnp.sqrt((1 - t) ** 2 * C**2 + t**2)


def field(z, t):
    (mean, std), a = moments(t), t - (1 - t) * C**2
    return -M + (z - mean) * a / std**2


def average(z, t, s):
    """u, and v where s = t."""
    apart, (mean, std) = t - s, moments(t)
    safe = jnp.where(apart > 0, apart, 1.0)
    return jnp.where(apart > 0, -M + (z - mean) * (1 - moments(s)[1] / std) / safe, field(z, t))


def exact(params, x, t):
    return {"image": average(x["image"], t["image"][:, None], t["image/end"][:, None])}


def test_the_average_of_a_gaussian_and_its_identity():
    u = average(jnp.float32(0.7), jnp.float32(0.9), jnp.float32(0.2))
    np.testing.assert_allclose(u, 0.1053518270, rtol=2e-6)
    x = {"image": jnp.asarray([[0.7, -0.4, 1.3]] * 5)}
    t = {"image": jnp.full(5, 0.9), "image/end": jnp.asarray([0.2, 0.0, 0.5, 0.85, 0.9])}
    found = jax.jit(losses.averaged(exact, "image", Joint(image=FLOW)))(None, x, t)["image"]
    np.testing.assert_allclose(found, jnp.broadcast_to(field(x["image"], 0.9), found.shape), atol=2e-6)
    # A long step is two short ones.
    z, (t, m, s) = x["image"][0], jnp.asarray([0.9, 0.6, 0.2])
    middle = z - (t - m) * average(z, t, m)
    np.testing.assert_allclose((t - s) * average(z, t, s), (t - m) * average(z, t, m) + (m - s) * average(middle, m, s), atol=1e-6)


def test_one_call_is_exact_and_velocities_at_a_time_are_ddim():
    process, shape, k = Joint(image=FLOW), {"image": (3,)}, keys(4)

    z = jnp.linspace(-2.0, 2.0, 12).reshape(4, 3)

    def instant(params, x, t):
        return {"image": field(x["image"], t["image"][:, None])}

    def told_none(params, x, t):
        return exact(params, x, {**t, "image/end": t["image"]})

    @jax.jit
    def all_of(k, z):
        start = {"start": {"image": z}}
        return [sampling.sample(process, apply, None, k, sampling.uniform_grid(steps), shape, jumps=jumps, **start)["image"] for (
            apply, steps, jumps) in ((exact, 1, ("image",)), (exact, 3, ("image",)), (told_none, 3, ()), (instant, 3, ()))]

    one, three, ddim, plain = all_of(k, z)
    np.testing.assert_allclose(one, M + C * z, atol=1e-6)  # the flow maps quantiles to quantiles
    np.testing.assert_allclose(three, one, atol=2e-6)
    np.testing.assert_array_equal(ddim, plain)
    assert np.abs(plain - one).max() > 0.01


STD, STATES = 0.4, (-1.0, 1.0)  # y is 0 or 1, and x given y N(-1, .4^2) or N(1, .4^2)
TOY, SHAPE, COUNT = Joint(image=FLOW, label=absorbing(2)), {"image": (), "label": ()}, 20_000


def toy(params, x, t):
    """Of every state of the label the exact average velocity, by quantile transport: z_s = F_s^-1(F_t(z_t)); and p(y | z_t)."""
    z, y, now, end = x["image"], x["label"], t["image"], t["image/end"]
    known = jnp.stack([y != 1, y != 0], -1) / jnp.where(y == 2, 2.0, 1.0)[:, None]

    def parts(t):
        return (1 - t)[:, None] * jnp.asarray(STATES), jnp.sqrt((1 - t) ** 2 * STD**2 + t**2)[:, None]

    def cdf(z, t):
        means, stds = parts(t)
        return (known * jax.scipy.stats.norm.cdf((z[:, None] - means) / stds)).sum(-1)

    wanted = cdf(z, now)

    def halve(_, bounds):
        middle = (bounds[0] + bounds[1]) / 2
        below = cdf(middle, end) < wanted
        return jnp.where(below, middle, bounds[0]), jnp.where(below, bounds[1], middle)

    landing = jax.lax.fori_loop(0, 26, halve, (jnp.full_like(z, -8.0), jnp.full_like(z, 8.0)))[0]
    moves = now > end
    means, stds = parts(now)
    return {"image": (z - landing) / jnp.where(moves, now - end, 1.0), "label": -0.5 * ((z[:, None] - means) / stds) ** 2}


@jax.jit
def trajectory(keys, grid):
    return sampling.sample(TOY, toy, None, keys, grid, SHAPE, jumps=("image",), history=True)


@pytest.mark.parametrize("grid, wanted", [
    (sampling.staircase(2, ("label", "image")), 0.9938), (sampling.staircase(2, ("image", "label")), 0.9938),
    ([1.0, 0.0, 0.0], 0.51), ([1.0, 0.5, 0.0], 0.85)], ids=["label first", "image first", "1 call for both", "2 calls for both"])
def test_one_modality_at_a_time_gives_the_exact_joint_law_and_all_at_once_does_not(grid, wanted):
    """Agreement of the sign of x with y. Both in one call gives the product of their laws, however exact the average velocity is."""
    stairs = isinstance(grid, dict)
    states = trajectory(keys(COUNT), grid if stairs else dict.fromkeys(SHAPE, jnp.asarray(grid)))
    image, label = np.asarray(states["image"]), np.asarray(states["label"])
    agreement = np.mean((image[2] > 0) == (label[2] == 1))
    assert abs(agreement - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / COUNT) + 0.004
    assert abs(np.mean(label[2]) - 0.5) < 0.015
    if stairs:
        assert abs(np.std(image[2]) - np.sqrt(1 + STD**2)) < 0.02
        for states, first in ((image, grid["image"][1] == 0), (label, grid["label"][1] == 0)):  # what stands still stays bit for bit
            np.testing.assert_array_equal(*(states[1:] if first else states[:2]))
            assert (states[0] != states[2]).all()


NET = nets.MMDiT(
    {"image": nets.Patches(4, 4, 1, 2), "label": nets.Label(states=4, classes=3)}, spans=("image",), time_scale=6.0, depth=1, width=8,
    heads=2, scan=False)
PAIRS = Joint(image=FLOW, label=absorbing(3))
INPUTS = {"image": np.zeros((2, 4, 4, 1), np.float32), "label": np.zeros(2, np.int32)}, {"image": np.ones(2), "label": np.ones(2)}
BATCH = {
    "image": np.random.default_rng(2).standard_normal((6, 4, 4, 1), np.float32), "label": jnp.arange(6) % 3, "index": jnp.arange(6)}
RULE = times.joint(image=times.uniform(), label=times.uniform())


@pytest.fixture(scope="module")
def params():
    shapes, draw = jax.eval_shape(NET.init, jax.random.key(0), *INPUTS), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.2 * draw.standard_normal(leaf.shape, np.float32), shapes)


def test_without_spans_the_loss_is_that_of_flow_matching_bit_for_bit(params):
    plain = losses.diffusion(PAIRS, NET.apply, RULE)
    spans = losses.diffusion(PAIRS, losses.averaged(NET.apply, "image", PAIRS), times.spans("image", 1.0, RULE))
    (a, _), (b, metrics) = (jax.jit(loss)(params, BATCH, jax.random.key(0)) for loss in (plain, spans))
    assert a == b and np.isfinite(metrics["loss/image"])


def test_guidance_is_taken_from_the_output_of_examples_whose_condition_is_given():
    """c - u is 2 where the label is given, and the output less by (1 - 1/w) of it; at a time outside an interval by nothing."""
    def apply(params, x, t):
        return {"image": jnp.where(x["label"] == 2, 1.0, 3.0)}

    x, t = {"image": jnp.zeros(4), "label": jnp.asarray([0, 1, 2, 0])}, {"label": jnp.asarray([0.0, 0.0, 1.0, 0.5])}
    t |= {"image": jnp.asarray([0.5, 0.9, 0.5, 0.5]), "image/end": jnp.zeros(4)}
    found = [jax.jit(losses.averaged(apply, "image", TOY, w, ("label",)))(None, x, t)["image"].tolist() for w in (
        2.0, sampling.interval(2.0, 0.2, 0.7, "image"))]
    assert found == [[2.0, 2.0, 1.0, 3.0], [2.0, 3.0, 1.0, 3.0]]


def test_a_network_s_own_velocity_is_the_tangent_and_is_guided():
    """u = 2 z, and a velocity of 3 with the label and 1 without: u + (t - s) 2 3 - (1 - 1/2) 2, and the velocity is less by that, too."""
    def apply(params, x, t):
        return {"image": 2 * x["image"], "image/velocity": jnp.where(x["label"] == 2, 1.0, 3.0)}

    x, t = {"image": jnp.asarray([1.0, -1.0]), "label": jnp.asarray([0, 2])}, {"label": jnp.asarray([0.0, 1.0])}
    t |= {"image": jnp.asarray([0.75, 0.5]), "image/end": jnp.asarray([0.25, 0.5])}
    found = jax.jit(losses.averaged(apply, "image", TOY, 2.0, ("label",)))(None, x, t)
    assert found["image"].tolist() == [2 + 0.5 * 2 * 3 - 1, -2] and found["image/velocity"].tolist() == [3 - 1, 1]


@pytest.mark.slow
def test_slopes_of_a_network_are_those_of_two_calls_and_guidance_folds_in(params):
    """Against a central difference along (v, 1); and the output of guided examples is less by (1 - 1/w)(c - u)."""
    t = {"image": np.full(6, 0.6, np.float32), "label": np.asarray([0, 0, 0, 1, 1, 0.5], np.float32)}
    t["image/end"], x = np.linspace(0.0, 0.6, 6, dtype=np.float32), {"image": BATCH["image"], "label": np.asarray([0, 1, 2, 3, 3, 1])}

    @jax.jit
    def outputs(params, x, t):
        plain, guided = (losses.averaged(NET.apply, "image", PAIRS, w, ("label",))(params, x, t) for w in (1.0, 2.0))
        instant = {**t, "image/end": t["image"]}
        v, null = (NET.apply(params, inputs, at)["image"] for inputs, at in (
            (x, instant), ({**x, "label": jnp.full(6, 3)}, {**instant, "label": jnp.ones(6)})))

        def moved(h):
            return NET.apply(params, {**x, "image": x["image"] + h * v}, {**t, "image": t["image"] + h})

        u, slope = moved(0.0), (moved(5e-3)["image"] - moved(-5e-3)["image"]) / 1e-2
        return plain, guided, u, u["image"] + (t["image"] - t["image/end"])[:, None, None, None] * slope, v - null

    plain, guided, u, wanted, gap = outputs(params, x, t)
    np.testing.assert_array_equal(plain["label"], u["label"])  # an ordinary belief, of the same pass
    assert np.abs(wanted - u["image"]).max() > 0.1 * np.abs(wanted).max()
    np.testing.assert_allclose(plain["image"], wanted, rtol=1e-2, atol=1e-3 * np.abs(wanted).max())
    less = np.where(np.asarray(t["label"])[:, None, None, None] == 0, 0.5 * gap, 0.0)
    np.testing.assert_allclose(plain["image"] - guided["image"], less, atol=1e-5)
    assert np.abs(less).max() > 1e-3


@pytest.mark.parametrize("platform, net", [
    pytest.param("cpu", {"image": nets.Patches(4, 4, 1, 2)}, marks=pytest.mark.slow), ("tpu", {"image": nets.Patches(16, 16, 1, 1)})],
    ids=["asked for", "chosen for a TPU"])
def test_networks_take_no_fused_kernel_where_they_are_differentiated_in_forward_mode(platform, net):
    """Those of TPUs refuse forward mode (of attention, and of norms of wide tokens): the velocity itself uses them, its slope must not."""
    net = nets.MMDiT(
        net, spans=("image",), depth=1, width=128, heads=1, mlp_ratio=1.0, scan=False, backend="pallas" if platform == "cpu" else None)
    side, process = net.modalities["image"].height, Joint(image=FLOW)
    x, t = {"image": jnp.zeros((1, side, side, 1))}, {"image": jnp.ones(1), "image/end": jnp.zeros(1)}
    with compiling_for(platform):
        params = jax.eval_shape(net.init, jax.random.key(0), x, t)

        def slope(params, x):
            return jax.jvp(lambda z: net.apply(params, {"image": z}, t)["image"], (x["image"],), (x["image"],))

        def trained(params, x):
            return losses.averaged(net.apply, "image", process)(params, x, t)

        refused, averaged = (str(jax.make_jaxpr(f)(params, x)) for f in (slope, trained))
        assert "pallas_call" in averaged
        assert "custom_lin" in refused and "custom_lin" not in averaged  # what has no rule for forward mode
        if platform == "cpu":
            with pytest.raises(TypeError, match="forward-mode"):
                jax.jit(slope).lower(params, x)
            jax.jit(trained).lower(params, x)


def test_the_share_of_spans_is_each_examples_own_and_the_rule_keeps_its_times():
    rule = times.joint(image=times.importance(10, "image"), label=0.0)
    spans = times.spans("image", 0.5, rule)
    assert isinstance(spans, times.Adaptive)
    plain, found, later = jax.jit(lambda key: (rule(key, jnp.arange(400)), spans(key, jnp.arange(400)), spans(key, jnp.arange(200, 400))))(
        jax.random.key(0))
    np.testing.assert_array_equal(plain["image"], found["image"])
    np.testing.assert_array_equal(found["image/end"][200:], later["image/end"])
    share = found["image/end"] / found["image"]
    assert 0.4 < np.mean(share == 1) < 0.6 and 0.4 < np.mean(share[share < 1]) < 0.6


def test_a_step_goes_between_two_draws_of_a_rule():
    """The maximum and the minimum of two uniform ones have the means 2/3 and 1/3; a share has its end at its time."""
    found = jax.jit(lambda key: times.spans("image", 0.25, times.joint(image=times.uniform()), times.uniform())(key, jnp.arange(4000)))(
        jax.random.key(0))
    t, end = np.asarray(found["image"]), np.asarray(found["image/end"])
    assert abs(t.mean() - 2 / 3) < 0.02 and abs(np.mean(end == t) - 0.25) < 0.03 and abs(end[end < t].mean() - 1 / 3) < 0.02
    with pytest.raises(UserError, match="importance-sampled times are those of the rule alone"):
        times.spans("image", 0.5, times.joint(image=times.importance(10, "image")), times.uniform())


def test_a_sampler_moves_one_modality_after_the_other_and_takes_no_step_for_what_is_given():
    run, k, ones = sampling.make_sampler(TOY, toy, SHAPE, order=("label", "image"), jumps=("image",)), keys(8), jnp.ones(8, jnp.int32)
    x, given = jax.jit(lambda k: (
        run(None, k, {}, steps=2, guidance=1.0, history=True), run(None, k, {"label": ones}, steps=1, guidance=1.0)))(k)
    np.testing.assert_array_equal(x["image"][0], x["image"][1])
    np.testing.assert_array_equal(x["label"][1], x["label"][2])
    assert (x["label"][1] < 2).all() and (x["image"][2] != x["image"][1]).all()
    # One call is enough: of N(1, .4^2) it is exact.
    np.testing.assert_allclose(given["image"], 1.0 + STD * x["image"][0], atol=2e-5)


def test_what_has_no_average_velocity_is_refused_in_one_sentence():
    for part in (
        Gaussian(schedules.cosine(), velocity), Gaussian(schedules.flow(), processes.v), Gaussian(schedules.flow(), velocity, eta=1.0),
        Gaussian(schedules.flow(), velocity, data_std=0.5), absorbing(2)):
        with pytest.raises(UserError, match=r"let it be Gaussian\(schedules.flow\(\), velocity\)"):
            losses.averaged(toy, "image", Joint(image=part))
    k, grid = keys(2), sampling.uniform_grid(2)
    extrapolates = [sampling.only("image", sampling.dpmpp_2m(schedules.flow()))]
    for options, words in [
        ({"jumps": ("label",)}, "average velocities of 'label'"), ({"jumps": ("sound",)}, "not 'sound'"),
        ({"jumps": ("image",), "heun": True}, "without heun"), ({"jumps": ("image",), "transforms": extrapolates}, "do not go together")]:
        with pytest.raises(UserError, match=words):
            sampling.sample(TOY, toy, None, k, grid, SHAPE, **options)
    for make, words in [
        (lambda: losses.averaged(toy, "image", TOY, 0.5, ("label",)), "a weight of 1"),
        (lambda: losses.averaged(toy, "image", TOY)(None, {}, {"image": 0}), "use times.spans"),
        (lambda: times.spans("image", 0.5, times.uniform())(jax.random.key(0), jnp.arange(2)), "no time of a modality"),
        (lambda: times.spans("image", 1.5, RULE), "lies in"), (lambda: losses.adaptive(None, c=0.0), "c above 0"),
        (lambda: sampling.staircase(1, ("label", "image")), "at least 2 steps"),
        (lambda: sampling.make_sampler(TOY, toy, SHAPE, order=("image",)), "order has all of"),
        (lambda: sampling.sample(  # a network that would not hear of it
            TOY, nets.as_joint(None), None, k, grid, SHAPE, jumps=("image",)), "DiT takes no ends of steps, image/end"),
        (lambda: NET.copy(spans=()).init(jax.random.key(0), INPUTS[0], {**INPUTS[1], "image/end": np.ones(2)}), "say where steps of"),
        (lambda: NET.copy(spans=("sound",)).init(jax.random.key(0), {"image": 0, "label": 0}, {"image": 0, "label": 0}), "no modality")]:
        with pytest.raises(UserError, match=words):
            make()


def test_the_adaptive_weight_leaves_the_direction_of_each_examples_gradient():
    value = lambda out, noised: out**2  # noqa: E731
    out, term = jnp.asarray([0.1, 1.0, 10.0]), losses.adaptive(value, 0.5, 0.02)
    np.testing.assert_allclose(term(out, None), out**2 / jnp.sqrt(out**2 + 0.02), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda o: term(o, None).sum())(out), 2 * out / jnp.sqrt(out**2 + 0.02), rtol=1e-6)
    np.testing.assert_array_equal(losses.adaptive(value, 0.0)(out, None), out**2)
