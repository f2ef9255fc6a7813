"""The token cache: what goes in comes out, images come back from the folder alone, and half a cache is none."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from mmdiff.data import Labels, TokenImages, drafts, network_cache
from mmdiff.data.network_cache import CacheWriter
from mmdiff.data.sources import ArraySource, load_all
from mmdiff.data.token_cache import decoder, read_meta, token_source
from mmdiff.errors import UserError
from mmdiff.nets.tokenizers import VQAutoencoder

NET = VQAutoencoder(8, 8, 3, codes=16, code_size=4, features=8, decoder_blocks=1)
COUNTS = {"train": 21, "test": 5}
MADE_BY = {"config": {"seed": 0}, "step": 7}


def pictures(split):
    rng = np.random.default_rng(COUNTS[split])
    n = COUNTS[split]
    images = rng.uniform(-1, 1, (n, 8, 8, 3)).astype(np.float32)
    return {"image": images, "text": rng.integers(0, 9, (n, 4), np.int32), "label": np.arange(n, dtype=np.int32)}


RECIPE = CacheWriter(NET, {split: lambda split=split: ArraySource(pictures(split)) for split in COUNTS})


def apply(method, params, x):
    return jax.jit(lambda params, x: NET.apply(params, x, method=method))(params, x)


@pytest.fixture(scope="module")
def params():
    return jax.jit(NET.init)(jax.random.key(0), pictures("test")["image"])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(network_cache, "PART", 8)


@pytest.fixture
def cache(tmp_path, params):
    assert RECIPE.write(tmp_path / "deep" / "cache", params, MADE_BY)
    return tmp_path / "deep" / "cache"


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in pathlib.Path(folder).rglob("*") if path.is_file()}


def test_what_goes_in_comes_out(cache, params):
    meta = read_meta(cache)
    assert (meta["grid"], meta["codes"], meta["step"], meta["config"]) == ([4, 4], 16, 7, {"seed": 0})
    for split in COUNTS:
        source, data = token_source(cache, split), pictures(split)
        assert len(source) == COUNTS[split] and isinstance(source.arrays["tokens"], np.memmap)
        found = load_all(source)
        assert set(found) == {"tokens", "text", "label"} and {array.dtype for array in found.values()} == {np.dtype(np.int32)}
        np.testing.assert_array_equal(found["tokens"], apply("encode", params, data["image"]))
        for name in ("text", "label"):
            np.testing.assert_array_equal(found[name], data[name])
        some = source.take(np.array([4, 0, 4]))
        np.testing.assert_array_equal(some["tokens"], found["tokens"][[4, 0, 4]])
        assert not isinstance(some["tokens"], np.memmap)
    assert os.listdir(cache.parent) == ["cache"]


def test_pictures_come_back_from_the_folder_alone(cache, params, tmp_path):
    moved = shutil.move(cache, tmp_path / "elsewhere")
    decode = decoder(moved)
    for split in COUNTS:
        ids = load_all(token_source(moved, split))["tokens"]
        images = decode(ids)
        assert images.dtype == np.float32 and images.shape == (COUNTS[split], 8, 8, 3)
        np.testing.assert_allclose(images, apply("decode", params, ids), rtol=1e-5, atol=1e-6)
    assert decode(ids[:0]).shape == (0, 8, 8, 3)


def test_the_same_cache_is_not_written_twice(cache, params):
    before = files(cache)
    assert not RECIPE.write(cache, params, MADE_BY)
    assert not RECIPE.write(cache, params, MADE_BY, ["test"])
    assert files(cache) == before


def test_a_cache_from_before_a_field_of_the_network_is_the_same(cache, params):
    meta = json.loads((cache / "cache.json").read_text())
    del meta["net"]["multipliers"]
    (cache / "cache.json").write_text(json.dumps(meta))
    assert not RECIPE.write(cache, params, MADE_BY)
    meta["net"]["features"] += 8
    (cache / "cache.json").write_text(json.dumps(meta))
    assert "holds the tokens of other weights" in refusal(RECIPE.write, cache, params, MADE_BY)


def test_some_splits(tmp_path, params):
    assert RECIPE.write(tmp_path / "cache", params, MADE_BY, ["test"])
    assert len(token_source(tmp_path / "cache", "test")) == 5
    assert "has no split 'train', only test" in refusal(token_source, tmp_path / "cache", "train")
    assert "has no split 'validation', only test: write a new one elsewhere, or train without evaluations" in refusal(
        token_source, tmp_path / "cache", "validation")  # one that is older than the split
    expected = {"tokens": TokenImages(*NET.grid, NET.codes), "caption": Labels(5)}
    assert "cache has no caption: it holds text, label, tokens." in refusal(token_source, tmp_path / "cache", "test", expected)
    assert "written without the split 'train'" in refusal(RECIPE.write, tmp_path / "cache", params, MADE_BY)
    assert "choose among train, test" in refusal(RECIPE.write, tmp_path / "new", params, MADE_BY, ["val"])
    assert not (tmp_path / "new").exists()


def test_nothing_else_is_overwritten(cache, params, tmp_path):
    other = jax.tree.map(lambda x: x + 1e-3, params)
    assert "holds the tokens of other weights (step 7)" in refusal(RECIPE.write, cache, other, MADE_BY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear")
    assert "there is no token cache in" in refusal(RECIPE.write, tmp_path / "mine", params, MADE_BY)
    assert "there is no token cache in" in refusal(RECIPE.write, tmp_path / "mine" / "notes.txt", params, MADE_BY)
    (tmp_path / "empty").mkdir()
    assert RECIPE.write(tmp_path / "empty", params, MADE_BY)


def test_a_cache_that_is_not_there_says_what_makes_it(tmp_path):
    for call in (lambda: token_source(tmp_path / "none", "train"), lambda: decoder(tmp_path / "none")(np.zeros((1, 16), int))):
        assert f"--workdir RUN --out {tmp_path / 'none'}" in refusal(call)
    decoder(tmp_path / "none")  # naming it is no mistake yet


class Breaks(ArraySource):
    """A source that fails when half of it is read."""

    def take(self, indices):
        if indices.min() > 0:
            raise KeyboardInterrupt
        return super().take(indices)


def test_an_interrupted_cache_leaves_nothing(tmp_path, params):
    recipe = CacheWriter(NET, {**RECIPE.splits, "test": RECIPE.splits["test"], "more": lambda: Breaks(pictures("train"))})
    with pytest.raises(KeyboardInterrupt):
        recipe.write(tmp_path / "cache", params, MADE_BY)
    assert os.listdir(tmp_path) == []
    assert RECIPE.write(tmp_path / "cache", params, MADE_BY)


class Counts(ArraySource):
    """A source that knows which of it has been taken."""

    def __init__(self, arrays):
        super().__init__(arrays)
        object.__setattr__(self, "taken", [])

    def take(self, indices):
        self.taken.extend(np.asarray(indices).tolist())
        return super().take(indices)


def killed(monkeypatch, folder, recipe, params):
    """What is left by a process that is killed while it writes a cache."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)  # nothing tidies up after a kill
        recipe.write(folder, params, {})


