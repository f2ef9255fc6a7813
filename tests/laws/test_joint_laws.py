"""Laws of several modalities side by side: `Joint` adds nothing, conditioning is time, and the joint law comes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import DISCRETE, Mixture, keys
from tiers import some

from mmdiff import processes, sampling, schedules
from mmdiff.evals import accuracy
from mmdiff.processes import Gaussian, Given, Joint, Noised, fold

TOY = Mixture([0.5, 0.3, 0.2], [[-1.0, 0.4], [0.3, 1.0], [1.0, -1.0]], 0.4)
SHAPE = {"image": (2,), "label": ()}
ONES = {
    "gaussian": (Gaussian(schedules.cosine(), processes.v, eta=1.0), lambda key: jax.random.normal(key, (6, 3)), (3,)),
    "given": (Given(null=9), lambda key: jax.random.randint(key, (6, 2), 0, 4), (2,)),
    **{name: (process, lambda key: jax.random.randint(key, (6, 2), 0, 4), (2,)) for name, process in DISCRETE.items()},
}
LABELS = {
    "absorbing": processes.absorbing(3),
    "absorbing_cosine": processes.absorbing(3, schedules.masked_cosine()),
    "uniform": processes.uniform(3),
    "mixed": processes.mixed(3, 0.4),
}


def joint(label="absorbing", **image):
    return Joint(image=Gaussian(schedules.cosine(), processes.v, **image), label=LABELS[label])


@pytest.mark.slow
@pytest.mark.parametrize("name", ONES)
def test_joint_of_one_is_the_one(name):
    """Every method, bit for bit, with keys folded by the modality's name."""
    one, draw, shape = ONES[name]
    many = Joint(x=one)
    t, s = jnp.asarray([0.0, 0.25, 0.5, 0.75, 0.875, 1.0]), jnp.asarray([0.0, 0.0, 0.25, 0.5, 0.25, 0.125])
    k, inner = keys(6), fold(keys(6), "x")
    x0 = draw(jax.random.key(1))
    same = jax.tree_util.Partial(jax.tree.map, np.testing.assert_array_equal)
    same(many.prior(k, {"x": shape}), {"x": one.prior(inner, shape)})
    noised, single = many.corrupt(k, {"x": x0}, {"x": t}), one.corrupt(inner, x0, t)
    same(many.split(noised)["x"], single)
    same(many.inputs(noised.xt, noised.t), tuple({"x": part} for part in one.inputs(single.xt, t)))
    width = (3,) if name == "gaussian" else (2, 4)
    out = jax.random.normal(jax.random.key(2), (6, *width)) if name != "given" else None
    outputs = {"x": out} if one.learnt else {}
    x0_hat = one.clean(out, single.xt, t)
    same(many.clean(outputs, noised.xt, noised.t), {"x": x0_hat})
    same(many.loss(outputs, noised), {"x": one.loss(out, single)})
    same(many.step(k, noised.xt, {"x": x0_hat}, noised.t, {"x": s}), {"x": one.step(inner, single.xt, x0_hat, t, s)})
    same(many.kl(noised, {"x": x0_hat}, {"x": s}), {"x": one.kl(single, x0_hat, s)})
    same(many.elbo_rate(noised, {"x": x0_hat}), {"x": one.elbo_rate(single, x0_hat)})
    same(many.prior_kl({"x": x0}), {"x": one.prior_kl(x0)})
    same(many.select({"x": x0, "other": t}), {"x": x0})
    assert one.select({"x0": x0}) is x0


def test_modalities_do_not_disturb_each_other():
    """Another modality, or another order of them, leaves the draws of the first as they are."""
    image, label = Gaussian(schedules.flow()), processes.absorbing(3)
    x0 = TOY.draw(jax.random.key(0), 4)
    t = {"image": jnp.full(4, 0.5), "label": jnp.full(4, 0.7)}
    both = Joint(image=image, label=label).corrupt(keys(4), x0, t)
    turned = Joint(label=label, image=image).corrupt(keys(4), x0, t)
    alone = Joint(image=image).corrupt(keys(4), x0, t)
    np.testing.assert_array_equal(both.xt["image"], alone.xt["image"])
    for name in both.xt:
        np.testing.assert_array_equal(both.xt[name], turned.xt[name])
    third = Joint(image=image, label=label, again=image).corrupt(keys(4), {**x0, "again": x0["image"]}, {**t, "again": t["image"]})
    assert (third.xt["again"] != third.xt["image"]).all()  # each has its own noise


@functools.cache
def draws(label, count, steps, given=(), absent=(), heun=False, eta=0.0):
    process = joint(label, eta=eta)
    run = jax.jit(
        lambda k, pinned: sampling.sample(
            process, TOY.joint_network(process), None, k, sampling.uniform_grid(steps), SHAPE, given=pinned, absent=absent, heun=heun
        )
    )
    return jax.tree.map(np.asarray, run(keys(count), {name: jnp.asarray(value) for name, value in given}))


@pytest.mark.parametrize("label, heun", some(
    [*((label, False) for label in LABELS), ("absorbing", True), ("uniform", True)], ("absorbing", False), ("uniform", True)))
def test_the_joint_law_is_reproduced(label, heun):
    """Shares, means and spreads by label: the correlation, not only the marginals. 8,000 draws, tolerance 4 standard errors + 0.03."""
    count = 8000
    out = draws(label, count, 64, heun=heun)
    shares = np.bincount(out["label"], minlength=3) / count
    np.testing.assert_allclose(shares, TOY.weights, atol=0.03)
    for k in range(3):
        own = out["image"][out["label"] == k]
        np.testing.assert_allclose(own.mean(0), TOY.means[k], atol=4 * TOY.std / len(own) ** 0.5 + 0.03)
        np.testing.assert_allclose(own.std(0), TOY.std, atol=4 * TOY.std / (2 * len(own)) ** 0.5 + 0.03)


