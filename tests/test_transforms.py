"""Transforms of a sampler's step: against their formulas, and what each leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import processes, sampling, schedules


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def state_of(x0, xt=None, t=0.5, s=0.25):
    x0 = jnp.asarray(x0, jnp.float32)
    full = lambda value: jnp.full(x0.shape[0], value)  # noqa: E731
    xt = x0 if xt is None else jnp.asarray(xt)
    return sampling.SamplerState(xt=xt, t=full(t), s=full(s), x0=x0, last_x0=x0, last_t=full(t), x0_for_history=x0, keys=keys(x0.shape[0]))


def test_clip_and_threshold():
    x0 = jnp.asarray([[0.5, -0.2, 0.1], [4.0, -2.0, 1.0]])
    np.testing.assert_allclose(sampling.clip(-1, 1)(state_of(x0)).x0, [[0.5, -0.2, 0.1], [1, -1, 1]])
    np.testing.assert_allclose(sampling.threshold(1.0)(state_of(x0)).x0, [[0.5, -0.2, 0.1], [1, -0.5, 0.25]], rtol=1e-6)
    halfway = sampling.threshold(0.5)(state_of(x0)).x0  # the median of |x0| is 2: clip there, then scale
    np.testing.assert_allclose(halfway[1], [1, -1, 0.5], rtol=1e-6)


def test_top_p():
    x0 = jnp.asarray([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.0, 0.9], [0.25, 0.25, 0.25, 0.25]])
    kept = sampling.top_p(0.7)(state_of(x0)).x0
    np.testing.assert_allclose(kept[:2], [[0.625, 0.375, 0, 0], [0, 0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(kept.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(sampling.top_p(1.0)(state_of(x0)).x0, x0, atol=1e-6)
    np.testing.assert_allclose(sampling.top_p(0.0)(state_of(x0)).x0[:2], [[1, 0, 0, 0], [0, 0, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.86, 0.999, 1.0])
def test_top_p_keeps_a_class_while_better_ones_have_less(p):
    rng = np.random.default_rng(0)
    x0 = rng.dirichlet(np.full(50, 0.2), 200).astype(np.float32)
    x0[:100] = np.round(x0[:100], 2) + 1e-3  # many of them equal
    x0 /= x0.sum(1, keepdims=True)
    better = np.array([[row[row > value].astype(np.float64).sum() for value in row] for row in x0])
    clear = np.abs(better - p) > 1e-6  # where rounding does not decide
    due = (better < max(p, 1e-9)) & (x0 > 0)
    np.testing.assert_array_equal((np.asarray(sampling.top_p(p)(state_of(x0)).x0) > 0)[clear], due[clear])
    halves = sampling.top_p(p)(state_of(jnp.asarray(x0, jnp.bfloat16))).x0  # their classes tie, and their sums are those of float32
    assert ((np.asarray(halves) > 0) == due).mean() > 0.97


def test_temperature():
    x0 = jnp.asarray([[0.8, 0.2, 0.0]])
    np.testing.assert_allclose(sampling.temperature(1.0)(state_of(x0)).x0, x0, atol=1e-6)
    np.testing.assert_allclose(sampling.temperature(0.5)(state_of(x0)).x0, [[0.64 / 0.68, 0.04 / 0.68, 0]], rtol=1e-6)
    cold = sampling.temperature(0.01)(state_of(jnp.asarray([[1e-3, 2e-3, 0.5e-3]]))).x0
    np.testing.assert_allclose(cold, [[0, 1, 0]], atol=1e-6)  # no underflow to 0 / 0


def test_temperature_zero_takes_the_best_class():
    x0 = jnp.asarray([[0.2, 0.5, 0.3], [0.6, 0.0, 0.4]])
    np.testing.assert_array_equal(sampling.temperature(0)(state_of(x0)).x0, [[0, 1, 0], [1, 0, 0]])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("make, values, match", [
    (sampling.temperature, (-1, NAN, INF, -1e-9), "temperature must be"), (sampling.top_p, (86, -0.1, NAN, INF, 1.001), "top_p"),
    (lambda v: sampling.threshold(v), (99.5, -0.1, NAN), "threshold needs"),
    (lambda v: sampling.threshold(0.9, v), (0, -1, NAN, INF), "threshold needs"),
    (lambda v: sampling.clip(*v), ((1, -1), (0, 0), (NAN, 1), (-1, NAN)), "low < high"),
    (lambda v: sampling.confidence(processes.absorbing(3), v), (-1, NAN, INF), "noise must be"),
    (lambda v: sampling.confidence(v), (processes.uniform(3),), "no mask state"),
    (sampling.uniform_grid, (0, -3), "at least one step"),
    (lambda v: sampling.uniform_grid(3, v), (0, -1, 1.5, NAN), r"starts in \(0, 1\]"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make, values, match):
    for value in values:
        with pytest.raises(ValueError, match=match):
            make(value)


@pytest.mark.parametrize("transform", [sampling.threshold(1.0), sampling.clip(-1, 1)])
def test_a_learned_variance_is_not_rescaled(transform):
    """The belief of `LearnedSigma` has the variance's share behind the image's channels: the image's law is as without it."""
    x0, share = jnp.asarray([[[4.0, -2.0]], [[0.5, 0.2]]]), jnp.asarray([[[3.0, 0.2]], [[0.9, -1.5]]])
    both = transform(state_of(jnp.concatenate([x0, share], -1), xt=x0)).x0
    np.testing.assert_array_equal(both[..., :2], transform(state_of(x0)).x0)
    np.testing.assert_array_equal(both[..., 2:], share)


