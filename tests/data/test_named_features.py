"""Features of an image's patches: of the crop that its latents have, mirrored where these are, whole or as principal components."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_encoders
from ml_collections import ConfigDict
from PIL import Image

from mmdiff import encoded_caches
from mmdiff.data import Autoencoder, EncodedCache, EncodedMaps, ImagePatches
from mmdiff.data.latents import LatentSource
from mmdiff.data.sources import load_all
from mmdiff.encoders import preprocessing
from mmdiff.encoders.dinov2 import DINOv2, bicubic
from mmdiff.errors import UserError

SIDE, GRID, SIZE = 8, 3, 6  # of latents (16 pixels), patches and features

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """(folder, network, parameters) of one that takes 12 pixels, positions of 2 x 2 patches of 4."""
    net = DINOv2(hidden_size=SIZE, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, mlp_ratio=1)
    return tiny_encoders.publish(tmp_path_factory.mktemp("dino") / "dinov2", net)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(9):
        path = folder / ("val" if number == 8 else "train") / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16 + number, 20, 3), np.uint8)).save(path)
    return folder


def encoder(dino, autoencoder, folder="", side=GRID, **section):
    crop = Autoencoder({"kind": "autoencoder_kl", "path": str(autoencoder[0])}, SIDE)
    section = {"kind": "dinov2", "path": str(dino[0]), "size": SIZE, **section}
    return ImagePatches(section, crop, GRID, side, folder)


def cache(patches, images, mirrored=True):
    maps = EncodedMaps(patches.side, patches.side, patches.channels, encoder=patches)
    return EncodedCache(ConfigDict({"set": "folder", "images": str(images), "dir": ""}), {"features": maps}, [patches], mirrored)


@pytest.fixture(scope="module")
def by_hand(dino, images):
    """Features [2 n, GRID, GRID, SIZE] of the training images' crops, each as it is and mirrored, resized as PyTorch resizes tensors."""
    _, net, params = dino
    crops = [np.asarray(preprocessing.Preprocessing(16, "adm").resized(Image.open(path))) for path in sorted(images.glob("train/*/*"))]
    pixels = np.stack([view for crop in crops for view in (crop, crop[:, ::-1])]) / 255.0
    matrix = bicubic(16, 12, 16 / 12)
    mean, std = (preprocessing.IMAGENET_STATISTICS[name] for name in ("mean", "std"))
    views = np.einsum("oi,pj,nijc->nopc", matrix, matrix, (pixels - mean) / std).astype(np.float32)
    net = net.clone(position_interpolation="antialiased")
    return np.asarray(jax.jit(net.apply)({"params": params}, views)["patches"]).reshape(-1, GRID, GRID, SIZE)


def test_all_features_are_those_of_the_crop_and_of_its_mirror_image(dino, autoencoder, images, by_hand, tmp_path):
    patches = encoder(dino, autoencoder)
    written = cache(patches, images)
    assert encoded_caches.write(written, tmp_path / "cache")
    found = load_all(LatentSource(tmp_path / "cache", "train", written.modalities))["features"]
    np.testing.assert_allclose(found, by_hand, atol=4e-3, rtol=2e-3)  # float16
    assert np.abs(by_hand[1::2] - by_hand[::2, :, ::-1]).max() > 0.1  # of the mirrored image, not mirrored features
    meta = json.loads((tmp_path / "cache/train/meta.json").read_text())
    assert meta["encoders"]["features"]["kind"] == "dinov2" and not (tmp_path / "cache/components.json").exists()
    parsed = written.modalities["features"].parse(str(images / "train/a"))
    np.testing.assert_allclose(parsed, by_hand[::2], atol=1e-4, rtol=1e-4)
    assert written.modalities["features"].show(parsed).shape == (8, GRID, GRID, 3)
    with pytest.raises(UserError, match="has features of 6 numbers, but the config needs 7: set config.feature_encoder.size"):
        encoder(dino, autoencoder, size=7).encode(np.zeros((1, 16, 16, 3), np.float32))