@pytest.mark.parametrize("label", ["absorbing", "uniform"])
def test_a_pinned_modality_is_returned_and_obeyed(label):
    count = 3000
    given = np.arange(count, dtype=np.int32) % 3
    out = draws(label, count, 32, given=(("label", tuple(given)),), heun=True)
    np.testing.assert_array_equal(out["label"], given)
    for k in range(3):
        own = out["image"][given == k]
        np.testing.assert_allclose(own.mean(0), TOY.means[k], atol=0.04)
        np.testing.assert_allclose(own.std(0), TOY.std, atol=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("label", LABELS)
def test_a_pinned_image_is_classified_exactly(label):
    """Image at t = 0: one call at label time 1 is Bayes' p(label | image), and sampled labels follow it."""
    process, count = joint(label), 4000
    image = np.tile(np.asarray([[0.0, 0.3]], np.float32), (count, 1))
    _, exact = TOY.beliefs(jnp.asarray(image[:1]), jnp.ones((1, 1)), jnp.full((1, 1), 1e-6), jnp.ones((1, 3)))
    k = keys(8)
    belief = accuracy.posterior(process, TOY.joint_network(process), None, k, {"image": image[:8]}, "label", SHAPE)
    np.testing.assert_allclose(belief, np.tile(exact, (8, 1)), atol=1e-3)
    out = draws(label, count, 4, given=(("image", tuple(map(tuple, image))),))
    np.testing.assert_array_equal(out["image"], image)
    np.testing.assert_allclose(np.bincount(out["label"], minlength=3) / count, exact[0], atol=0.03)


@pytest.mark.parametrize("label", LABELS)
def test_an_absent_modality_does_not_matter(label):
    """With the label at t = 1 the draws are those of a model that never knew labels, from the same keys."""
    alone = Joint(image=joint(label).parts["image"])
    network = TOY.image_network(alone.parts["image"])

    def apply(params, x, t):
        return {"image": network(params, x["image"], t["image"])}

    grid = sampling.uniform_grid(16)
    expected = jax.jit(lambda k: sampling.sample(alone, apply, None, k, grid, {"image": (2,)}))(keys(500))
    out = draws(label, 500, 16, absent=("label",))
    np.testing.assert_allclose(out["image"], expected["image"], atol=1e-4)
    # The label itself stays the draw from its prior that it was.
    prior = joint(label).prior(fold(keys(500), "prior"), SHAPE)["label"]
    np.testing.assert_array_equal(out["label"], prior)


@pytest.mark.parametrize("label", LABELS)
def test_an_absent_image_does_not_matter(label):
    count = 4000
    out = draws(label, count, 4, absent=("image",))
    np.testing.assert_allclose(np.bincount(out["label"], minlength=3) / count, TOY.weights, atol=0.03)
    process = joint(label)
    outputs = TOY.joint_network(process)
    xt = process.prior(keys(6), SHAPE)
    t = {"image": jnp.ones(6), "label": jnp.full(6, 0.5)}
    other = {**xt, "image": xt["image"][::-1]}
    one, two = (process.clean(outputs(None, x, t), x, t)["label"] for x in (xt, other))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_conditions_may_be_of_any_kind():
    """A `Given` is fed as it is, floats stay floats, and a network owes it no output."""
    process = Joint(image=Gaussian(schedules.flow()), features=Given())
    features = jax.random.normal(jax.random.key(0), (3, 4))
    seen = []

    def apply(params, x, t):
        seen.append(x["features"].dtype)
        return {"image": jnp.zeros_like(x["image"]) + x["features"].mean(-1, keepdims=True)}

    shape = {"image": (2,), "features": (4,)}
    out = sampling.sample(process, apply, None, keys(3), sampling.uniform_grid(2), shape, given={"features": features})
    np.testing.assert_array_equal(out["features"], features)
    assert set(seen) == {jnp.dtype("float32")}
    t = {"image": jnp.full(3, 0.5), "features": jnp.asarray([0.0, 1.0, 0.0])}
    noised = process.corrupt(keys(3), {"image": jnp.ones((3, 2)), "features": features}, t)
    np.testing.assert_array_equal(noised.xt["features"][1], np.zeros(4))
    np.testing.assert_array_equal(process.loss(apply(None, noised.xt, t), noised)["features"], np.zeros(3))


def test_missing_modalities_are_named():
    process = joint()
    x0, t = TOY.draw(jax.random.key(0), 2), {"image": jnp.ones(2), "label": jnp.ones(2)}
    with pytest.raises(KeyError, match="label"):
        process.corrupt(keys(2), {"image": x0["image"]}, t)
    with pytest.raises(KeyError, match="image"):
        process.corrupt(keys(2), x0, {"label": t["label"]})
    with pytest.raises(KeyError, match="label"):
        process.select({"image": x0["image"]})
    with pytest.raises(KeyError, match="no output for .*label"):
        process.loss({"image": x0["image"]}, process.corrupt(keys(2), x0, t))
    with pytest.raises(ValueError, match="at least one modality"):
        Joint()


def test_joints_are_values():
    one, two = joint(), Joint(Joint({"image": Gaussian(schedules.flow())}).parts, label=processes.absorbing(3))
    assert hash(one) == hash(one) and list(two.parts) == ["image", "label"]
    leaves = jax.tree.leaves(Noised(x0={"a": jnp.ones(2)}, xt={"a": jnp.ones(2)}, t={"a": jnp.ones(2)}))
    assert len(leaves) == 3