def test_transforms_of_one_modality():
    image, label = state_of([[2.0, 0.0]]), state_of([[0.6, 0.4]])
    fields = ("xt", "t", "s", "x0", "last_x0", "last_t", "x0_for_history")
    both = sampling.SamplerState(*({"image": getattr(image, f), "label": getattr(label, f)} for f in fields), keys(1))
    out = sampling.only("image", sampling.clip(-1, 1))(both)
    for field in ("x0", "x0_for_history"):
        np.testing.assert_array_equal(getattr(out, field)["image"], [[1, 0]])
        np.testing.assert_array_equal(getattr(out, field)["label"], both.x0["label"])


def test_multistep_extrapolates_in_log_snr():
    schedule = schedules.flow()
    now = sampling.SamplerState(
        xt=jnp.zeros((3, 1)), t=jnp.asarray([0.5, 1.0, 0.5]), s=jnp.asarray([0.25, 0.75, 0.0]), x0=jnp.full((3, 1), 2.0),
        last_x0=jnp.ones((3, 1)), last_t=jnp.asarray([0.75, 1.0, 0.75]), x0_for_history=jnp.full((3, 1), 2.0), keys=keys(3))
    half = lambda t: 0.5 * float(schedules.log_snr(schedule, jnp.asarray(t)))  # noqa: E731
    weight = 0.5 * (half(0.25) - half(0.5)) / (half(0.5) - half(0.75))
    out = sampling.dpmpp_2m(schedule)(now)
    np.testing.assert_allclose(out.x0[:, 0], [2 + weight, 2, 2], rtol=1e-5)  # the first step and the last are of first order
    np.testing.assert_array_equal(out.x0_for_history, now.x0)  # the next step extrapolates from the belief, not from an extrapolation


def test_confidence_unmasks_the_surest_first():
    process = processes.absorbing(3)
    sure = jnp.asarray([0.5, 0.9, 0.6, 0.99])
    x0 = jnp.stack([sure, 1 - sure, 0 * sure], -1)[None]
    out = sampling.confidence(process)(state_of(x0, xt=jnp.full((1, 4), 3), t=1.0, s=0.5))
    np.testing.assert_array_equal(out.s, [[1.0, 0.0, 1.0, 0.0]])  # half of the tokens move to time 0, the others stay
    partly = sampling.confidence(process)(state_of(x0, xt=jnp.asarray([[0, 3, 3, 3]]), t=0.75, s=0.5))
    # What is unmasked counts among the revealed and takes its ordinary step.
    np.testing.assert_array_equal(partly.s, [[0.5, 0.75, 0.75, 0.0]])
    last = sampling.confidence(process)(state_of(x0, xt=jnp.full((1, 4), 3), t=0.25, s=0.0))
    np.testing.assert_array_equal(last.s, np.zeros((1, 4)))


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_confidence_sampling_leaves_no_mask_and_keeps_what_it_sampled(noise):
    process = processes.absorbing(4, schedules.masked_cosine())

    def tokens(params, x, t):
        return jnp.cos(x[..., None] + jnp.arange(4.0) + jnp.arange(6.0)[:, None])

    grid = sampling.uniform_grid(5)
    run = jax.jit(lambda k: sampling.sample(process, tokens, None, k, grid, (6,), transforms=[sampling.confidence(process, noise)]))
    out = run(keys(50))
    assert out.shape == (50, 6) and ((out >= 0) & (out < 4)).all()
    assert len(np.unique(out, axis=0)) > 10
