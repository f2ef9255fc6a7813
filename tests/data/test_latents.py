"""The latent cache: what goes in comes out, and nothing damaged is taken for data."""

import json

import ml_collections
import numpy as np
import pytest

from mmdiff.data import latents
from mmdiff.data.latents import LatentSource, open_source, write_latents
from mmdiff.data.modalities import Features, Labels, Latents
from mmdiff.data.shards import read_meta
from mmdiff.data.sources import RandomSource, load_all
from mmdiff.errors import UserError

MODALITIES = {"image": Latents(4, 4, 2), "label": Labels(10)}
COUNT = 25


def examples(count=COUNT, seed=0):
    rng = np.random.default_rng(seed)
    return {name: modality.random(rng, count) for name, modality in MODALITIES.items()}


def in_batches(data, *ends):
    starts = (0, *ends)
    return [{name: array[a:b] for name, array in data.items()} for a, b in zip(starts, (*ends, len(data["label"])))]


@pytest.fixture
def cache(tmp_path):
    assert write_latents(tmp_path, "train", in_batches(examples(), 3, 20), MODALITIES, shard=8) == COUNT
    return tmp_path


def refusal(call, *args, **options):
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_goes_in_comes_out(cache):
    source, data = LatentSource(cache, "train", MODALITIES), examples()
    assert len(source) == COUNT and len(list((cache / "train").glob("image-*.npy"))) == 4  # 8 + 8 + 8 + 1
    every = load_all(source)
    assert {name: array.dtype for name, array in every.items()} == {"image": np.float32, "label": np.int32}
    np.testing.assert_array_equal(every["image"], data["image"].astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(every["label"], data["label"])
    order = np.array([24, 0, 7, 8, 0, 23, 16])  # across shards, with a repeat
    taken = source.take(order)
    for name in data:
        np.testing.assert_array_equal(taken[name], every[name][order])
    assert {name: array.shape for name, array in source.take(np.array([], int)).items()} == {"image": (0, 4, 4, 2), "label": (0,)}
    for wrong in (-1, COUNT):
        with pytest.raises(IndexError):
            source.take(np.array([wrong]))
    source.verify()


@pytest.mark.parametrize("ends, shard", [((), 8), ((5, 10, 15), 5), ((1, 2), 100), ((24,), 25)])
def test_neither_batches_nor_shards_matter(ends, shard, cache, tmp_path):
    write_latents(tmp_path / "other", "train", in_batches(examples(), *ends), MODALITIES, shard=shard)
    one, other = (load_all(LatentSource(folder, "train", MODALITIES)) for folder in (cache, tmp_path / "other"))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_cache_that_is_not_there_or_not_finished(cache, tmp_path):
    assert "does not exist" in refusal(LatentSource, cache, "val", MODALITIES)

    def broken():
        yield {name: array[:20] for name, array in examples().items()}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path / "cut", "train", broken(), MODALITIES, shard=8)
    assert "is not finished" in refusal(LatentSource, tmp_path / "cut", "train", MODALITIES)
    write_latents(tmp_path / "cut", "train", [examples()], MODALITIES, shard=16)  # the same call again
    assert len(load_all(LatentSource(tmp_path / "cut", "train", MODALITIES))["label"]) == COUNT
    assert "holds a finished cache" in refusal(write_latents, cache, "train", [examples()], MODALITIES)
    assert "mount the bucket" in refusal(LatentSource, "gs://bucket/latents", "train", MODALITIES)


def test_a_cache_of_something_else(cache):
    other = {"image": Latents(4, 4, 4), "label": Labels(10)}
    assert "'channels': 2" in refusal(LatentSource, cache, "train", other)
    assert "'scale': 0.18215" in refusal(LatentSource, cache, "train", MODALITIES | {"image": Latents(4, 4, 2, scale=0.13025)})
    assert "{'count': 1000}" in refusal(LatentSource, cache, "train", MODALITIES | {"label": Labels(1000)})
    assert "holds text=None, but the config needs {'count': 3}" in refusal(LatentSource, cache, "train", MODALITIES | {"text": Labels(3)})
    LatentSource(cache, "train", MODALITIES | {"label": Labels(10, names=[f"class {i}" for i in range(10)])})  # names may differ


