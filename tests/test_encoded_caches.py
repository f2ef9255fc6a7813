"""Caches of encoded images: the same bytes whatever writes them and whenever it is killed, and nothing lost without a word."""

import dataclasses
import io
import json
import resource
import tarfile
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_sets
from ml_collections import ConfigDict
from PIL import Image

from mmdiff import encoded_caches
from mmdiff.data import encoded, shards
from mmdiff.data.encoded import EncodedCache
from mmdiff.data.latents import LatentSource
from mmdiff.data.modalities import Labels, Latents
from mmdiff.data.named_autoencoders import Autoencoder
from mmdiff.data.sources import load_all
from mmdiff.errors import UserError
from mmdiff.training import lock, run_metadata

MODALITIES = {"image": Latents(4, 4, 4, scale=0.5), "label": Labels(3)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """34 images of three classes, one of which is as large as 8 pixels; of 34 one is "val"."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(34):
        path = folder / ("val" if number == 33 else "train") / "bac"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8 + number % 5, 8 + number % 3, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Four images at once, mirrored, which four devices encode two at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded, "BATCH", 8)
        patch.setattr(Autoencoder, "part", 2)
        yield


def cache(autoencoder, images, **data):
    section = {"kind": "autoencoder_kl", "path": str(autoencoder[0])}
    return EncodedCache(ConfigDict({"set": "folder", "images": str(images), "dir": "", **data}), MODALITIES, [Autoencoder(section, 4)])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def alone(autoencoder, images, tmp_path_factory):
    """What one device writes, in seven shards."""
    out = tmp_path_factory.mktemp("alone") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda devices=jax.devices()[:1]: devices)
        assert encoded_caches.write(cache(autoencoder, images), out, ["train"], shard=10)
    return out


def test_eight_devices_that_are_killed_after_each_shard_write_the_bytes_of_one(autoencoder, images, alone, tmp_path, monkeypatch):
    assert len(jax.local_devices()) == 8
    whole, written = shards.write, []

    def killed(folder, number, arrays):
        if written:  # by turns before and after the arrays of the next shard, of which nothing says that it is whole
            if number % 2:
                whole(folder, number, arrays)
            raise KeyboardInterrupt
        written.append(number)
        return whole(folder, number, arrays)

    monkeypatch.setattr(shards, "write", killed)
    for number in range(6):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            encoded_caches.write(cache(autoencoder, images), tmp_path, ["train"], shard=10)
        assert written == [number] and not (tmp_path / "train").exists()
    written.clear()
    assert encoded_caches.write(cache(autoencoder, images), tmp_path, ["train"], shard=10)
    assert contents(tmp_path) == contents(alone) and len(contents(alone)) == 15 and written == [6]
    monkeypatch.setattr(Autoencoder, "encode", lambda *_: pytest.fail("it is there"))
    assert not encoded_caches.write(cache(autoencoder, images), tmp_path, ["train"], shard=10)


@pytest.mark.parametrize("file", ["image-00000.npy", "shard-00000.json"])
def test_shards_that_a_crash_cut_short_are_made_again(autoencoder, images, alone, tmp_path, monkeypatch, file):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoded_caches._Split, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        encoded_caches.write(cache(autoencoder, images), tmp_path, ["train"], shard=10)
    cut = tmp_path / ".train.partial/content" / file
    cut.write_bytes(cut.read_bytes()[:-20])
    assert encoded_caches.write(cache(autoencoder, images), tmp_path, ["train"], shard=10)
    assert contents(tmp_path) == contents(alone)


def test_what_cannot_be_a_cache_is_refused_before_anything_is_encoded(autoencoder, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Autoencoder, "encode", lambda *_: pytest.fail("it is to be refused"))
    for out in (images / "train/d", images):  # of which the next call would make a class
        with pytest.raises(UserError, match="whose folders are read as classes: write the cache elsewhere"):
            encoded_caches.write(cache(autoencoder, images), out)
    monkeypatch.setitem(MODALITIES, "label", Labels(2))
    with pytest.raises(UserError, match="has images of 3 classes, and the config's model takes 2"):
        encoded_caches.write(cache(autoencoder, images), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named(autoencoder, images, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))  # where a disk would end
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
            encoded_caches.write(cache(autoencoder, images), tmp_path / "out", ["train"], shard=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_statistics_are_those_of_what_is_stored(alone):
    meta = json.loads((alone / "train/meta.json").read_text())
    stored = np.concatenate([np.load(alone / f"train/image-{number:05d}.npy") for number in range(7)]).astype(np.float64).reshape(-1, 8)
    found = meta["statistics"]["image"]
    assert found["count"] == 66 * 16 == len(stored) and meta["lengths"] == [10] * 6 + [6] and meta["skipped"] == 0
    np.testing.assert_allclose(found["mean"], stored.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["std"], stored.std(0), rtol=1e-12)


def test_moments_merge_without_cancelling():
    x = 1e6 + np.random.default_rng(0).standard_normal((100, 3))
    count, mean, squares = shards.merged([shards.channel_moments(part) for part in (x[:0], x[:1], x[1:40], x[40:])])
    assert count == 100
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-15)
    np.testing.assert_allclose(squares, ((x - x.mean(0)) ** 2).sum(0), rtol=1e-8)


@pytest.fixture
def damaged(tmp_path):
    """100 images: one cut in half, one of 0 bytes, one that is a text; another is of the last shard, alone."""
    folder, rng = tmp_path / "damaged", np.random.default_rng(0)
    for number in range(100):
        path = folder / "train" / "abc"[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 9, 3), np.uint8)).save(path)
    paths = sorted(folder.glob("train/*/*.jpg"))
    paths[17].write_bytes(paths[17].read_bytes()[:300])
    paths[50].write_bytes(b"")
    paths[99].write_text("no image")
    return folder, paths


def test_damaged_images_are_left_out_and_counted_or_end_it(autoencoder, damaged, tmp_path):
    folder, paths = damaged
    with pytest.raises(UserError, match=r"3 of 100 images are damaged, more than config.data.max_skipped=2 allows") as refused:
        encoded_caches.write(cache(autoencoder, folder, max_skipped=2), tmp_path / "out", ["train"], shard=99)
    assert all(str(paths[i]) in str(refused.value) for i in (17, 50, 99)) and not (tmp_path / "out/train").exists()
    with pytest.raises(UserError, match="1 of 100 images is damaged, more than config.data.max_skipped=0 allows to leave out: .*"):
        encoded_caches.write(cache(autoencoder, folder), tmp_path / "out", ["train"], shard=99)
    assert encoded_caches.write(cache(autoencoder, folder, max_skipped=3), tmp_path / "out", ["train"], shard=99)
    out = tmp_path / "out/train"
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(each["index"], each["image"]) for each in listed] == [(i, str(paths[i])) for i in (17, 50, 99)]
    assert all("cannot be read as an image" in each["reason"] for each in listed)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["lengths"] == [97, 97, 0] and meta["skipped"] == 3
    found = load_all(LatentSource(tmp_path / "out", "train", MODALITIES))
    whole = cache(autoencoder, folder, max_skipped=3).source("train")
    kept = [i for i in range(100) if i not in (17, 50, 99)]
    np.testing.assert_array_equal(found["label"], np.repeat([int(paths[i].stem) % 3 for i in kept], 2))
    single = whole.encode(whole.read(36, 38))["image"]  # the images after a damaged one have not moved
    stored = np.load(out / "image-00000.npy")[34:36].astype(np.float32)
    np.testing.assert_allclose(stored, single, atol=2e-3, rtol=2e-3)


def test_every_kind_of_source_gives_the_same_latents(autoencoder, tmp_path):
    photos = [small_sets.picture(i) for i in range(6)]
    for i, photo in enumerate(photos):
        for name in (f"classes/train/{i}/a.jpg", f"captioned/train/{i}.jpg"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(photo)
        (tmp_path / f"captioned/train/{i}.txt").write_text("a caption")
    for kind, beside in (("cls", b"%d"), ("txt", b"caption %d")):
        (tmp_path / kind / "train").mkdir(parents=True)
        for shard in range(2):
            with tarfile.open(tmp_path / kind / f"train/{shard}.tar", "w") as tar:
                for i in range(3 * shard, 3 * shard + 3):
                    for name, content in ((f"{i}.jpg", photos[i]), (f"{i}.{kind}", beside % (7 * i))):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    (tmp_path / "classes/val/0").mkdir(parents=True)
    small_sets.prepare(small_sets.ImageNet, tmp_path / "tfds")
    found = {}
    for place, name in {"classes": "folder", "cls": "folder", "tfds": "imagenet2012", "captioned": "captioned", "txt": "captioned"}.items():
        source = cache(autoencoder, tmp_path / place, set=name)
        if name == "captioned":
            source = dataclasses.replace(source, modalities={"image": MODALITIES["image"]})
        else:
            source = dataclasses.replace(source, modalities=MODALITIES | {"label": Labels(1000)})
        assert encoded_caches.write(source, tmp_path / "out" / place, ["train"])
        stored = tmp_path / "out" / place / "train"
        found[place] = np.load(stored / "image-00000.npy")
        if name != "captioned":
            expected = np.repeat(np.arange(6) * (1 if place == "classes" else 7), 2)
            np.testing.assert_array_equal(np.load(stored / "label-00000.npy"), expected)
        np.testing.assert_array_equal(found[place], found["classes"])
    # Mirrored is the crop, not the image.
    source = cache(autoencoder, tmp_path / "classes").source("train")
    [view] = source.read(0, 2).views
    np.testing.assert_array_equal(view[1], view[0][:, ::-1])


def test_a_run_notes_its_cache_and_the_encoder(autoencoder, images, alone):
    meta, written = json.loads((alone / "train/meta.json").read_text()), cache(autoencoder, images)
    assert meta["images"] == written.source("train").images
    assert meta["encoders"]["image"]["fingerprint"] == written.encoders[0].fingerprint()
    used = dataclasses.replace(written, data=ConfigDict({**written.data, "dir": str(alone)}))
    experiment = SimpleNamespace(modalities=MODALITIES, **used.for_experiment)
    (alone.parent / "run").mkdir()
    run_metadata.write_dependencies(alone.parent / "run", experiment)
    noted = json.loads((alone.parent / "run/dependencies.json").read_text())
    assert noted == {"autoencoder": meta["encoders"]["image"]["fingerprint"]}
    source = LatentSource(alone, "train", MODALITIES)
    described = run_metadata.describe_data(experiment, source)
    assert described == {"fingerprint": source.fingerprint(), "classes": {"label": ["a", "b", "c"]}}


def test_a_cache_at_an_address_has_the_bytes_of_one_in_a_folder(autoencoder, images, alone, bucket, monkeypatch):
    out, whole, written = bucket / "cache", shards.write, []
    (out / "train").mkdir()
    (out / "train" / "image-00099.npy").write_bytes(b"of other images")

    def killed(folder, number, arrays):
        if written:
            whole(folder, number, {"image": arrays["image"]})
            raise KeyboardInterrupt
        written.append(number)
        return whole(folder, number, arrays)

    def write():
        return encoded_caches.write(cache(autoencoder, images), str(out), ["train"], shard=10)

    with pytest.raises(UserError, match=r"cache/train is there already \(it holds image-00099.npy\): choose another folder"):
        write()
    assert (out / "train").names() == {"image-00099.npy"}
    (out / "train/made_of.json").write_bytes(b'"other images"')
    monkeypatch.setattr(shards, "write", killed)
    for number in range(2):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            write()
        assert written == [number]
    with pytest.raises(UserError, match=r"cache/train is not finished \(it has no meta.json\)"):
        LatentSource(str(out), "train", MODALITIES)
    monkeypatch.setattr(shards, "write", whole)
    with lock.held_at(out / "train"), pytest.raises(UserError, match="cache/train is being written by process"):
        write()
    assert write()
    assert (out / "train").names() == {path.name for path in (alone / "train").iterdir()}
    for path in (alone / "train").iterdir():
        assert (out / "train" / path.name).read_bytes() == path.read_bytes()
    source, there = LatentSource(str(out), "train", MODALITIES), LatentSource(alone, "train", MODALITIES)
    source.verify()
    assert source.fingerprint() == there.fingerprint()
    jax.tree.map(np.testing.assert_array_equal, source.take(np.arange(66)), there.take(np.arange(66)))
    assert not write()
    monkeypatch.setattr(encoded_caches._Split, "identity", "that of other images")
    with pytest.raises(UserError, match="was written of other images, or by other encoders"):
        write()