def test_a_killed_cache_is_continued(cache, tmp_path, params, monkeypatch):
    sources = {split: Counts(pictures(split)) for split in ("test", "train")}
    recipe = CacheWriter(NET, {"test": lambda: sources["test"], "train": lambda: sources["train"]})
    breaks = CacheWriter(NET, {"test": recipe.splits["test"], "train": lambda: Breaks(pictures("train"))})
    killed(monkeypatch, tmp_path / "again", breaks, params)
    assert (tmp_path / ".again.partial").exists() and sources["test"].taken == list(range(5))
    assert recipe.write(tmp_path / "again", params, MADE_BY)
    assert sources["test"].taken == list(range(5)) and sources["train"].taken == list(range(8, 21))  # what was there is not read again
    assert not (tmp_path / ".again.partial").exists()
    names = [{path.relative_to(place) for path in files(place)} for place in (tmp_path / "again", cache)]
    assert names[0] == names[1]
    for split in COUNTS:
        for name, array in token_source(cache, split).arrays.items():
            np.testing.assert_array_equal(token_source(tmp_path / "again", split).arrays[name], array)


def test_what_a_killed_cache_of_other_data_has_left_is_removed(tmp_path, params, monkeypatch):
    killed(monkeypatch, tmp_path / "cache", CacheWriter(NET, {"train": lambda: Breaks(pictures("train"))}), params)
    (tmp_path / ".cache-a1_b2c3d/cache/train").mkdir(parents=True)  # of an earlier version
    other = Counts({name: array[::-1] for name, array in pictures("train").items()})
    assert CacheWriter(NET, {"train": lambda: other}).write(tmp_path / "cache", params, MADE_BY)
    assert other.taken == list(range(21)) and os.listdir(tmp_path) == ["cache"]


