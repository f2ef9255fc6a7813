"""Samplers of masked tokens against the law of two tokens that depend on each other, whose exact denoiser is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import keys

from mmdiff import sampling, schedules
from mmdiff.errors import UserError
from mmdiff.processes import Joint, absorbing, fold, uniform

LAW = np.asarray([[0.40, 0.02, 0.08], [0.05, 0.05, 0.10], [0.02, 0.18, 0.10]])
ALONE = LAW.sum(1)[:, None] * LAW.sum(0)  # of as good as independent tokens
COUNT, MASK = 40_000, 3


def exact(params, x, t):
    """log p(token | the other one, if it is known), [B, 2, 3]."""
    law = jnp.log(jnp.asarray(LAW))
    one, other = (jax.nn.logsumexp(law, axis) for axis in (1, 0))
    known = [jnp.where(x[:, place, None] == MASK, -jnp.inf, 0.0) for place in (0, 1)]
    first = jnp.where(jnp.isinf(known[1]), one, jnp.take(law.T, jnp.minimum(x[:, 1], 2), 0))
    second = jnp.where(jnp.isinf(known[0]), other, jnp.take(law, jnp.minimum(x[:, 0], 2), 0))
    return jnp.stack([first, second], 1)


def shares(pairs):
    return np.bincount(np.asarray(pairs) @ [3, 1], minlength=9).reshape(3, 3) / len(pairs)


def close(found, expected, count=COUNT):
    np.testing.assert_array_less(np.abs(found - expected), 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-9)


@pytest.mark.parametrize("keep", [schedules.flow(), schedules.masked_cosine()])
def test_first_hitting_draws_the_exact_law(keep):
    process = absorbing(3, keep)

    @jax.jit
    def draw(k):
        grid = sampling.hitting_grid(process, k, 2)
        options = {"transforms": [sampling.first_hitting(process)], "start": jnp.full((COUNT, 2), process.mask), "history": True}
        return grid, sampling.sample(process, exact, None, k, grid, (2,), **options)

    grid, states = draw(keys(COUNT))
    close(shares(states[-1]), LAW)
    np.testing.assert_array_equal((states == MASK).sum(-1), np.broadcast_to([[2], [1], [0]], (3, COUNT)))  # one a call
    close(np.asarray((states[1, :, 0] == MASK).mean()), np.asarray(0.5))
    assert grid.shape == (3, COUNT) and (np.diff(grid, axis=0) <= 0).all() and (grid[-1] == 0).all()
    # The masked shares at these times are two sorted uniform numbers: their means are 2/3 and 1/3, each of deviation sqrt(1/18).
    np.testing.assert_allclose(keep(grid[:2])[1].mean(1), [2 / 3, 1 / 3], atol=4.5 / np.sqrt(18 * COUNT))


@pytest.mark.parametrize("steps", [1, 4])
def test_ancestral_steps_draw_several_at_once(steps):
    """Two tokens that fall into the same one of N steps, with the chance 1/N, are drawn as if they were independent."""
    process = absorbing(3)
    pairs = jax.jit(lambda k: sampling.sample(process, exact, None, k, sampling.uniform_grid(steps), (2,)))(keys(COUNT))
    close(shares(pairs), (1 - 1 / steps) * LAW + ALONE / steps)


@pytest.mark.parametrize("chain", [absorbing, uniform])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_single_token_keeps_its_law_at_every_time(chain, eta):
    plain = chain(3)
    process, law = type(plain)(plain.redraw, plain.keep, 3, eta), jnp.asarray([0.6, 0.3, 0.1])

    def network(params, x, t):
        return jnp.broadcast_to(jnp.log(law), (*x.shape, 3))

    states = jax.jit(lambda k: sampling.sample(process, network, None, k, sampling.uniform_grid(4), (), history=True))(keys(COUNT))
    for place, t in enumerate((1.0, 0.75, 0.5, 0.25, 0.0)):
        expected = process.push(jnp.pad(law, (0, process.states - 3)), None, jnp.asarray(t))
        close(np.bincount(states[place], minlength=process.states) / COUNT, np.asarray(expected))


def test_remasking_has_the_published_chances():
    """ReMDM: a token stays with 1 - r, and a mask is taken away with (a_s - (1 - r) a_t) / (1 - a_t); r = 1 - a_s / a_{(1 - eta) s}."""
    process, t, s, eta = absorbing(3, eta=0.5), 0.8, 0.4, 0.5
    r = 1 - (1 - s) / (1 - (1 - eta) * s)
    belief = jnp.broadcast_to(jnp.asarray([0.2, 0.5, 0.3]), (COUNT, 3))

    @jax.jit
    def step(state, belief):
        return process.step(keys(COUNT), jnp.full(COUNT, state), belief, jnp.full(COUNT, t), jnp.full(COUNT, s))

    known = step(1, jax.nn.one_hot(jnp.full(COUNT, 1), 3))
    assert set(np.unique(known)) == {1, MASK}
    close(np.asarray((known == 1).mean()), np.asarray(1 - r))
    close(np.asarray((step(MASK, belief) != MASK).mean()), np.asarray(((1 - s) - (1 - r) * (1 - t)) / t))
    with pytest.raises(UserError, match="eta is at least 0"):
        absorbing(3, eta=1.5)


def test_examples_of_a_joint_have_times_of_their_own():
    process = Joint(text=absorbing(5), label=absorbing(2))
    seen, k = [], keys(3)

    def network(params, x, t):
        jax.debug.callback(lambda text, label: seen.append((np.asarray(text), np.asarray(label))), t["text"], t["label"])
        return {name: jnp.zeros((*x[name].shape, part.classes)) for name, part in process.parts.items()}

    grid = {"text": sampling.hitting_grid(process.parts["text"], k, 4), "label": sampling.uniform_grid(4)}
    shape, start = {"text": (2, 2), "label": ()}, {"text": jnp.full((3, 2, 2), 5)}
    transforms = [sampling.only("text", sampling.first_hitting(process.parts["text"]))]
    x = jax.jit(lambda k: sampling.sample(process, network, None, k, grid, shape, transforms=transforms, start=start))(k)
    jax.effects_barrier()
    np.testing.assert_array_equal([text for text, _ in seen], grid["text"][:4])
    np.testing.assert_allclose([label for _, label in seen], np.repeat([[1.0], [0.75], [0.5], [0.25]], 3, 1))
    assert x["text"].max() < 5 and x["label"].max() < 2
    run = sampling.make_sampler(process, network, shape, hitting="text")
    by_name = sampling.hitting_grid(process.parts["text"], fold(k, "text"), 4)
    own = sampling.sample(process, network, None, k, {**grid, "text": by_name}, shape, transforms=transforms, start=start)
    jax.tree.map(np.testing.assert_array_equal, run(None, k, {}, steps=4, guidance=1.0), own)  # as a config has it
    known = {"text": jnp.zeros((3, 2, 2), jnp.int32)}
    np.testing.assert_array_equal(run(None, k, known, steps=2, guidance=1.0)["text"], known["text"])
    with pytest.raises(UserError, match="all its 4 tokens masked and takes a step for each, not 3"):
        run(None, k, {}, steps=3, guidance=1.0)
    with pytest.raises(UserError, match="hitting is a discrete one"):
        sampling.make_sampler(process, network, shape, hitting="image")
    with pytest.raises(UserError, match="leave order or hitting out"):
        sampling.make_sampler(process, network, shape, hitting="text", order=tuple(shape))
    for wrong, words in ((grid["text"][:, :2], "does not fit 3 keys"), (grid["text"][::-1], "from 1 down to 0")):
        with pytest.raises(UserError, match=words):
            sampling.sample(process, network, None, k, {**grid, "text": wrong}, shape, start=start)
    with pytest.raises(UserError, match="start=process.corrupt"):
        sampling.sample(process, network, None, k, grid, shape)
    with pytest.raises(UserError, match="no mask state"):
        sampling.first_hitting(uniform(3))
    with pytest.raises(UserError, match="at least one token"):
        sampling.hitting_grid(process.parts["text"], k, 0)