def test_damaged_shards(cache):
    shard = cache / "train" / "image-00001.npy"
    good = shard.read_bytes()

    shard.write_bytes(good[:-10])
    assert "image-00001.npy is missing or cut short" in refusal(LatentSource, cache, "train", MODALITIES)
    shard.unlink()
    assert "image-00001.npy is missing or cut short" in refusal(LatentSource, cache, "train", MODALITIES)
    np.save(shard, np.zeros((8, 4, 2, 4), np.float16))
    assert "holds float16 [8, 4, 2, 4], not [8, 4, 4, 2]" in refusal(LatentSource, cache, "train", MODALITIES)

    array = np.load(cache / "train" / "image-00000.npy").copy()
    array[3, 1, 2, 0] = np.nan
    np.save(shard, array)
    source = LatentSource(cache, "train", MODALITIES)
    assert "image 11 in" in refusal(source.take, np.arange(8, 16))  # 8 + 3
    assert "image-00001.npy is not what was written" in refusal(source.verify)
    source.take(np.arange(8))

    shard.write_bytes(good)
    LatentSource(cache, "train", MODALITIES).verify()
    labels = cache / "train" / "label-00002.npy"
    np.save(labels, np.full(8, 10, np.int32))
    assert "labels are 0..9" in refusal(LatentSource, cache, "train", MODALITIES)
    meta = json.loads((cache / "train" / "meta.json").read_text())
    kinds = ("lengths", "modalities", "sha256", "moments", "encoders", "names")
    others = [{name: value} for name in kinds for value in (None, 5, "x", {"image": 5}) if (name, value) != ("sha256", {"image": 5})]
    for other in ({"format": 2}, *others):
        (cache / "train" / "meta.json").write_text(json.dumps(meta | other))
        assert "cannot be read" in refusal(LatentSource, cache, "train", MODALITIES) and read_meta(cache, "train") is None
    (cache / "train" / "meta.json").write_text(json.dumps({"format": 1}))
    assert "cannot be read" in refusal(LatentSource, cache, "train", MODALITIES)


def test_examples_that_cannot_be_written(tmp_path):
    def write(**changes):
        return refusal(write_latents, tmp_path, "train", [examples() | changes], MODALITIES)

    assert "nothing to write" in refusal(write_latents, tmp_path, "train", [], MODALITIES)
    assert "not finite" in write(image=np.full((COUNT, 4, 4, 2), np.nan, np.float32))
    assert "do not fit float16" in write(image=np.full((COUNT, 4, 4, 2), 1e5, np.float32))
    assert "need the shape [n, 4, 4, 2]" in write(image=np.zeros((COUNT, 4, 4, 3), np.float32))
    assert "labels are 0..9" in write(label=np.full(COUNT, 10))
    assert "different lengths" in write(label=np.zeros(3, int))


def test_what_a_config_may_name(cache):
    def data(source, folder=""):
        return ml_collections.ConfigDict({"source": source, "dir": str(folder)})

    assert len(open_source(data("latents", cache), "train", MODALITIES)) == COUNT
    made_up = open_source(data("random"), "train", MODALITIES)
    assert isinstance(made_up, RandomSource) and len(made_up) == latents.IMAGENET
    assert "config.data.dir is empty" in refusal(open_source, data("latents"), "train", MODALITIES)
    assert "must be encoded first" in refusal(open_source, data("tfds"), "train", MODALITIES)
    assert "choose latents, random or tfds" in refusal(open_source, data("imagenet"), "train", MODALITIES)


def test_a_cache_written_without_a_length_opens_where_one_is_asked_for(tmp_path):
    vectors = 3 * np.eye(4, dtype=np.float32)
    write_latents(tmp_path, "train", [{"query": vectors}], {"query": Features(4, "query")})
    source = LatentSource(tmp_path, "train", {"query": Features(4, "query", norm=1.0)})  # the process refuses its vectors
    np.testing.assert_array_equal(source.take(np.arange(4))["query"], vectors)
    with pytest.raises(UserError, match="query: vectors must have the length 1, got 3 to 3: divide"):
        write_latents(tmp_path, "val", [{"query": vectors}], {"query": Features(4, "query", norm=1.0)})
