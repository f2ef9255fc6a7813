import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from tiers import some

from mmdiff import schedules
from mmdiff.evals.accuracy import accuracy, confusion, denoising_losses, eliminated, posterior
from mmdiff.evals.evaluator import example_keys, in_batches
from mmdiff.processes import Gaussian, Given, Joint, absorbing, velocity

CLASSES, SIZE = 4, 6
CENTRES = normal(5, (CLASSES, SIZE))
PROCESS = Joint(x=Gaussian(schedules.flow(), velocity), label=absorbing(CLASSES), note=Given(null=-1.0))
SHAPE = {"x": (SIZE,), "label": (), "note": ()}


def apply(centres, x, t):
    """The exact model of: a uniform class, x = centre of the class + N(0, 1), as far as the read-outs ask; and a spy on times.

    For x at t = 0 the label's logits are -|x - centre|^2 / 2. For a label at t = 0 the data are taken for the centre itself, so
    that velocity = (x_t - centre) / t. A note that is present shifts the logits by itself times the class: it must not be.
    """
    logits = -jnp.sum((x["x"][:, None] - centres) ** 2, -1) / 2
    logits = logits + jnp.where((t["x"] == 0) & (t["label"] == 1) & (t["note"] == 1) & (x["note"] == -1), 0.0, jnp.nan)[:, None]
    centre = centres[jnp.minimum(x["label"], CLASSES - 1)]
    return {"x": (x["x"] - centre) / jnp.maximum(t["x"], 1e-6)[:, None], "label": logits}


def data(count=50):
    key = jax.random.key(1)
    label = jax.random.randint(key, (count,), 0, CLASSES)
    return CENTRES[label] + 0.3 * jax.random.normal(key, (count, SIZE)), label, example_keys(jax.random.key(2), count)


@pytest.mark.slow
def test_posterior_is_bayes_rule():
    x, label, keys = data()
    found = posterior(PROCESS, apply, CENTRES, keys, {"x": x}, "label", SHAPE)
    expected = jax.nn.softmax(-jnp.sum((x[:, None] - CENTRES) ** 2, -1) / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert accuracy(found.argmax(-1), label) > 0.9


def losses(centres, keys, x, draws=8):
    return denoising_losses(PROCESS, apply, centres, keys, {"x": x}, "label", CLASSES, SHAPE, draws)


def test_denoising_losses_have_the_closed_form():
    """With velocity = (x_t - centre) / t the error is (x - centre) / t: no noise is left in it, only the stratified times."""
    x, _, keys = data()
    found, draws = losses(CENTRES, keys, x), 8
    distance = jnp.mean((x[:, None] - CENTRES) ** 2, -1)
    ratio = found / distance  # mean_j 1 / t_j^2, between the ends of the strata
    np.testing.assert_allclose(ratio, ratio[:, :1] * jnp.ones(CLASSES), rtol=1e-3)
    later = sum((draws / (j + 1)) ** 2 for j in range(draws)) / draws
    assert (ratio >= later).all()
    assert (found.argmin(-1) == distance.argmin(-1)).all()


def test_all_classes_share_times_and_noise():
    def noisy(centres, x, t):
        """An output whose error does depend on the noise, and not on the label."""
        return {"x": jnp.zeros_like(x["x"]), "label": jnp.zeros((len(x["label"]), CLASSES))}

    x, _, keys = data()
    found = denoising_losses(PROCESS, noisy, CENTRES, keys, {"x": x}, "label", CLASSES, SHAPE, 4)
    np.testing.assert_array_equal(found, found[:, :1] * np.ones(CLASSES))
    assert len(np.unique(found[:, 0])) == len(x)


def test_elimination_finds_the_nearest_of_the_candidates_at_less_cost():
    x, _, keys = data()
    calls = []

    def counted(centres, x, t):
        jax.debug.callback(lambda label: calls.append(label), x["label"])  # a vmapped call: once for each candidate
        return apply(centres, x, t)

    def answer(candidates, stages, network=apply):
        return eliminated(PROCESS, network, CENTRES, keys, {"x": x}, "label", candidates, SHAPE, stages)

    distance = jnp.mean((x[:, None] - CENTRES) ** 2, -1)
    np.testing.assert_array_equal(answer(CLASSES, [(2, 3), (4, 2), (8, 1)]), distance.argmin(-1))
    # Each example has candidates of its own; the answer is a place among them.
    own = jnp.argsort(jax.random.uniform(jax.random.key(0), (len(x), CLASSES)), -1)[:, :3]
    expected = jnp.take_along_axis(distance, own, 1).argmin(-1)
    np.testing.assert_array_equal(answer(own, [(2, 2), (2, 1)]), expected)
    jax.block_until_ready(answer(CLASSES, [(2, 2), (3, 1)], counted))
    jax.effects_barrier()
    assert len(calls) == 2 * CLASSES + 3 * 2
    with pytest.raises(ValueError, match="keeps 1 candidate"):
        answer(CLASSES, [(2, 2)])


def test_times_are_stratified():
    seen = []

    def spy(centres, x, t):
        jax.debug.callback(lambda t: seen.append(t), t["x"])
        return {"x": jnp.zeros_like(x["x"]), "label": jnp.zeros((len(x["label"]), CLASSES))}

    x, _, keys = data(5)
    denoising_losses(PROCESS, spy, CENTRES, keys, {"x": x}, "label", CLASSES, SHAPE, 4).block_until_ready()
    jax.effects_barrier()
    times = np.unique(np.stack(seen), axis=0)
    assert len(times) == 4  # one per draw, whatever the class
    np.testing.assert_array_equal(np.sort(np.floor(times * 4), axis=0), np.arange(4)[:, None] * np.ones(5))


@pytest.mark.parametrize("size", some([1, 7, 50, 64], 7))
def test_batches_change_nothing(size):
    x, _, keys = data()
    found = in_batches(losses, CENTRES, keys, np.asarray(x), size)
    np.testing.assert_allclose(found, losses(CENTRES, keys, x), rtol=1e-5)


def test_accuracy_and_confusion():
    true, predicted = np.array([0, 1, 1, 2]), np.array([0, 2, 1, 2])
    assert accuracy(predicted, true) == 0.75
    np.testing.assert_array_equal(confusion(predicted, true, 3), [[1, 0, 0], [0, 1, 1], [0, 0, 1]])
    for wrong in (np.zeros(3), np.zeros((4, 1))):
        with pytest.raises(ValueError, match="as many predictions"):
            accuracy(wrong, true)
