"""A folder of towers: whole or refused, and the same vectors whoever asks."""

import json
import shutil

import jax
import numpy as np
import pytest

from mmdiff import nets
from mmdiff.data import bpe, network_cache, tower_cache
from mmdiff.data.network_cache import TOWERS, CacheWriter, read_tokenizer
from mmdiff.data.sources import ArraySource, load_all
from mmdiff.data.tower_cache import Towers, WithTextEmbedding
from mmdiff.errors import UserError

CAPTIONS = ["a red square", "a blue circle", "a green square on a red one"]
TOKENIZER = bpe.train(CAPTIONS, 10, 300)
NET = nets.TwoTowers(nets.Patches(4, 4, 3, 2), TOKENIZER.size, TOKENIZER.length, size=6,
    depth=1, width=8, text_depth=1, text_width=8, heads=2)
RECIPE = CacheWriter(NET, tokenizer=lambda: TOKENIZER)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (5, 4, 4, 3)).astype(np.float32)


def new(seed):
    shapes = jax.eval_shape(NET.init, jax.random.key(0), {"image": IMAGES, "text": TOKENIZER.encode(CAPTIONS)}, {})
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.normal(size=shape.shape, scale=0.3).astype(np.float32), shapes)


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_cache, "PART", 4)
        yield


@pytest.fixture(scope="module")
def params():
    return new(0)