def test_one_process_writes_a_cache(tmp_path, params):
    with drafts.draft(tmp_path / "cache", [1]) as draft:
        (draft / "x").write_text("mine")
        assert "another process is writing" in refusal(RECIPE.write, tmp_path / "cache", params, MADE_BY)
    assert (tmp_path / "cache/x").read_text() == "mine"


def test_a_full_disk(tmp_path, params, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert "cannot be written (No space left on device)" in refusal(RECIPE.write, tmp_path / "cache", params, MADE_BY)
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
import jax
import test_token_cache as t
class Kills(t.ArraySource):
    def take(self, indices):
        if indices.min() > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().take(indices)
t.network_cache.PART = 8
params = jax.jit(t.NET.init)(jax.random.key(0), t.pictures("test")["image"])
t.CacheWriter(t.NET, {"test": t.RECIPE.splits["test"],
    "train": lambda: Kills(t.pictures("train"))}).write(sys.argv[1], params, {})
"""


@pytest.mark.slow
def test_a_killed_cache_is_no_cache_and_the_same_call_makes_it(tmp_path, params):
    here = pathlib.Path(__file__).resolve()
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "cache", here.parents[2], here.parent], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert list(tmp_path.rglob("tokens.npy")) and not (tmp_path / "cache").exists()  # it had begun
    assert "there is no token cache" in refusal(token_source, tmp_path / "cache", "train")
    assert RECIPE.write(tmp_path / "cache", params, MADE_BY)
    assert len(token_source(tmp_path / "cache", "train")) == 21


def test_damaged_files(cache):
    def damage(name, content):
        good = (cache / name).read_bytes()
        (cache / name).write_bytes(content(good))
        return good

    good = damage("train/tokens.npy", lambda b: b[:-10])
    assert "tokens.npy is missing or cut short" in refusal(token_source, cache, "train")
    np.save(cache / "train" / "tokens.npy", np.zeros((21, 9), np.int32))
    assert "is not the int32 [21, 16] that was written" in refusal(token_source, cache, "train")
    (cache / "train/tokens.npy").write_bytes(good)
    token_source(cache, "train")

    with np.load(cache / "weights.npz") as stored:
        weights = dict(stored)
    np.savez(cache / "weights.npz", **weights | {"params/codebook": weights["params/codebook"] + 1})
    assert "is not what was written" in refusal(decoder(cache), np.zeros((1, 16), int))
    (cache / "weights.npz").unlink()
    assert "weights.npz cannot be read" in refusal(decoder(cache), np.zeros((1, 16), int))
    damage("cache.json", lambda b: b[:50])
    assert "cannot be read" in refusal(token_source, cache, "train")
