import itertools
import logging
import time
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.data import order
from mmdiff.data.loader import batches
from mmdiff.data.sources import ArraySource, OneOfSeveral, fingerprint, first_non_finite, load_all
from mmdiff.errors import UserError

SIZE, BATCH = 21, 8
LARGE = [510838811, 902285605, 802635327, 822335248, 232390313, 147669671]
IMAGENET, LISTED = [202478, 1249216, 1122759, 517556], [68642, 64990, 81940, 68605]


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


def test_one_of_several_captions_in_every_epoch():
    """In the order of the images alone: k epochs show each caption of an image once, on any number of processes and from any step."""
    captions = np.arange(3 * SIZE).reshape(SIZE, 3, 1) * np.ones(2, int)
    own = ArraySource({"image": np.arange(SIZE), "text": captions})
    several = OneOfSeveral(own, "text")
    batch, steps = 7, 3 * SIZE // 7
    seen = take(batches(several, 0, batch), steps)
    image, text = (np.concatenate([each[name] for each in seen]) for name in ("image", "text"))
    np.testing.assert_array_equal(image, np.concatenate([each["image"] for each in take(batches(own, 0, batch), steps)]))
    np.testing.assert_array_equal(np.sort(text[:, 0]), np.arange(3 * SIZE))
    np.testing.assert_array_equal(text[:, 0] // 3, image)
    np.testing.assert_array_equal(next(batches(several, 0, batch, start_step=5))["text"], seen[5]["text"])
    np.testing.assert_array_equal(load_all(several)["text"], captions[np.arange(SIZE), np.arange(SIZE) % 3])
    assert fingerprint(several) not in (fingerprint(own), fingerprint(OneOfSeveral(own, "image")))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 31, 1000, 65_536, 65_537, 65_539, 2**17, 100_003])
def test_every_epoch_is_a_permutation_of_any_size(size, version):
    epochs = order.indices(5, np.arange(2 * size), size, version).reshape(2, size)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    assert size < 30 or (epochs[0] != epochs[1]).mean() > 0.9
    # Whoever asks for some of it gets what whoever asks for all of it has.
    chosen = np.array([[2 * size - 1, 0], [size, size - 1]])
    np.testing.assert_array_equal(order.indices(5, chosen, size, version), epochs.reshape(-1)[chosen])


def test_a_set_of_any_size_starts_at_once():
    started = time.process_time()
    tracemalloc.start()
    for size in (40_000_000, 10**9, 10**12, 2**61):
        found = order.indices(2**64 - 1, 10**6 * np.arange(4096) + 2**40, size)
        assert found.min() >= 0 and found.max() < size and len(np.unique(found)) > 4080 * (size > 10**8)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert time.process_time() - started < 10


def test_all_bits_of_a_seed_count():
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
    for size in (1000, 10**9):
        assert len({tuple(order.indices(seed, np.arange(8), size)) for seed in seeds}) == len(seeds)
    for seed in (-1, 2**64, 0.5, "0"):
        with pytest.raises(UserError, match="must be an integer from 0 to"):
            order.indices(seed, np.arange(8), 1000)
    with pytest.raises(UserError, match="has the version 3, but this mmdiff knows 1 to 2"):
        order.indices(0, np.arange(8), 1000, version=3)


def chi_square(counts):
    """The deviation of counts from equal ones, in standard deviations."""
    counts = np.asarray(counts, np.float64).reshape(-1)
    return (((counts - counts.mean()) ** 2 / counts.mean()).sum() - (counts.size - 1)) / np.sqrt(2 * (counts.size - 1))


@pytest.mark.parametrize("size", [65_537, 10**9])
def test_a_large_set_is_shuffled_as_by_chance(size):
    length = min(size, 100_000)
    found = order.bijection(3, 1, size, np.arange(length))
    share = found / size
    for lag in (1, 2, 256, 1024, 32_768):  # those of one batch and of one row of the network
        assert abs(np.corrcoef(share[:-lag], share[lag:])[0, 1]) < 4.5 / np.sqrt(length)
    assert chi_square(np.histogram2d(share[:-1], share[1:], 16, ((0, 1), (0, 1)))[0]) < 4.5
    for divisor in (2, 10, 64):  # classes in turn, shards of a power of two
        pairs = found[:-1] % divisor * divisor + found[1:] % divisor
        assert chi_square(np.bincount(pairs, minlength=divisor**2)) < 4.5
    # From seed to seed, from epoch to epoch.
    for first in ([order.bijection(seed, 0, size, np.arange(1))[0] for seed in range(2000)],
                  [order.bijection(0, epoch, size, np.arange(1))[0] for epoch in range(2000)]):  # fmt: skip
        first = np.array(first) / size
        assert chi_square(np.histogram(first, 50, (0, 1))[0]) < 4.5
        assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4.5 / np.sqrt(len(first))


def test_a_small_set_is_as_likely_in_any_order():
    orders, counts = np.unique([order.indices(seed, np.arange(3), 3) for seed in range(3000)], axis=0, return_counts=True)
    assert len(orders) == 6 and chi_square(counts) < 4.5


def test_order_is_pinned_for_all_versions_of_numpy():
    for version in (1, 2):  # a small set has the order that it always had
        np.testing.assert_array_equal(order.indices(7, np.arange(12), 6, version), [4, 1, 3, 2, 5, 0, 3, 1, 2, 5, 4, 0])
    large = np.array([0, 1, 2, 999_999_999, 10**9, 7 * 10**9])
    np.testing.assert_array_equal(order.indices(7, large, 10**9), LARGE)
    np.testing.assert_array_equal(order.indices(2**63 + 1, np.arange(4), 1_281_167), IMAGENET)
    np.testing.assert_array_equal(order.indices(0, np.arange(4), 100_003, 1), LISTED)


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
    assert len(load_all(source())["x"]) == SIZE == len(source())
    for index in (-1, SIZE):
        with pytest.raises(IndexError):
            source().take(np.array([index]))


def test_an_example_that_is_not_finite_is_named_once(caplog):
    x = np.arange(SIZE * 2, dtype=np.float32).reshape(SIZE, 2)
    x[13, 1], x[4, 0] = np.nan, -np.inf
    arrays = {"label": np.arange(SIZE), "x": x}
    with caplog.at_level(logging.WARNING):
        batch = take(batches(ArraySource(arrays), 0, BATCH), 12)[0]
    assert set(batch) == {"label", "x", "index"}
    said = sorted(record.getMessage() for record in caplog.records)
    assert said == [f"example {i} of the training data has values of 'x' that are not finite: fix or remove it." for i in (13, 4)]
    # By number, in any floating type; a sum that overflows is no reason.
    for dtype in (np.float16, np.float32, np.float64, jnp.bfloat16):
        assert first_non_finite({"y": np.zeros(3, np.int32), "x": x.astype(dtype)[[0, 4, 13]]}, np.array([7, 8, 9])) == ("x", 8)
    assert first_non_finite({"x": np.full((5, 2), 3e38, np.float32)}, np.arange(5)) is None


@pytest.mark.parametrize("arrays", [{}, {"x": np.zeros((0, 2))}, {"x": np.zeros(3), "y": np.zeros(4)}])
def test_a_source_needs_arrays_of_one_length(arrays):
    with pytest.raises(ValueError, match="one length"):
        ArraySource(arrays)
