"""Times: their distributions, and that they depend on the key and the example's index alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import times
from mmdiff.errors import UserError

COUNT = 8192
INDEX = jnp.arange(COUNT, dtype=jnp.uint32)
KEY = jax.random.key(0)
MIXTURE = times.mixture(
    (0.5, times.joint(image=times.uniform(), label=times.uniform())),
    (0.3, times.joint(image=times.uniform(), label=times.constant(0.0))),
    (0.2, times.joint(image=times.constant(0.0), label=times.constant(1.0))),
)
RULES = {
    "uniform": times.uniform(),
    "part": times.uniform(0.25, 0.75),
    "stratified": times.stratified(2),
    "logit_normal": times.logit_normal(-0.5, 0.8),
    "on_grid": times.on_grid(10),
    "constant": times.constant(0.3),
    "joint": times.joint(image=times.uniform(), label=times.stratified()),
    "shared": times.shared("image", "label"),
    "mixture": MIXTURE,
    "importance": times.importance(10, "vlb"),
    "joint_importance": times.joint(tokens=times.importance(10, "vlb"), label=times.constant(0.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_time_depends_on_key_and_index_alone(name):
    """A shuffled batch has shuffled times, a part of a batch a part of them; jit and another index type change nothing."""
    rule = RULES[name]
    index = jnp.arange(1000, 1064, dtype=jnp.uint32)
    t = rule(KEY, index)
    order = np.random.default_rng(0).permutation(64)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    same(rule(KEY, index[order]), jax.tree.map(lambda a: a[order], t))
    same(rule(KEY, index[10:20]), jax.tree.map(lambda a: a[10:20], t))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jax.jit(rule)(KEY, index), t)
    same(rule(KEY, index.astype(jnp.int32)), t)
    for leaf in jax.tree.leaves(t):
        assert leaf.shape == (64,) and leaf.dtype == jnp.float32 and (leaf >= 0).all() and (leaf <= 1).all()
    if name != "constant":
        other = jax.tree.leaves(rule(jax.random.key(1), index))
        assert any((a != b).any() for a, b in zip(other, jax.tree.leaves(t)))


def ks(t, cdf):
    """Kolmogorov-Smirnov distance; 2.2 / sqrt(n) is exceeded once in a hundred."""
    t = np.sort(np.asarray(t, np.float64))
    n = len(t)
    return max(np.max(np.arange(1, n + 1) / n - cdf(t)), np.max(cdf(t) - np.arange(n) / n))


def test_uniform():
    t = times.uniform()(KEY, INDEX)
    assert ks(t, lambda x: x) < 2.2 / COUNT**0.5
    assert float(t.min()) > 0  # t = 0 means "given"
    part = times.uniform(0.25, 0.75)(KEY, INDEX)
    assert ks(part, lambda x: (x - 0.25) * 2) < 2.2 / COUNT**0.5


def test_stratified_is_even_over_any_run():
    """The discrepancy of n consecutive times is of order log n / n, where independent ones have 1 / sqrt(n)."""
    rule = times.stratified()
    for start in (0, 12345, 2**32 - 100):
        t = rule(KEY, (np.arange(start, start + 256) % 2**32).astype(np.uint32))
        assert ks(t, lambda x: x) < 0.02
        assert float(t.min()) > 0 and float(t.max()) <= 1
    steps = jnp.stack([rule(jax.random.key(seed), INDEX[:1])[0] for seed in range(200)])
    assert ks(steps, lambda x: x) < 2.2 / 200**0.5  # and each time alone is uniform over steps


@pytest.mark.parametrize("one, two", [(i, j) for i in range(4) for j in range(i)])
def test_two_walks_fill_the_square(one, two):
    """Modalities with different strides are as good as independent: no cell of a 16 x 16 grid is far from its share."""
    t = times.joint(a=times.stratified(one), b=times.stratified(two))(KEY, INDEX)
    counts, _, _ = np.histogram2d(t["a"], t["b"], bins=16, range=[[0, 1], [0, 1]])
    assert np.abs(counts - COUNT / 256).max() < 16
    assert abs(np.corrcoef(t["a"], t["b"])[0, 1]) < 0.01


def test_logit_normal():
    t = times.logit_normal(-0.5, 0.8)(KEY, INDEX)
    normal = (jax.scipy.special.logit(t) + 0.5) / 0.8
    assert ks(normal, lambda x: np.asarray(jax.scipy.stats.norm.cdf(x))) < 2.2 / COUNT**0.5


def test_on_grid():
    t = np.asarray(times.on_grid(10)(KEY, INDEX))
    values, counts = np.unique(t, return_counts=True)
    np.testing.assert_allclose(values, np.arange(1, 11) / 10, rtol=1e-6)
    assert np.abs(counts / COUNT - 0.1).max() < 0.02


def test_shared_times_are_one_and_joint_times_independent():
    together = times.shared("a", "b", times=times.logit_normal())(KEY, INDEX)
    np.testing.assert_array_equal(together["a"], together["b"])
    apart = times.joint(a=times.uniform(), b=times.uniform())(KEY, INDEX)
    assert abs(np.corrcoef(apart["a"], apart["b"])[0, 1]) < 4 / COUNT**0.5
    # What one modality gets does not depend on which others there are.
    np.testing.assert_array_equal(times.joint(b=times.uniform())(KEY, INDEX)["b"], apart["b"])


def test_modalities_beside_a_shared_time_have_their_own():
    t = times.shared("a", "b", times=times.uniform(), mask=times.constant(1.0), c=times.uniform())(KEY, INDEX)
    np.testing.assert_array_equal(t["a"], t["b"])
    assert (t["mask"] == 1).all()
    assert abs(np.corrcoef(t["a"], t["c"])[0, 1]) < 4 / COUNT**0.5
    with pytest.raises(UserError, match=r"only the time that is shared.*'c'"):
        times.shared("a", c=times.importance(10, "vlb"))
    assert isinstance(times.shared("a", "b", times=times.importance(10, "vlb")), times.Adaptive)


def test_mixture_shares():
    t = MIXTURE(KEY, INDEX)
    given, absent = t["label"] == 0, t["label"] == 1
    assert abs(float(given.mean()) - 0.3) < 0.02
    assert abs(float(absent.mean()) - 0.2) < 0.02
    np.testing.assert_array_equal(t["image"] == 0, absent)  # an example follows one rule in all its modalities
    free = ~given & ~absent
    assert ks(t["label"][free], lambda x: x) < 2.2 / float(free.sum()) ** 0.5
    assert abs(np.corrcoef(t["image"][free], t["label"][free])[0, 1]) < 4 / float(free.sum()) ** 0.5
    whole = times.mixture((1.0, times.uniform()))(KEY, INDEX)
    assert ks(whole, lambda x: x) < 2.2 / COUNT**0.5
    with_nothing = times.mixture((0.0, times.constant(0.1)), (1.0, times.constant(0.2)))(KEY, INDEX)
    assert (with_nothing == jnp.float32(0.2)).all()


def test_neighbours_are_independent():
    t = np.asarray(times.uniform()(KEY, INDEX))
    assert abs(np.corrcoef(t[1:], t[:-1])[0, 1]) < 4 / COUNT**0.5
    keys = times.example_keys(KEY, INDEX[:4])
    assert keys.shape == (4,) and len({tuple(map(int, data)) for data in jax.random.key_data(keys)}) == 4


def test_bad_arguments_are_refused():
    for value in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
            times.constant(value)
    for weights in ((0.5, 0.6), (-0.1, 1.1)):
        with pytest.raises(ValueError, match="sum to 1"):
            times.mixture(*((weight, times.uniform()) for weight in weights))
    with pytest.raises(ValueError, match="sum to 1"):
        times.mixture()
    for low, high in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.5)):
        with pytest.raises(ValueError, match="low < high"):
            times.uniform(low, high)
    with pytest.raises(ValueError, match="strides 0 to 3"):
        times.stratified(4)
    with pytest.raises(ValueError, match="at least one step"):
        times.on_grid(0)
    with pytest.raises(ValueError, match="different modalities"):
        times.mixture((0.5, times.joint(a=times.uniform())), (0.5, times.joint(b=times.uniform())))(KEY, INDEX)
