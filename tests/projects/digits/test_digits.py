import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mmdiff.errors import UserError
from mmdiff.projects.digits import digits
from mmdiff.projects.digits.digits import digits_source, digits_tokens, split_rows

READ = """
import sys
from mmdiff.projects.digits.digits import digits_source
print(*(len(digits_source(split, sys.argv[1])) for split in ("train", "validation", "test")))
assert "tensorflow" not in sys.modules and "jax" not in sys.modules, "a heavy import"
"""


def reader(data_dir):
    root = pathlib.Path(digits.__file__).parents[3]
    command = [sys.executable, "-c", READ, str(data_dir)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A copy prepared by two processes at the same time, neither of which needs TensorFlow."""
    folder = tmp_path_factory.mktemp("tfds")
    for process in [reader(folder), reader(folder)]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out == "1097 200 500\n"  # the counts, and nothing of TFDS's own
    assert [path.name for path in folder.iterdir()] == ["digits"]  # no partial copies stay behind
    return folder


def test_two_processes_at_once_and_no_tensorflow(data_dir):
    assert (data_dir / "digits" / "2.0.0" / "dataset_info.json").exists()


def test_split_is_stratified_and_complete():
    labels = np.repeat(np.arange(10), np.arange(100, 200, 10))
    rows = split_rows(labels, test=300, validation=7)
    assert list(rows) == ["train", "validation", "test"] and len(rows["test"]) == 300
    np.testing.assert_array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(len(labels)))
    assert np.bincount(labels[rows["validation"]]).tolist() == [7] * 10
    share = np.bincount(labels[rows["test"]]) - np.bincount(labels) * 300 / len(labels)
    assert np.abs(share).max() < 1


@pytest.mark.slow
def test_contents_are_scikit_learns_digits(data_dir):
    from sklearn.datasets import load_digits

    original = load_digits()
    rows = split_rows(original.target)
    for split, size in digits.SIZES.items():
        arrays = digits_source(split, data_dir).arrays
        assert arrays["image"].shape == (size, 8, 8, 1)
        assert arrays["image"].dtype == np.float32 and arrays["label"].dtype == np.int32
        assert arrays["image"].min() == -1 and arrays["image"].max() == 1
        np.testing.assert_array_equal((arrays["image"][..., 0] + 1) * 8, original.images[rows[split]])
        np.testing.assert_array_equal(arrays["label"], original.target[rows[split]])


def test_tokens_are_the_pixels_in_raster_order(data_dir):
    for split, size in digits.SIZES.items():
        images, tokens = digits_source(split, data_dir).arrays, digits_tokens(split, data_dir).arrays
        assert tokens["tokens"].shape == (size, 64) and tokens["tokens"].dtype == np.int32
        assert set(np.unique(tokens["tokens"])) == set(range(digits.LEVELS))
        np.testing.assert_array_equal(tokens["tokens"].reshape(size, 8, 8) / 8 - 1, images["image"][..., 0])
        np.testing.assert_array_equal(tokens["label"], images["label"])


def test_the_data_set_is_a_tfds_one_and_in_memory_after_the_first_read(data_dir):
    import tensorflow_datasets as tfds

    examples = tfds.data_source("digits", split="test", data_dir=str(data_dir), download=False)
    source = digits_source("test", data_dir)
    np.testing.assert_array_equal(examples[3]["image"] / 8.0 - 1, source.take([3])["image"][0])
    assert digits_source("test", data_dir) is source
    with pytest.raises(ValueError, match="read-only"):
        source.arrays["image"][0] = 0


@pytest.mark.parametrize("damage", ["no info", "cut", "other labels", "empty"])
def test_a_damaged_copy_is_replaced(damage, data_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    version = tmp_path / "digits" / "2.0.0"
    records = next(version.glob("digits-train*"))
    if damage == "no info":
        (version / "dataset_info.json").unlink()
    elif damage == "cut":
        records.write_bytes(records.read_bytes()[: records.stat().st_size // 2])
    elif damage == "other labels":
        shutil.copy(next(version.glob("digits-test*")), records)
    else:
        shutil.rmtree(version)
        version.mkdir()
    # A good copy stands in for two seconds of preparing, which the fixture has tested.
    monkeypatch.setattr(digits, "_prepare", lambda folder: shutil.copytree(data_dir, folder, dirs_exist_ok=True))
    assert len(digits_source("train", tmp_path)) == 1097
    digits._load.cache_clear()
    monkeypatch.setattr(digits, "_prepare", None)  # now the copy on disk must be whole
    assert len(digits_source("train", tmp_path)) == 1097
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_copy_of_an_older_version_is_left_alone(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    old = tmp_path / "digits" / "1.0.0"
    old.mkdir()
    (old / "dataset_info.json").write_text("of another version")
    assert [len(digits_source(split, tmp_path)) for split in digits.SIZES] == [1097, 200, 500]
    assert (old / "dataset_info.json").read_text() == "of another version"


def test_no_two_splits_share_an_image(data_dir):
    seen = [{image.tobytes() for image in digits_source(split, data_dir).arrays["image"]} for split in digits.SIZES]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_environment_names_the_folder(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert digits_source("test") is digits_source("test", data_dir)


def test_mistakes_of_the_user(tmp_path):
    with pytest.raises(UserError, match="no split 'valid'.*train, validation, test"):
        digits_source("valid", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="TFDS_DATA_DIR"):
        digits_source("test", tmp_path / "file")
