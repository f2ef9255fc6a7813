"""Laws of guidance: what it must leave alone, what a branch is, and which branches are not computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import PREDICTS, Mixture, keys

from mmdiff import processes, sampling, schedules
from mmdiff.errors import UserError
from mmdiff.lazy_logits import LazyLogits, as_arrays
from mmdiff.processes import Gaussian, Given, Joint

PROCESS = Joint(image=Gaussian(schedules.flow(), processes.velocity), label=processes.absorbing(3))
TOY = Mixture([0.5, 0.3, 0.2], [[-1.0, 0.4], [0.3, 1.0], [1.0, -1.0]], 0.4)
SHAPE = {"image": (2,), "label": ()}
BOTH = ("image", "label")


def noisy(**times):
    """Inputs of the network at times in (0, 1), or at those given, and a sample of the prior."""
    rng = np.random.default_rng(0)
    t = {name: np.linspace(0.1, 0.95, 12, dtype=np.float32) for name in SHAPE}
    t |= {name: np.full(12, value, np.float32) for name, value in times.items()}
    x = {"image": rng.normal(size=(12, 2)).astype(np.float32), "label": np.where(t["label"] == 1, 3, np.arange(12) % 4).astype(np.int32)}
    return x, t, {"image": rng.normal(size=(12, 2)).astype(np.float32), "label": np.full(12, 3, np.int32)}


@dataclasses.dataclass(frozen=True)
class Toy:
    """The exact network of TOY, or of the same with other means."""

    means: jax.Array = dataclasses.field(default_factory=lambda: TOY.means)

    def __call__(self, params, x, t):
        own = Mixture(TOY.weights, TOY.means, TOY.std)
        own.means = self.means
        return own.joint_network(PROCESS)(params, x, t)


class Counting:
    """A network that knows how many examples it was called with."""

    def __init__(self, network):
        self.network, self.sizes = network, []

    def __call__(self, params, x, t):
        self.sizes.append(len(t["image"]))
        return self.network(params, x, t)


def test_each_leaves_independent_data_alone():
    """The exact network of independent modalities: no weight changes anything; of dependent ones it does."""
    x, t, prior = noisy()

    @jax.jit
    def outputs(means, w):
        network = Toy(means)
        return network(None, x, t), sampling.guided(network, w, process=PROCESS, each=BOTH, prior=prior)(None, x, t)

    for w in (0.0, 1.0, 2.5, 7.0):
        plain, guided = outputs(np.tile(TOY.means[:1], (3, 1)), w)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * (1 + w)), guided, plain)
    plain, guided = outputs(TOY.means, 2.5)
    assert all(np.abs(guided[name] - plain[name]).max() > 0.1 for name in BOTH)


def test_a_branch_is_what_is_without_all_others():
    """out_m = u_m + w_m (c_m - u_m), u_m without the others, w by modality and by time; with the image alone it is the old `drop`."""
    x, t, prior = noisy()
    w = {"image": 1.5, "label": sampling.ramp(3.0, "label")}

    @jax.jit
    def outputs():
        ones = jnp.ones(12)
        return {
            "each": sampling.guided(Toy(), w, process=PROCESS, each=BOTH, prior=prior)(None, x, t), "c": Toy()(None, x, t),
            "image": Toy()(None, {**x, "label": prior["label"]}, {**t, "label": ones})["image"],
            "label": Toy()(None, {**x, "image": prior["image"]}, {**t, "image": ones})["label"],
            "one": sampling.guided(Toy(), 2.5, process=PROCESS, each=("image",))(None, x, t),
            "drop": sampling.guided(Toy(), 2.5, ("label",), PROCESS)(None, x, t)}

    found = jax.tree.map(np.asarray, outputs())
    for name, scale in (("image", 1.5), ("label", (1 + 2 * (1 - t["label"]))[:, None])):
        u, c = found[name], found["c"][name]
        np.testing.assert_allclose(found["each"][name], u + scale * (c - u), rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found["one"], found["drop"])


def test_what_is_absent_already_does_not_guide():
    """c = u, also where the network listens to the noise of what is absent: it is the trajectory's own."""
    x, t, prior = noisy(image=1.0)

    def network(params, x, t):
        return {"image": x["image"], "label": x["image"].sum(-1, keepdims=True) + t["image"][:, None]}

    guided = sampling.guided(network, 4.0, process=PROCESS, each=("label",), prior=prior)
    np.testing.assert_array_equal(jax.jit(guided)(None, x, t)["label"], network(None, x, t)["label"])
    seen = []  # a network that is told where a step ends hears of no step of what is absent
    sampling.guided(lambda *args: seen.append(args[2]) or network(*args), 4.0, process=PROCESS, each=("label",), prior=prior)(
        None, x, {**t, "image/end": np.full(12, 0.5, np.float32)})
    np.testing.assert_array_equal(seen[0]["image/end"], [*[0.5] * 12, *[1.0] * 12])
    x, t, _ = noisy(label=1.0)
    guided = sampling.guided(Toy(), 4.0, process=PROCESS, each=("image",))
    guided, plain = jax.jit(lambda: (guided(None, x, t)["image"], Toy()(None, x, t)["image"]))()
    np.testing.assert_allclose(guided, plain, atol=2e-6)


