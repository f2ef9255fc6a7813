"""The fingerprint of a source: equal for equal data wherever they lie, another one for any other data."""

import io
import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import small_sets

from mmdiff.data.image_datasets import ImageDataset
from mmdiff.data.latents import LatentSource, write_latents
from mmdiff.data.modalities import Labels, Latents
from mmdiff.data.sources import HASHED, ArraySource, RandomSource, Subset, digest, fingerprint
from mmdiff.projects.dance.dance import DanceMusic
from mmdiff.projects.scenes.scenes import Scenes

X, Y = np.arange(24, dtype=np.float32).reshape(6, 4), np.arange(6, dtype=np.int32)


def arrays(**changes):
    return ArraySource({"x": X, "y": Y, **changes})


class Plain:
    """A user's source, without a fingerprint of its own."""

    def __init__(self, rows):
        self.rows = np.asarray(rows)

    def __len__(self):
        return len(self.rows)

    def take(self, indices):
        return {"x": self.rows[indices]}


DISTINCT = {
    "arrays": lambda: arrays(),
    "another value": lambda: arrays(x=X + np.eye(6, 4, dtype=np.float32)),
    "another type": lambda: arrays(y=Y.astype(np.int64)),
    "another order": lambda: arrays(x=X[::-1]),
    "another shape": lambda: arrays(x=X.reshape(6, 2, 2)),
    "another name": lambda: ArraySource({"z": X, "y": Y}),
    "more": lambda: ArraySource({"x": np.tile(X, (2, 1)), "y": np.tile(Y, 2)}),
    "made of something": lambda: ArraySource({"x": X, "y": Y}, "something"),
    "random": lambda: RandomSource({"image": Latents(4, 4, 2)}, 100),
    "random of another size": lambda: RandomSource({"image": Latents(4, 4, 2)}, 101),
    "random of another shape": lambda: RandomSource({"image": Latents(4, 4, 3)}, 100),
    "some": lambda: Subset(arrays(), 3),
    "scenes": lambda: Scenes("test", count=50),
    "other scenes": lambda: Scenes("held_out", count=50),
    "dances": lambda: DanceMusic("test", count=3),
    "other dances": lambda: DanceMusic("train", count=3),
    "a user's": lambda: Plain([1, 2, 3]),
    "a user's with another end": lambda: Plain([1, 2, 4]),
    "a user's of another length": lambda: Plain([1, 2, 2, 3]),
}


def test_other_examples_have_another_fingerprint():
    found = {name: fingerprint(make()) for name, make in DISTINCT.items()}
    assert len(set(found.values())) == len(found)
    assert all(value.startswith(f"{len(DISTINCT[name]())}-") for name, value in found.items())
    assert found == {name: fingerprint(make()) for name, make in DISTINCT.items()}


def test_it_is_the_same_in_another_process():
    command = (
        "import numpy as np; from mmdiff.data.sources import *; from mmdiff.data.modalities import Latents\n"
        "print(ArraySource({'y': np.arange(6, dtype=np.int32), 'x': np.arange(24, dtype=np.float32).reshape(6, 4)}).fingerprint())\n"
        "print(fingerprint(RandomSource({'image': Latents(4, 4, 2)}, 100)))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.split() == [fingerprint(arrays()), fingerprint(DISTINCT["random"]())], done.stderr
    assert fingerprint(arrays()) == "6-8a99fe196f66133b2e4d487753a675b0"  # and of every version: checkpoints hold it


def test_of_a_large_array_some_rows_are_read():
    large = np.zeros((HASHED // 2**10 + 1, 2**10), np.uint8)
    before = digest(len(large), large)
    large[-1, -1] = 1
    assert digest(len(large), large) != before


def folder(path):
    for number, name in enumerate(("train/ant/0.png", "train/bee/1.png", "train/bee/2.png", "val/ant/3.png")):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(small_sets.picture(number, "PNG"))
    return path, "folder"


def captioned(path):
    (path / "train").mkdir(parents=True)
    for i in range(3):
        (path / f"train/{i}.jpg").write_bytes(small_sets.picture(i))
        (path / f"train/{i}.txt").write_text(f"caption {i}")
    return path, "captioned"


def shards(path):
    (path / "train").mkdir(parents=True)
    with tarfile.open(path / "train/0.tar", "w") as tar:
        for i in range(3):
            for name, content in ((f"{i}.jpg", small_sets.picture(i)), (f"{i}.txt", f"caption {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path, "captioned"


@pytest.mark.parametrize("make", [folder, captioned, shards])
def test_a_folder_may_move_but_not_change(make, tmp_path):
    path, name = make(tmp_path / "first")
    before = fingerprint(ImageDataset(name, "train", path, 8))
    moved = shutil.copytree(path, tmp_path / "elsewhere/moved", copy_function=shutil.copyfile)  # other times, too
    assert fingerprint(ImageDataset(name, "train", moved, 8)) == before
    if make is shards:
        shutil.copyfile(moved / "train/0.tar", moved / "train/1.tar")
    else:
        file = sorted(moved.rglob("*.jpg" if make is captioned else "*.png"))[0]
        file.write_bytes(file.read_bytes() + b"\0")
        assert fingerprint(ImageDataset(name, "train", moved, 8)) != before  # a file of another size
        shutil.copyfile(path / file.relative_to(moved), file)
        assert fingerprint(ImageDataset(name, "train", moved, 8)) == before
        file.rename(file.with_stem("another"))
        if make is captioned:
            file.with_suffix(".txt").rename(file.with_stem("another").with_suffix(".txt"))
    assert fingerprint(ImageDataset(name, "train", moved, 8)) != before


def test_a_cache_of_latents_is_its_manifest(tmp_path):
    modalities = {"image": Latents(2, 2, 1), "label": Labels(3)}
    batch = {"image": np.ones((5, 2, 2, 1), np.float32), "label": np.zeros(5, np.int32)}
    found = []
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        write_latents(tmp_path / name, "train", [{**batch, "image": value * batch["image"]}], modalities, shard=3)
        found.append(fingerprint(LatentSource(tmp_path / name, "train", modalities)))
    assert found[0] == found[1] != found[2]
    assert json.loads((tmp_path / "a/train/meta.json").read_text())["lengths"] == [3, 2]
