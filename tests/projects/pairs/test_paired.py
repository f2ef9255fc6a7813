"""Pairs of images: both show one scene, and the paper's sets come as they are stored."""

import io

import numpy as np
import pytest
import small_sets
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from mmdiff.data.sources import load_all
from mmdiff.errors import UserError
from mmdiff.projects.pairs import paired
from mmdiff.projects.pairs.paired import CITYSCAPES, Pairs, open_pairs


def refused(*args):
    with pytest.raises(UserError) as caught:
        Pairs(*args)
    return str(caught.value)


def side_by_side(i, kind="PNG", right=(0, 0, 200)):
    pixels = np.full((48, 96, 3), 128, np.uint8)
    pixels[:, :48] = 10 * i, 200, 0
    pixels[:24, 48:] = right
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 5), ("val", 2)):
        (tmp_path / split).mkdir()
        for i in range(count):
            (tmp_path / split / f"{i}.png").write_bytes(side_by_side(i))
    (tmp_path / "train" / "notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("name", ["cityscapes", "night2day"])
def test_two_pictures_side_by_side(folder, name):
    train, val = (Pairs(name, split, folder, 16) for split in ("train", "val"))
    assert (len(train), len(val)) == (5, 2)
    found = train.take(np.array([4, 0, 4]))
    other = paired.OTHER[name]
    assert {key: (array.dtype.name, array.shape) for key, array in found.items()} == {
        "image": ("float32", (3, 16, 16, 3)), other: ("float32", (3, 16, 16, 3))}
    left, right = (other, "image") if name == "night2day" else ("image", other)
    for i, row in enumerate([4, 0, 4]):
        np.testing.assert_allclose(found[left][i], np.broadcast_to(np.float32([10 * row, 200, 0]) / 127.5 - 1, (16, 16, 3)), atol=1e-6)
        np.testing.assert_allclose(found[right][i, 0], np.broadcast_to(np.float32([0, 0, 200]) / 127.5 - 1, (16, 3)), atol=0.01)
        np.testing.assert_allclose(found[right][i, -1], 128 / 127.5 - 1, atol=0.01)
    assert train.take(np.zeros(0, int))["image"].shape == (0, 16, 16, 3)
    with pytest.raises(IndexError):
        val.take(np.array([2]))


class Cityscapes(small_sets.Tiny, skip_registration=True):
    """As TFDS has it, smaller: ids grow from left to right; the last row is a licence plate."""

    name = "cityscapes"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="semantic_segmentation")]
    COUNTS = {"train": 3, "validation": 2}
    FEATURES = {
        "image_id": tfds.features.Text(),
        "image_left": tfds.features.Image(shape=(32, 64, 3), encoding_format="png"),
        "segmentation_label": tfds.features.Image(shape=(32, 64, 1), encoding_format="png"),
    }

    @staticmethod
    def ids():
        ids = np.repeat(np.arange(64)[None] // 2, 32, 0).astype(np.uint8)
        ids[-1] = 255
        return ids

    def example(self, i):
        return {"image_id": str(i), "image_left": np.full((32, 64, 3), 20 * i, np.uint8), "segmentation_label": self.ids()[..., None]}


def coloured(ids):
    return (CITYSCAPES / np.float32(127.5) - 1)[ids]


@pytest.mark.slow
def test_cityscapes_by_tfds(tmp_path):
    pytest.importorskip("tensorflow", reason="TFDS encodes images with TensorFlow: pip install 'mmdiff[tfds]'.")
    small_sets.prepare(Cityscapes, tmp_path)
    train, val = (Pairs("cityscapes_tfds", split, tmp_path, 32) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 2)
    found = load_all(val)
    for image, value in zip(found["image"], (60, 80)):
        np.testing.assert_allclose(image, np.full((32, 32, 3), value / 127.5 - 1), atol=1e-6)
    np.testing.assert_array_equal(found["segmentation"], np.stack([coloured(Cityscapes.ids()[:, 16:48])] * 2))
    half = Pairs("cityscapes_tfds", "val", tmp_path, 16).take(np.array([0]))["segmentation"]
    assert {tuple(c) for c in half.reshape(-1, 3)} <= {tuple(c) for c in coloured(np.arange(256))}  # no mixed colours
    assert CITYSCAPES[7].tolist() == [128, 64, 128] and CITYSCAPES[23].tolist() == [70, 130, 180] and CITYSCAPES[26].tolist() == [0, 0, 142]
    assert len({tuple(c) for c in CITYSCAPES[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]]}) == 19


def test_what_is_missing_is_named(folder, tmp_path):
    assert "there is no set of pairs 'winter': set config.data.name to cityscapes" in refused("winter", "train", folder)
    assert "no split 'test': choose one of train, val" in refused("night2day", "test", folder)
    assert "config.data.dir is empty" in refused("night2day", "train", "")
    assert "unpack pix2pix's night2day.tar.gz" in refused("night2day", "val", tmp_path / "none")
    missing = refused("cityscapes_tfds", "val", tmp_path)
    assert "gtFine_trainvaltest.zip" in missing and "tfds.builder('cityscapes/semantic_segmentation'" in missing
    (folder / "val/0.png").write_bytes(side_by_side(0)[:90])
    with pytest.raises(UserError, match="0.png cannot be read as an image"):
        load_all(Pairs("cityscapes", "val", folder, 8))
    (folder / "val/0.png").write_bytes(small_sets.picture(0, "PNG"))
    with pytest.raises(UserError, match="0.png has 80 x 48 pixels: a pair is one file with two squares side by side"):
        load_all(Pairs("cityscapes", "val", folder, 8))
    for file in (folder / "val").iterdir():
        file.unlink()
    assert "there are no images" in refused("cityscapes", "val", folder)


def test_open_pairs(folder):
    opened = open_pairs(ConfigDict({"name": "cityscapes", "dir": str(folder)}), "val", 8)
    assert load_all(opened)["segmentation"].shape == (2, 8, 8, 3)
    made_up = open_pairs(ConfigDict({"name": "random", "dir": ""}), "train", 8).take(np.arange(3))
    assert {name: array.shape for name, array in made_up.items()} == dict.fromkeys(("image", "segmentation", "night"), (3, 8, 8, 3))
    assert not np.array_equal(made_up["image"], made_up["night"])