def test_no_branch_is_computed_that_is_not_needed():
    """Examples in a call of the network, by what is sampled and by the weights."""
    network = Counting(Toy())

    def batch(guidance=2.0, given=None, absent=(), **options):
        draw = sampling.make_sampler(PROCESS, network, SHAPE, ("label",), **options)
        network.sizes.clear()
        jax.eval_shape(lambda k: draw(None, k, given or {}, steps=2, guidance=guidance, absent=absent), keys(4))
        assert len(set(network.sizes)) == 1
        return network.sizes[0] // 4

    label, image = {"label": np.arange(4) % 3}, {"image": np.zeros((4, 2), np.float32)}
    assert batch() == 2 and batch(each=BOTH) == 3
    assert batch(each=BOTH, guidance=1.0) == 1
    assert batch(each=BOTH, given=label) == 2 and batch(each=BOTH, given=image) == 2
    assert batch(each=BOTH, absent=("label",)) == 1 == batch(absent=("label",))
    assert batch(each={"image": lambda w: w, "label": lambda w: 1.0}) == 2
    assert batch(each={"image": lambda w: w, "label": lambda w: 1.0}, guided_during=("image", 0.2, 0.7)) == 2
    assert batch(each=("image",)) == 2 and batch(each=BOTH, guided_during=("image", 0.2, 0.7)) == 3


@pytest.mark.slow
def test_a_sampler_with_each_samples_pairs_that_agree_more():
    """Modes that overlap: guided both ways, image and label agree more often than unguided, and a sample depends on its key alone."""
    toy = Mixture([0.4, 0.4, 0.2], [[-0.5, 0.0], [0.5, 0.0], [0.0, 0.6]], 0.5)
    network, count = toy.joint_network(PROCESS), 1500
    draw = sampling.make_sampler(PROCESS, network, SHAPE, each=BOTH)

    def agreement(w):
        return jax.jit(lambda k: draw(None, k, {}, steps=12, guidance=w))(keys(count))

    def agrees(sampled):
        _, share = toy.beliefs(sampled["image"], jnp.ones((count, 1)), jnp.full((count, 1), 1e-6), jnp.ones((count, 3)))
        return float((share.argmax(-1) == sampled["label"]).mean())

    plain, guided = agreement(1.0), agreement(2.0)
    assert agrees(guided) > agrees(plain) + 0.1
    few = draw(None, keys(count)[7:9], {}, steps=12, guidance=2.0)
    np.testing.assert_allclose(few["image"], guided["image"][7:9], atol=1e-5)
    np.testing.assert_array_equal(few["label"], guided["label"][7:9])


