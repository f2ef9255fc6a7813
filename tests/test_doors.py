"""Errors at the door: what JAX would silently take for something else is refused, in one sentence, before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import checks, contrastive, losses, nets, processes, sampling, schedules, times
from mmdiff.errors import UserError
from mmdiff.evals import accuracy, likelihood
from mmdiff.processes import Gaussian, Given, Joint, absorbing, uniform, velocity
from mmdiff.training import sharding

KEYS = jax.random.split(jax.random.key(0), 2)


@pytest.mark.parametrize("labels", [[12, 0], [0, -1]])
@pytest.mark.parametrize("process", [absorbing(10), uniform(10)])
def test_class_ids_out_of_range(process, labels):
    with pytest.raises(ValueError, match="out of range: this process has the classes 0..9"):
        process.corrupt(KEYS, jnp.array(labels), jnp.array([0.5, 0.5]))


def test_class_ids_that_are_no_integers():
    with pytest.raises(ValueError, match="integers in 0..9, got float32"):
        absorbing(10).corrupt(KEYS, jnp.array([1.0, 2.0]), jnp.array([0.5, 0.5]))


@pytest.mark.parametrize("t", [[-0.1, 0.5], [0.5, 1.5], [0.5, float("nan")]])
@pytest.mark.parametrize("process", [absorbing(10), Gaussian(schedules.flow(), velocity), Given()])
def test_times_outside_the_unit_interval(process, t):
    with pytest.raises(ValueError, match=r"times lie in \[0, 1\]"):
        process.corrupt(KEYS, jnp.array([1, 2]), jnp.array(t))


def test_a_given_label_that_is_the_mask():
    process = Joint(image=Gaussian(schedules.flow(), velocity), label=absorbing(3))
    shape = {"image": (2,), "label": ()}
    with pytest.raises(ValueError, match="'label': class id 3 is out of range"):
        sampling.sample(process, None, None, KEYS, sampling.uniform_grid(2), shape, given={"label": jnp.array([3, 0])})


@pytest.mark.parametrize("grid", [np.linspace(0, 1, 5), np.array([1.0, 0.2, 0.6, 0.0]), np.array([0.9, 0.0])])
def test_grids_that_do_not_run_from_one_down_to_zero(grid):
    with pytest.raises(ValueError, match="from 1 down to 0"):
        sampling.sample(Gaussian(schedules.flow(), velocity), None, None, KEYS, jnp.asarray(grid, jnp.float32), (2,))


def test_a_condition_that_is_not_given_is_absent():
    process = Joint(image=Gaussian(schedules.flow(), velocity), text=Given(null=7))
    seen = []

    def apply(params, x, t):
        jax.debug.callback(lambda a, b: seen.append((a, b)), x["text"], t["text"])
        return {"image": jnp.zeros_like(x["image"])}

    sampling.sample(process, apply, None, KEYS, sampling.uniform_grid(3), {"image": (2,), "text": ()})
    jax.effects_barrier()
    assert len(seen) == 3 and all((a == 7).all() and (b == 1).all() for a, b in seen)


def test_float_conditions_reach_the_network_whole():
    process = Joint(label=absorbing(3), features=Given())
    features = jnp.array([[0.3, 0.7], [1.6, -0.5]])

    def apply(params, x, t):
        return {"label": jnp.concatenate([x["features"], jnp.zeros((2, 1))], axis=-1)}

    shape = {"label": (), "features": (2,)}
    read = accuracy.posterior(process, apply, None, KEYS, {"features": features}, "label", shape)
    np.testing.assert_allclose(read, jax.nn.softmax(jnp.pad(features, ((0, 0), (0, 1)))), rtol=1e-5)


def test_the_last_belief_is_the_corrected_one():
    """2M extrapolates from clipped beliefs: with a network that overshoots, every x0 it sees and keeps is within the bounds."""
    process, kept = Gaussian(schedules.flow(), velocity), []

    def spy(state):
        jax.debug.callback(lambda a: kept.append(np.abs(a).max()), state.last_x0)
        return state

    def apply(params, x, t):
        return x - 3.0  # far away from any data

    transforms = (sampling.clip(-1, 1), spy, sampling.dpmpp_2m(process.schedule))
    sampling.sample(process, apply, None, KEYS, sampling.uniform_grid(4), (2,), transforms=transforms)
    jax.effects_barrier()
    assert len(kept) == 4 and max(kept[1:]) <= 1.0


def test_stratified_walks_fill_the_square():
    rule = times.joint(image=times.stratified(0), label=times.stratified(1))
    t = rule(jax.random.key(0), jnp.arange(256, dtype=jnp.uint32))
    counts = np.histogram2d(np.asarray(t["image"]), np.asarray(t["label"]), bins=4, range=[[0, 1], [0, 1]])[0]
    assert counts.min() >= 8 and counts.max() <= 24  # 16 expected in each of 16 cells; one line of the square would leave most empty
    with pytest.raises(UserError, match="strides 0 to 3"):
        times.stratified(9)


def test_networks_that_do_not_fit():
    with pytest.raises(UserError, match="width 20 does not fit 3 heads"):
        nets.MMDiT({"image": nets.Patches(4, 4, 1, 2)}, depth=1, width=20, heads=3)
    with pytest.raises(UserError, match="patches of 3 do not tile"):
        nets.Patches(8, 8, 1, 3)


def test_a_tensor_axis_that_no_rule_uses():
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    with pytest.raises(UserError, match="no sharding rule of this experiment names the tensor axis"):
        sharding.abstract_state(lambda key: {"w": jnp.zeros((4, 4))}, None, mesh, [(".*", "fsdp")])


NAN = float("nan")


@pytest.mark.parametrize("make", [
    lambda: times.logit_normal(NAN), lambda: times.logit_normal(0, -1), lambda: times.on_grid(2.5), lambda: times.on_grid(NAN),
    lambda: times.importance(NAN, "vlb"), lambda: times.mixture((NAN, times.uniform()), (0.5, times.uniform())),
    lambda: processes.Categorical((NAN, 1.0)), lambda: processes.Categorical(()), lambda: processes.absorbing(0),
    lambda: processes.absorbing(2.5), lambda: processes.uniform(0), lambda: processes.mixed(0, 0.5),
    lambda: processes.Markov(np.full((2, 3, 3), NAN)), lambda: processes.Markov(np.zeros((0, 3, 3))),
    lambda: processes.Markov(np.eye(3)[None], classes=9), lambda: processes.Markov(np.eye(3)[None], classes=-1),
    lambda: processes.MaskReplace(NAN, schedules.vqd_paper(4)), lambda: processes.MaskReplace(True, schedules.vqd_paper(4)),
    lambda: processes.Gaussian(schedules.flow(), processes.velocity, eta=NAN),
    lambda: processes.Gaussian(schedules.flow(), processes.velocity, eta=2.0),
    lambda: schedules.shift(schedules.flow(), NAN), lambda: schedules.scaled(schedules.flow(), NAN), lambda: schedules.edm(rho=NAN),
    lambda: sampling.uniform_grid(2.5), lambda: losses.min_snr(NAN), lambda: losses.min_snr(-5.0),
    lambda: losses.combine(a=(NAN, lambda *_: None)), lambda: losses.vlb(absorbing(3), 2.5), lambda: losses.auxiliary(absorbing(3), NAN),
    lambda: losses.diffusion(absorbing(3), None, times.uniform(), {"a": (np.inf, None)}), lambda: likelihood.discretized([0, 1], 0),
    lambda: losses.sigmoid(NAN), lambda: losses.sigmoid(-np.inf), lambda: Given(NAN), lambda: Given(np.float32([0, np.inf])),
    lambda: Given(1e39), lambda: likelihood.discretized([0, np.inf]), lambda: likelihood.levels([NAN, 0]),
    lambda: schedules.linear_beta(NAN), lambda: schedules.linear_beta(2.5), lambda: schedules.scaled_linear_beta(True),
    lambda: schedules.cosine_beta(2.5), lambda: schedules.mask_replace(NAN, (1, 0), (0, 1)),
    lambda: contrastive.infonce(0.0), lambda: contrastive.weighted(NAN), lambda: contrastive.form("infonce", -1.0),
])  # fmt: skip
def test_what_is_no_number_or_no_whole_one_is_refused_at_construction(make):
    """A comparison with NaN is false, so a refusal must be written as what is demanded."""
    with pytest.raises(ValueError, match=" "):
        make()


@pytest.mark.parametrize("key, value", [("weights.image", -1.0), ("eval.likelihood.most", -1)])
def test_values_of_sections_within_sections_have_ranges(key, value):
    with pytest.raises(UserError, match=f"config.{key} must be 0 or more, not"):
        checks.check({key: value})
