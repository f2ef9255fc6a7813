"""Partners of another class: never the own one, each equally likely, the same for a seed; and the source that brings them along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import contrastive, losses
from mmdiff.data.negatives import WithNegatives, partners
from mmdiff.data.sources import ArraySource
from mmdiff.errors import UserError
from mmdiff.processes import Noised, absorbing


def test_partners_are_of_another_class_and_equally_likely():
    classes = np.array([2, 0, 1, 0, 2, 2, 0])
    found = partners(classes, count=30_000, seed=1)
    assert found.shape == (7, 30_000) and (classes[found] != classes[:, None]).all()
    for row, own in zip(found, classes):
        others = np.flatnonzero(classes != own)
        # Five standard deviations.
        np.testing.assert_allclose(np.bincount(row, minlength=7)[others] / 30_000, 1 / len(others), atol=5 * np.sqrt(0.25 / 30_000))
    np.testing.assert_array_equal(found, partners(classes, count=30_000, seed=1))
    assert (found != partners(classes, count=30_000, seed=2)).any()


def test_classes_of_several_values():
    texts = np.array([[1, 2], [1, 3], [1, 2], [1, 3]])
    assert (np.isin(partners(texts, 50)[[0, 2]], [1, 3])).all()


def test_a_source_with_negatives():
    tokens = np.arange(12).reshape(6, 2).astype(np.int32)
    labels = np.array([0, 1, 2, 0, 1, 2], np.int32)
    table = partners(labels, 3)
    source = WithNegatives(ArraySource({"tokens": tokens, "label": labels}), table)
    batch = source.take([4, 1, 4])
    assert len(source) == 6 and set(batch) == {"tokens", "label", "negatives"} and batch["negatives"].dtype == np.int32
    np.testing.assert_array_equal(batch["negatives"], tokens[table[[4, 1, 4]]])
    with pytest.raises(IndexError):
        source.take([6])


@pytest.mark.slow
def test_the_contrast_takes_them():
    """The term's value is minus the mean of the negatives' cross-entropies, by hand."""
    tokens = np.random.default_rng(0).integers(0, 5, (4, 3)).astype(np.int32)
    source = WithNegatives(ArraySource({"tokens": tokens, "label": np.arange(4)}), partners(np.arange(4), 2))
    batch = {name: jnp.asarray(array) for name, array in source.take(np.arange(4)).items()}
    process, t = absorbing(5), jnp.full(4, 0.5)
    logits = jnp.cos(jnp.arange(60.0)).reshape(4, 3, 5)
    noised = Noised(batch["tokens"], jnp.full((4, 3), 5), t, batch=batch, key=jax.random.key(0))
    found = contrastive.contrast(process, losses.x0_ce(process), contrastive.table("negatives"))(logits, noised)
    log_p = jax.nn.log_softmax(logits)
    by_hand = [np.mean([[log_p[b, i, z[i]] for i in range(3)] for z in batch["negatives"][b]], axis=0) for b in range(4)]
    scale = losses.x0_ce(process)(logits, noised) / -jnp.take_along_axis(log_p, batch["tokens"][..., None], -1).sum((1, 2))
    np.testing.assert_allclose(found, scale * np.sum(by_hand, axis=1), rtol=1e-5)


@pytest.mark.parametrize("table, message", [
    (np.zeros((5, 2), int), r"integer \[6, N\]"), (np.zeros((6, 2)), "float64"), (np.full((6, 1), 6), "names example 6"),
])  # fmt: skip
def test_bad_tables(table, message):
    with pytest.raises(UserError, match=message):
        WithNegatives(ArraySource({"tokens": np.zeros((6, 2))}), table)


def test_one_class_has_no_partners():
    with pytest.raises(UserError, match="all these examples are of one"):
        partners(np.zeros(5, int))
