import hashlib
import itertools

import numpy as np
import pytest

from mmdiff.data.sources import load_all
from mmdiff.errors import UserError
from mmdiff.projects.digits.digits import digits_tokens
from mmdiff.projects.scenes import scenes
from mmdiff.projects.scenes.scenes import ATTRIBUTES, DigitScenes, Scenes, captions, footprint, render, tokenizer

TRIPLE = ("digit", "colour", "position")


@pytest.fixture(scope="module")
def splits():
    return {split: load_all(Scenes(split)) for split in scenes.COUNTS}


def combinations(arrays, names):
    return set(zip(*(arrays[name].tolist() for name in names)))


def test_shapes_and_types(splits):
    for split, count in scenes.COUNTS.items():
        arrays = splits[split]
        assert arrays["image"].shape == (count, 16, 16, 3) and arrays["image"].dtype == np.float32
        assert arrays["text"].shape == (count, 16) and arrays["text"].dtype == np.int32
        assert arrays["image"].min() >= -1 and arrays["image"].max() <= 1
        for name, words in ATTRIBUTES.items():
            assert arrays[name].shape == (count,) and arrays[name].dtype == np.int32
            assert set(arrays[name].tolist()) == set(range(len(words)))
        assert not (arrays["colour"] == arrays["background"]).any()


def test_held_out_combinations_never_occur_in_training(splits):
    trained, tested, held = (combinations(splits[split], TRIPLE) for split in ("train", "test", "held_out"))
    assert trained == tested and not trained & held
    assert len(trained | held) == 300 and len(held) == 30
    assert [sum(digit == d for digit, _, _ in held) for d in range(10)] == [3] * 10
    for pair in itertools.combinations(TRIPLE, 2):
        sizes = [len(ATTRIBUTES[name]) for name in pair]
        assert len(combinations(splits["train"], pair)) == sizes[0] * sizes[1]


def test_splits_share_no_digit(splits):
    others = {image.tobytes() for split in ("train", "validation") for image in digits_tokens(split).arrays["tokens"]}
    small = splits["held_out"]["size"] == 0
    box, _ = footprint(16, 0, 0)
    rows = np.flatnonzero(small & (splits["held_out"]["position"] == 0) & (splits["held_out"]["background"] == 5))
    assert len(rows) > 10
    palette = np.array(list(scenes.COLOURS.values()))
    for row in rows:
        pixels = np.rint((splits["held_out"]["image"][row][box] + 1) * 127.5)
        front, behind = palette[splits["held_out"]["colour"][row]], palette[5]
        channel = np.argmax(np.abs(front - behind))
        ink = np.rint((pixels[..., channel] - behind[channel]) / (front - behind)[channel] * 16).astype(np.int32)
        assert ink.tobytes() not in others


def test_validation_scenes_are_of_digits_of_their_own():
    rows = {split: {ink.tobytes() for ink in Scenes(split, count=6000).ink(np.arange(6000))} for split in ("train", "validation", "test")}
    assert not (rows["train"] & rows["validation"] or rows["validation"] & rows["test"] or rows["train"] & rows["test"])
    assert len(rows["validation"]) == 200


def test_test_and_held_out_scenes_are_those_that_were_always_reported(splits):
    """SHA-256 of the pixels that the splits had before there was a validation split."""
    expected = {"test": "d44c55814f6494f9", "held_out": "c893b0a91154f80d"}
    for split, found in expected.items():
        pixels = np.rint((splits[split]["image"] + 1) * 127.5).astype(np.uint8)
        assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == found


def test_a_small_digit_is_the_digit_itself():
    ink = digits_tokens("train").arrays["tokens"].reshape(-1, 8, 8)[:1] / 16
    scene = {name: np.array([number]) for name, number in zip(ATTRIBUTES, (0, 4, 5, 0, 3))}  # white on black, bottom right
    pixels = render(ink, scene, 16)[0]
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[:8], np.full((8, 16, 3), 16))
    np.testing.assert_array_equal(pixels[8:, :8], np.full((8, 8, 3), 16))
    np.testing.assert_array_equal(pixels[8:, 8:, 0], np.rint(16 + 232 * ink[0]))


@pytest.mark.parametrize("size", [16, 20, 32])
def test_every_place_and_size_fits_and_comes_back(size):
    seen = set()
    for number, position in itertools.product(range(2), range(5)):
        (rows, columns), enlarge = footprint(size, number, position)
        side = size // 2 if number == 0 else 3 * size // 4
        assert 0 <= rows.start and rows.stop <= size and rows.stop - rows.start == columns.stop - columns.start == side
        seen.add((rows.start, columns.start, side))
        np.testing.assert_allclose(enlarge.sum(1), 1)
        np.testing.assert_allclose(np.linalg.pinv(enlarge) @ enlarge, np.eye(8), atol=1e-9)
    assert len(seen) == 10


def test_captions(splits):
    assert captions({name: np.array([n]) for name, n in zip(ATTRIBUTES, (7, 0, 2, 0, 0))}) == [
        "a small red seven on a blue background, top left"
    ]
    assert captions({name: np.array([n]) for name, n in zip(ATTRIBUTES, (3, 5, 4, 1, 4))}) == [
        "a large black three on a white background, in the centre"
    ]
    for arrays in splits.values():
        said = captions(arrays)
        assert tokenizer().decode(arrays["text"]) == said
        assert not tokenizer().unseen(said[0]) and len(set(said)) == len(combinations(arrays, ATTRIBUTES))
    assert max((arrays["text"] > 0).sum(1).max() for arrays in splits.values()) <= scenes.TEXT_LENGTH


def test_a_scene_is_a_function_of_its_number(splits):
    taken = Scenes("train", count=500).take(np.array([499, 0, 499]))
    for name, array in taken.items():
        np.testing.assert_array_equal(array, splits["train"][name][[499, 0, 499]])
    large = Scenes("train", size=32, count=10).take(np.arange(10))
    assert large["image"].shape == (10, 32, 32, 3)
    np.testing.assert_array_equal(large["digit"], splits["train"]["digit"][:10])
    with pytest.raises(IndexError):
        Scenes("test", count=5).take(np.array([5]))


def test_all_scenes_of_a_split_are_different():
    everything = Scenes("held_out", count=15_000)
    assert len(everything) == 15_000
    columns = everything._scenes
    assert len(set(zip(*(column.tolist() for column in columns.values())))) == 15_000
    with pytest.raises(UserError, match="has 1 to 15,000 scenes, not 15001"):
        Scenes("held_out", count=15_001)


def test_mistakes():
    with pytest.raises(UserError, match="no split 'valid'.*train, validation, test, held_out"):
        Scenes("valid")
    for size in (12, 18):
        with pytest.raises(UserError, match="multiple of 4"):
            Scenes("train", size=size)
    with pytest.raises(UserError, match="not 0"):
        Scenes("train", count=0)


def test_the_tfds_builder_holds_the_same_scenes(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(scenes, "COUNTS", {"train": 30, "validation": 5, "test": 20, "held_out": 10})
    tfds.disable_progress_bar()
    DigitScenes(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    stored = tfds.data_source("digit_scenes", split="held_out", data_dir=str(tmp_path), download=False)
    source = load_all(Scenes("held_out"))
    assert len(stored) == len(source["digit"]) == 10
    for i, caption in enumerate(captions(source)):
        assert stored[i]["caption"].decode() == caption
        np.testing.assert_allclose(stored[i]["image"] / 127.5 - 1, source["image"][i], atol=1e-6)
        assert all(stored[i][name] == source[name][i] for name in ATTRIBUTES)
