"""Fashion-MNIST from idx files and from TFDS: its splits, and what is said of files that are damaged."""

import gzip
import itertools

import numpy as np
import pytest

from mmdiff.data.idx import read_idx
from mmdiff.data.sources import fingerprint, load_all
from mmdiff.errors import UserError
from mmdiff.projects.fashion.fashion import NAMES, SPLITS, central, fashion_source
from tests.small_sets import FashionMnist, clothes, fashion_mnist, idx, prepare


def test_the_splits_of_a_folder_of_idx_files(tmp_path):
    folder = str(fashion_mnist(tmp_path))
    found = {split: load_all(fashion_source(split, folder)) for split in SPLITS}
    assert {split: len(each["label"]) for split, each in found.items()} == {"train": 220, "validation": 20, "test": 40}
    assert np.bincount(found["validation"]["label"]).tolist() == [2] * 10
    for one, other in itertools.combinations(found.values(), 2):
        assert not {image.tobytes() for image in one["image"]} & {image.tobytes() for image in other["image"]}
    images, labels = clothes(40)
    test = found["test"]
    assert test["image"].dtype == np.float32 and test["image"].shape == (40, 32, 32, 1) and test["label"].dtype == np.int32
    np.testing.assert_array_equal(np.rint((central(test["image"])[..., 0] + 1) * 127.5), images)
    np.testing.assert_array_equal(test["label"], labels)
    margin = np.ones((32, 32), bool)
    margin[2:-2, 2:-2] = False
    assert (test["image"][:, margin] == -1).all()
    again = fashion_source("train", folder)
    np.testing.assert_array_equal(again.take([7, 3])["image"], found["train"]["image"][[7, 3]])
    assert len({fingerprint(fashion_source(split, folder)) for split in SPLITS}) == 3


def test_tfds_has_the_same_examples(tmp_path):
    pytest.importorskip("tensorflow", reason="TFDS encodes images with TensorFlow.")
    (tmp_path / "idx").mkdir()
    prepare(FashionMnist, tmp_path)
    folders = [str(fashion_mnist(tmp_path / "idx", **FashionMnist.COUNTS)), str(tmp_path)]
    for split in ("train", "test"):
        one, other = (fashion_source(split, folder) for folder in folders)
        assert fingerprint(one) == fingerprint(other)


DAMAGE = [
    (b"", "is no idx file"), (b"\x89PNG....", "is no idx file"), (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "type 0x0d, not bytes"),
    (b"\0\0\x08\x03\0\0\0\x02", "is cut short"), (b"\0\0\x08\x01\0\0\0\x03ab", "3 bytes that it claims"),
    (b"\0\0\x08\x01\0\0\0\x01ab", "too long for the 1 bytes"), (b"\0\0\x08\x03" + b"\xff" * 12 + b"abc", "is cut short or too long"),
    (b"\0\0\x08\x01\0\0\0\0", "0 bytes that it claims")]  # fmt: skip


@pytest.mark.parametrize("content, words", DAMAGE)
@pytest.mark.parametrize("compressed", [False, True])
def test_what_is_said_of_a_damaged_file(content, words, compressed, tmp_path):
    path = tmp_path / ("x.gz" if compressed else "x")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(UserError, match=words) as error:
        read_idx(path)
    assert str(path) in str(error.value)


def test_what_is_said_of_a_damaged_archive(tmp_path):
    whole, path = gzip.compress(idx(np.arange(100, dtype=np.uint8))), tmp_path / "x.gz"
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_idx(path), np.arange(100))
    for content in (whole[:-20], whole[:40] + bytes(5) + whole[45:], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged.*download it again"):
            read_idx(path)


def test_what_is_said_of_a_folder_without_the_data(tmp_path):
    def said(split="train", folder=str(tmp_path)):
        with pytest.raises(UserError) as error:
            fashion_source(split, folder)
        return str(error.value)

    assert "config.data.dir is empty" in said(folder="") and "no split 'val'" in said("val")
    assert "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in" in said()
    fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(39, np.uint8)))
    assert "images [40, 28, 28] and labels [39]" in said("test")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.full(40, len(NAMES), np.uint8)))
    assert "up to 10" in said("test")