def test_each_is_refused_where_it_means_nothing():
    conditions = Joint(image=Gaussian(schedules.flow()), text=Given(0))
    aggregate = processes.Aggregate("image", {"label": processes.MeanShift(lambda p: p, processes.card())}, **PROCESS.parts)
    for match, make in (
        ("has no null", lambda: sampling.guided(Toy(), 2.0, process=PROCESS, each=BOTH)),
        ("several of .*not sound", lambda: sampling.guided(Toy(), 2.0, process=conditions, each=("sound",))),
        ("several of .*not image", lambda: sampling.make_sampler(PROCESS, Toy(), SHAPE, each="image")),
        ("of an Aggregate use drop", lambda: sampling.make_sampler(aggregate, Toy(), SHAPE, each=BOTH)),
        ("either drop.*or each", lambda: sampling.guided(Toy(), 2.0, ("label",), PROCESS, each=("image",))),
        ("must be finite", lambda: sampling.guided(Toy(), {"image": np.nan}, process=PROCESS, each=("image",))),
        ("must be finite", lambda: sampling.ramp(np.inf, "image")),
        ("leave combine out", lambda: sampling.guided(Toy(), 2.0, ("label",), aggregate, combine=sampling.projected())),
        ("radius above 0", lambda: sampling.projected(0.0, 0.0)),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            make()


def test_output_is_the_inverse_of_clean():
    """For every parameterisation a network's output comes back from its belief."""
    rng = np.random.default_rng(0)
    out, xt, t = (rng.normal(size=shape).astype(np.float32) for shape in ((12, 3), (12, 3), (12,)))
    t = 0.1 + 0.8 / (1 + np.exp(-t))
    parts = {name: Gaussian(schedules.cosine_beta(), predict) for name, predict in PREDICTS.items()}
    back = jax.jit(lambda: {name: part.output(part.clean(out, xt, t), xt, t) for name, part in parts.items()})()
    for name, found in back.items():
        np.testing.assert_allclose(found, out, rtol=1e-4, atol=1e-5, err_msg=name)


def test_projected_guidance():
    """APG on beliefs: eta = 1 without a radius is plain guidance, eta = 0 is across c, no difference beyond the radius, none for w = 1."""
    x, t, _ = noisy()
    rng = np.random.default_rng(1)
    out = {name: rng.normal(size=(24, size)).astype(np.float32) for name, size in (("image", 2), ("label", 3))}  # of both branches
    c = {name: array[:12] for name, array in out.items()}
    one = {"image": lambda t: jnp.ones_like(t["image"])}
    w, radius = 3.0, 0.3

    @jax.jit
    def outputs():
        found = {}
        for name, part in {
            "velocity": Gaussian(schedules.flow(), processes.velocity),
            "fed scaled": Gaussian(schedules.edm(), PREDICTS["edm"], data_std=0.5),
        }.items():
            process = Joint(image=part, label=PROCESS.parts["label"])

            def belief(weight, *apg, process=process, part=part):
                combine = sampling.projected(*apg) if apg else None
                guided = sampling.guided(lambda params, x, t: out, weight, ("label",), process, combine=combine)
                found = guided(None, *process.inputs(x, t))
                return part.clean(found["image"], x["image"], t["image"]), found

            found[name] = {
                "c": part.clean(c["image"], x["image"], t["image"]), "plain": belief(w), "all": belief(w, 1.0),
                "across": belief(w, 0.0), "short": belief(w, 1.0, radius), "none": belief(one, 0.5, radius)}
        return found

    for each in jax.tree.map(np.asarray, outputs()).values():
        size = np.abs(each["plain"][0]).max()
        np.testing.assert_allclose(each["all"][0], each["plain"][0], rtol=1e-5, atol=1e-6 * size)
        np.testing.assert_array_equal(each["all"][1]["label"], each["plain"][1]["label"])
        moved = each["across"][0] - each["c"]
        assert np.abs((moved * each["c"]).sum(-1)).max() < 1e-5 * size**2 and np.abs(moved).max() > 0.1
        lengths = np.linalg.norm(each["short"][0] - each["c"], axis=-1)
        assert lengths.max() <= (w - 1) * radius * (1 + 1e-5) and np.isclose(lengths, (w - 1) * radius, rtol=1e-4).any()
        np.testing.assert_array_equal(each["none"][1]["image"], c["image"])


def test_autoguidance_by_another_network():
    """good = weak gives good exactly; w = 1 does not call the weak one; another network and a weight by time are as the formula says."""
    x, t, _ = noisy()
    good, weak = Toy(), Counting(lambda params, x, t: jax.tree.map(lambda o: params * o, Toy()(None, x, t)))
    plain, same, other = jax.jit(lambda: (
        good(None, x, t), sampling.autoguided(good, 3.0, None)(None, x, t),
        sampling.autoguided(good, sampling.interval(3.0, 0.2, 0.7, "image"), 0.5, weak)(None, x, t)))()  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, same, plain)
    scale = np.where((t["image"] > 0.2) & (t["image"] <= 0.7), 2.0, 1.0)[:, None]  # 0.5 + 3 (1 - 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, scale * b, rtol=1e-6), other, plain)
    assert weak.sizes == [12]
    assert sampling.autoguided(good, 1.0, 0.5, weak) is good and weak.sizes == [12]


def test_logits_that_are_not_whole_are_guided_as_whole_ones():
    """They are a product, whose factors guidance would mix one by one."""
    x, t, prior = noisy()

    def network(params, x, t):
        hidden = params * jnp.stack([x["label"] + 0.5 * x["image"][:, 0], t["image"]], -1)
        return {"label": LazyLogits(hidden, params * jnp.arange(6.0).reshape(2, 3), jnp.arange(3.0), chunks=1, dtype=jnp.float32)}

    def whole(*args):
        return as_arrays(network(*args))

    def guided(apply):
        each = sampling.guided(apply, 2.5, process=PROCESS, each=("label",), prior=prior)
        return sampling.autoguided(apply, 3.0, 0.5)(1.0, x, t), each(1.0, x, t)

    found, wanted = jax.jit(lambda: (guided(network), guided(whole)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