def test_components_are_those_of_the_training_images_and_lie_with_the_cache(dino, autoencoder, images, by_hand, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    patches = encoder(dino, autoencoder, out, side=2 * GRID, components=2, whiten=True)
    written = cache(patches, images, mirrored=False)
    with pytest.raises(UserError, match=r"components.json of a cache has the components .* name the cache's folder by config.data.dir"):
        patches.encode(np.zeros((1, 16, 16, 3), np.float32))
    assert encoded_caches.write(written, out, ["train"])
    rows = by_hand[::2].reshape(-1, SIZE).astype(np.float64)
    standard = (rows - rows.mean(0)) / rows.std(0)
    _, values, directions = np.linalg.svd(standard, full_matrices=False)
    directions *= np.sign(directions[np.arange(SIZE), np.abs(directions).argmax(1)])[:, None]
    expected = standard @ directions[:2].T / (values[:2] / len(rows) ** 0.5)  # of mean 0 and deviation 1, uncorrelated
    maps = expected.reshape(-1, GRID, GRID, 2)
    finer = np.asarray(jax.image.resize(maps, (len(maps), 2 * GRID, 2 * GRID, 2), "linear"))
    np.testing.assert_allclose(load_all(LatentSource(out, "train", written.modalities))["features"], finer, atol=5e-3)
    stored = json.loads((out / "components.json").read_text())
    np.testing.assert_allclose(stored["explained"], values[:2] ** 2 / len(rows) / SIZE, rtol=1e-3)

    # The validation images get the components that are there; a run of other ones is another run.
    before = (out / "components.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ImagePatches, "fit", lambda *_: pytest.fail("they are there"))
        assert encoded_caches.write(written, out, ["val"]) and (out / "components.json").read_bytes() == before
    noting = dataclasses.replace(written, data=ConfigDict({**written.data, "dir": str(out)}))
    noted = noting.for_experiment["frozen_deps"]
    assert noted["feature encoder"]() == patches.fingerprint() != encoder(dino, autoencoder).fingerprint()
    for other in ({"components": 3, "whiten": True}, {"components": 2, "whiten": False}):
        with pytest.raises(UserError, match="has 2 components of 6 numbers, whitened, of 3 x 3 patches, and config.feature_encoder asks"):
            encoder(dino, autoencoder, out, **other).encode(np.zeros((1, 16, 16, 3), np.float32))
        unnamed = encoder(("",), autoencoder, out, **other)  # a run that reads the cache, and names no encoder
        with pytest.raises(UserError, match="whitened, of 3 x 3 patches, and config.feature_encoder asks"):
            dataclasses.replace(noting, encoders=[unnamed]).for_experiment["frozen_deps"]["feature encoder"]()
    other = encoder(dino, autoencoder, out, side=2 * GRID, components=2, whiten=True)
    other.grid = 2 * GRID
    with pytest.raises(UserError, match=f"of {GRID} x {GRID} patches, and .* of {2 * GRID} x {2 * GRID}: name the cache"):
        other.encode(np.zeros((1, 16, 16, 3), np.float32))

    # A call that was killed behind the fit has left what is fitted: another number of components is another fit.
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "components.json").write_text(json.dumps(stored))
    three = encoder(dino, autoencoder, unfinished, side=2 * GRID, components=3)
    three.function = patches.function  # compiled once
    assert encoded_caches.write(cache(three, images, mirrored=False), unfinished, ["train"])
    assert np.shape(json.loads((unfinished / "components.json").read_text())["matrix"]) == (SIZE, 3)
    (out / "components.json").write_text('{"encoder": "x", "mean": [1], "matrix": [[1, 2], [3, 4]]}')
    with pytest.raises(UserError, match="is not what mmdiff cache writes"):
        patches.fingerprint()


def test_all_components_say_what_the_features_say(dino, autoencoder, by_hand, monkeypatch):
    """The round trip, and images whose features vary in fewer directions."""
    with pytest.raises(UserError, match="config.feature_encoder.components is 7, of features of 6 numbers"):
        encoder(dino, autoencoder, components=7)
    patches = encoder(dino, autoencoder, components=SIZE)
    monkeypatch.setattr(ImagePatches, "_maps", lambda self, batch: batch)
    # The last norm of a random network leaves its features' mean at 0: they vary in one direction less.
    with pytest.raises(UserError, match="the features of 16 images have 5 components that vary, and the config needs 6"):
        patches.fit([by_hand])
    moved = by_hand + 0.1 * np.random.default_rng(0).normal(size=by_hand.shape).astype(np.float32)
    found = patches.fit([moved[:3], moved[3:]])
    monkeypatch.setattr(ImagePatches, "noted", lambda self: found)
    np.testing.assert_allclose(
        patches.encode(moved)["features"] @ np.linalg.inv(found["matrix"]) + found["mean"], moved, atol=1e-4)
    assert sum(found["explained"]) == pytest.approx(1)
