import itertools

import numpy as np
import pytest

from mmdiff.data import order
from mmdiff.data.loader import batches
from mmdiff.data.sources import ArraySource, whole
from mmdiff.errors import UserError

SIZE, BATCH = 21, 8


def source():
    return ArraySource({"x": np.arange(SIZE, dtype=np.float32)[:, None], "label": np.arange(SIZE, dtype=np.int32)})


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = order.indices(3, np.arange(4 * SIZE), SIZE).reshape(4, SIZE)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(SIZE))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_the_seed_and_on_nothing_that_came_before():
    late = np.arange(5 * SIZE - 3, 5 * SIZE + 3)
    alone = order.indices(0, late, SIZE)
    order.permutation.cache_clear()
    order.indices(1, np.arange(SIZE), SIZE)
    np.testing.assert_array_equal(order.indices(0, late, SIZE), alone)
    assert (order.indices(1, late, SIZE) != alone).any()
    np.testing.assert_array_equal(order.indices(2**64, late, SIZE), alone)  # seeds are taken modulo 2**64


def test_order_is_pinned_for_all_versions_of_numpy():
    np.testing.assert_array_equal(order.indices(7, np.arange(12), 6), [4, 1, 3, 2, 5, 0, 3, 1, 2, 5, 4, 0])


def test_positions_do_not_overflow():
    assert order.positions(2**33, 4096).dtype == np.int64
    assert order.positions(2**33, 4096)[-1] == 2**45 + 4095


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_parts_of_all_processes_are_the_global_batch(processes):
    alone = take(batches(source(), 0, BATCH), 6)
    parts = [take(batches(source(), 0, BATCH, 0, p, processes), 6) for p in range(processes)]
    for step, batch in enumerate(alone):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), array)


def test_starting_at_a_step_is_skipping_the_batches_before():
    for fresh, skipped in zip(take(batches(source(), 0, BATCH, 5), 4), take(batches(source(), 0, BATCH), 9)[5:]):
        for name, array in skipped.items():
            np.testing.assert_array_equal(fresh[name], array)


def test_index_is_the_global_position():
    first, second = take(batches(source(), 0, BATCH), 2)
    np.testing.assert_array_equal(np.concatenate([first["index"], second["index"]]), np.arange(2 * BATCH))
    assert first["index"].dtype == np.uint32
    expected = order.indices(0, np.arange(BATCH), SIZE)
    np.testing.assert_array_equal(first["label"], expected)
    # Past 2**32 examples the number wraps, the order does not.
    far = 2**32 // BATCH
    late = next(batches(source(), 0, BATCH, far))
    np.testing.assert_array_equal(late["index"], np.arange(BATCH))
    np.testing.assert_array_equal(late["label"], order.indices(0, 2**32 + np.arange(BATCH), SIZE))


@pytest.mark.parametrize("batch, processes", [(0, 1), (-8, 1), (10, 4)])
def test_a_batch_that_cannot_be_split_is_refused_at_once(batch, processes):
    with pytest.raises(UserError, match=f"global batch of {batch} .*multiple of {processes}"):
        batches(source(), 0, batch, 0, 0, processes)


def test_a_source_takes_what_it_is_asked_for():
    taken = source().take(np.array([20, 0, 0]))
    np.testing.assert_array_equal(taken["label"], [20, 0, 0])
    assert taken["x"].shape == (3, 1)
    assert len(whole(source())["x"]) == SIZE == len(source())
    for index in (-1, SIZE):
        with pytest.raises(IndexError):
            source().take(np.array([index]))


@pytest.mark.parametrize("arrays", [{}, {"x": np.zeros((0, 2))}, {"x": np.zeros(3), "y": np.zeros(4)}])
def test_a_source_needs_arrays_of_one_length(arrays):
    with pytest.raises(ValueError, match="one length"):
        ArraySource(arrays)