@pytest.fixture(scope="module")
def written(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers") / "own"
    assert RECIPE.write(folder, params, {"config": {"seed": 0}, "step": 7})
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def refused(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


def test_what_is_written_is_read(written, params):
    assert {path.name for path in written.iterdir()} == {"weights.npz", "words.json", "towers.json"}
    assert {path.name for path in written.parent.iterdir()} == {"own"}
    own, ids = Towers(str(written)), TOKENIZER.encode(CAPTIONS)
    states, vectors = own.texts(ids)
    expected_states, expected = jax.jit(lambda: NET.apply(params, ids, method="encode_text"))()
    np.testing.assert_allclose(states, expected_states, atol=1e-5)
    np.testing.assert_allclose(vectors, unit(expected), atol=1e-5)
    np.testing.assert_allclose(own.encode(CAPTIONS), vectors, atol=1e-6)
    np.testing.assert_allclose(own.images(IMAGES), unit(jax.jit(lambda: NET.apply(params, IMAGES, method="encode_image"))()), atol=1e-5)
    assert (states.shape, vectors.shape, own.images(IMAGES).dtype) == ((3, 10, 8), (3, 6), np.float32)
    assert read_tokenizer(written, TOWERS) == TOKENIZER
    meta = json.loads((written / "towers.json").read_text())
    assert (meta["step"], meta["config"], meta["net"]["size"]) == (7, {"seed": 0}, 6)


def test_older_towers_keep_the_epsilon_they_were_trained_with(folder):
    meta = json.loads((folder / "towers.json").read_text())
    assert meta["net"].pop("norm_eps") == 1e-5
    (folder / "towers.json").write_text(json.dumps(meta))
    assert tower_cache._opened(str(folder))[0].norm_eps == 1e-6


def test_any_number_of_texts(written):
    own, ids = Towers(str(written)), TOKENIZER.encode(CAPTIONS)
    assert [array.shape for array in own.texts(ids[:0])] == [(0, 10, 8), (0, 6)]
    for many, few in zip(own.texts(np.tile(ids, (3, 1))), own.texts(ids)):
        np.testing.assert_allclose(many, np.concatenate([few] * 3), atol=1e-6)


def test_an_absent_text_has_no_direction(written):
    states, vectors = Towers(str(written)).texts(np.zeros((1, 10), np.int32))
    assert not states.any() and not vectors.any()


def test_the_same_towers_are_written_once(folder, params):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not RECIPE.write(folder, params, {"step": 8})
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert RECIPE.holds(folder, 7) == "the towers of step 7"


def test_what_write_refuses(folder, params, tmp_path):
    assert f"{folder} holds the towers of other weights (step 7)" in refused(RECIPE.write, folder, new(1), {"step": 9})
    assert "leave out --split test" in refused(RECIPE.write, tmp_path / "new", params, {}, ["test"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    assert f"there are no towers in {tmp_path / 'other'}" in refused(RECIPE.write, tmp_path / "other", params, {})
    (tmp_path / "file").write_text("mine")
    assert "there are no towers in" in refused(RECIPE.write, tmp_path / "file", params, {})
    assert "cannot be written" in refused(RECIPE.write, tmp_path / "file/towers", params, {})
    (tmp_path / "empty").mkdir()
    assert RECIPE.write(tmp_path / "empty", params, {})
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "other", "file", "empty"}


def test_an_interrupted_write_leaves_no_towers(params, tmp_path):
    def breaks():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CacheWriter(NET, tokenizer=breaks).write(tmp_path / "new", params, {})
    assert not list(tmp_path.iterdir())


def test_damaged_files(written, folder):
    def damaged(name, content):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(content(good))
        said = refused(Towers(str(folder)).encode, CAPTIONS)
        (folder / name).write_bytes(good)
        return said

    assert "weights.npz cannot be read" in damaged("weights.npz", lambda good: good[:-30])
    assert "weights.npz cannot be read" in damaged("weights.npz", lambda good: b"")
    assert "towers.json cannot be read" in damaged("towers.json", lambda good: good[:40])
    assert "towers.json cannot be read" in damaged("towers.json", lambda good: b"{}")
    assert "have the format 2, not 1" in damaged("towers.json", lambda good: good.replace(b'"format": 1', b'"format": 2'))
    with np.load(folder / "weights.npz") as stored:
        weights = dict(stored)
    np.savez(folder / "weights.npz", **weights | {"params/logit_bias": weights["params/logit_bias"] + 1})
    assert "weights.npz is not what was written" in refused(Towers(str(folder)).images, IMAGES)
    (folder / "weights.npz").unlink()
    assert "weights.npz cannot be read" in refused(Towers(str(folder)).images, IMAGES)
    shutil.copy(written / "weights.npz", folder)
    assert "words.json cannot be read" in damaged("words.json", lambda good: good[:40])
    assert "words.json cannot be read" in damaged("words.json", lambda good: b"{}")
    missing = refused(Towers(str(folder / "none")).encode, CAPTIONS)
    assert "there are no towers in" in missing and "configs/diffdis/scenes_towers.py" in missing


def test_towers_of_other_sizes(written):
    own = Towers(str(written))
    own.check(6)
    assert "have vectors of 6 numbers, but the config needs 7:" in refused(own.check, 7)
    assert "encode texts of 10 ids, not [9]" in refused(own.texts, np.zeros((2, 9), np.int32))
    assert "encode images of [4, 4, 3], not [8, 8, 3]" in refused(own.images, np.zeros((2, 8, 8, 3), np.float32))


class Counted:
    """Towers that note what they read."""

    def __init__(self, towers):
        self.towers, self.read, self.check = towers, [], towers.check

    def texts(self, ids):
        self.read.append(ids)
        return self.towers.texts(ids)


def source(count):
    ids = TOKENIZER.encode(CAPTIONS)[np.arange(count) % 3]
    return ArraySource({"image": np.arange(count), "text": ids, "label": np.arange(count) % 3})


def test_described_gives_every_text_its_vector(written):
    own, given = Towers(str(written)), source(2500)
    counted = Counted(own)
    described = WithTextEmbedding(given, counted, 6)
    assert len(described) == 2500
    expected = own.texts(TOKENIZER.encode(CAPTIONS))[1]
    found = described.take(np.array([2, 0, 2499, 0]))
    which = np.array([2, 0, 2499 % 3, 0])
    np.testing.assert_allclose(found["query"], expected[which], atol=1e-6)
    np.testing.assert_array_equal(found["text"], TOKENIZER.encode(CAPTIONS)[which])
    np.testing.assert_array_equal(found["label"], which)
    np.testing.assert_array_equal(found["image"], [2, 0, 2499, 0])
    assert [ids.shape for ids in counted.read] == [(3, 10)]  # each text once
    np.testing.assert_array_equal(load_all(described)["label"], np.arange(2500) % 3)
    assert len(counted.read) == 1
