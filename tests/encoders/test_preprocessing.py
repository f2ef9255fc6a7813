"""Images as published networks take them: equal to the original image processors."""

import dataclasses
import hashlib

import jax.numpy as jnp
import numpy as np
import pytest
from published import golden

from mmdiff.encoders import preprocessing
from mmdiff.encoders.preprocessing import Preprocessing, resize_tf1
from mmdiff.errors import UserError


def small(name):
    """The published constants at 8 pixels, of images of 10 where the original's shorter side is larger than its crop."""
    full = getattr(preprocessing, name)
    return dataclasses.replace(full, size=8, shortest=10 if full.shortest else 0)


def test_resizing_cropping_and_scaling_are_those_of_the_originals_bit_for_bit():
    for case, answer in golden("preprocessing").items():
        name, _, size = case.rpartition("_")
        height, width = map(int, size.split("x"))
        image = (np.random.RandomState(height).random_sample((height, width, 3)) * 256).astype(np.uint8)
        found = small(name)(image)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, answer, case)


@pytest.mark.parametrize("height, width, size, first, middle, last, sums, digest", [
    (375, 500, 256, (181, 62, 0), (91, 93, 128), (228, 201, 255), (8356476, 8321114, 8355702), "9bc41e1591b8b783"),
    (600, 800, 256, (193, 110, 161), (47, 119, 128), (118, 111, 12), (8420676, 8414692, 8370300), "26f10aec9e77ac90"),
    (1100, 1333, 256, (78, 115, 180), (65, 138, 129), (180, 162, 128), (8421344, 8419044, 8388620), "04bb40baffc7e917"),
    (256, 256, 256, (0, 0, 0), (0, 128, 255), (236, 254, 0), (8355840, 8355840, 8354820), "d15e0328d78b3780"),
    (200, 300, 256, (92, 196, 18), (44, 29, 238), (236, 132, 237), (8358820, 8312247, 8355840), "03f0dd4c2a1904ba"),
    (513, 512, 256, (11, 3, 0), (24, 6, 128), (240, 66, 0), (8421248, 8419580, 8370868), "a01eb1446bb5aa8c"),
    (130, 97, 32, (227, 51, 198), (166, 111, 143), (37, 108, 141), (131613, 131390, 130800), "35958f8847bff0d4"),
])  # fmt: skip
def test_adms_crop_has_the_pixels_of_its_own_code(height, width, size, first, middle, last, sums, digest):
    """By guided-diffusion's `center_crop_arr` under Pillow 9.5 to 13.0; another version may move a pixel by a level."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([(7 * x + 13 * y) % 256, (x**2 + 3 * y) % 256, 255 * ((x // 5 + y // 3) % 2)], -1).astype(np.uint8)
    found = Preprocessing(size, "adm").pixels(image)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    if hashlib.sha256(found.tobytes()).hexdigest()[:16] != digest:
        for place, pixel in ((0, first), (size // 2, middle), (-1, last)):
            assert np.abs(found[place, place].astype(int) - pixel).max() <= 1
        assert np.abs(found.sum((0, 1), dtype=np.int64) - sums).max() <= size**2 / 100


def test_pillow_images_of_any_mode_and_batches_of_jax_are_taken():
    from PIL import Image

    image = (np.random.RandomState(0).random_sample((19, 23, 3)) * 256).astype(np.uint8)
    clip = small("CLIP")
    np.testing.assert_array_equal(clip(Image.fromarray(image)), clip(image))
    grey = image[..., 0]
    np.testing.assert_array_equal(clip(Image.fromarray(grey)), clip(np.repeat(grey[..., None], 3, -1)))
    batch = np.stack([image, image[::-1]])
    resized = np.stack([resize_tf1(each, 13) for each in batch])
    np.testing.assert_allclose(resize_tf1(jnp.asarray(batch), 13), resized, rtol=1e-6)
    np.testing.assert_allclose(clip.normalize(jnp.asarray(batch)), clip.normalize(batch), rtol=1e-6, atol=1e-6)


def test_a_published_file_states_it():
    stated = dict(do_resize=True, do_center_crop=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, resample=3)
    statistics = {key: {f"image_{name}": list(value) for name, value in getattr(preprocessing, f"{key}_STATISTICS").items()}
                  for key in ("CLIP", "IMAGENET")}  # fmt: skip
    square = {"height": 224, "width": 224}
    files = {
        "CLIP": {**stated, "size": {"shortest_edge": 224}, "crop_size": square, **statistics["CLIP"]},
        "DINOV2": {**stated, "size": {"shortest_edge": 256}, "crop_size": square, **statistics["IMAGENET"]},
    }
    for name, config in files.items():
        assert Preprocessing.from_config(config) == getattr(preprocessing, name)
    assert Preprocessing.from_config({**files["CLIP"], "size": 224, "crop_size": 224}) == preprocessing.CLIP  # older files
    siglip = {"size": square, "resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert Preprocessing.from_config(siglip) == dataclasses.replace(preprocessing.SIGLIP, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize("config", [
    {"size": {"height": 224, "width": 336}}, {"size": "large"}, {"size": {"longest_edge": 224}}, {"size": 224, "resample": 17},
    {"size": 224, "image_mean": 0.5}, {"size": 224, "crop_size": 336}, {"size": 224, "rescale_factor": 0}, {"size": 224, "resample": -1},
    {"size": 224, "image_std": [0, 1, 1]}, {"size": 224, "image_mean": ["a"] * 3}, {"size": 224, "image_mean": [0.5] * 2}, {"size": -1},
    {"size": 224, "rescale_factor": float("nan")},
])  # fmt: skip
def test_files_of_other_processors_are_refused(config):
    with pytest.raises(UserError, match="preprocess"):
        Preprocessing.from_config(config)


def test_what_cannot_be_taken_is_a_sentence():
    with pytest.raises(UserError, match="kernel='cubic' must be one of nearest, lanczos"):
        Preprocessing(8, kernel="cubic")
    with pytest.raises(UserError, match="a crop of 8 does not fit"):
        Preprocessing(8, shortest=7)
    with pytest.raises(UserError, match="kernel='tf1' interpolates whole images"):
        Preprocessing(8, kernel="tf1")
    with pytest.raises(UserError, match=r"takes images uint8 \[H, W, 3\], not float64 \[8, 8, 3\]"):
        Preprocessing(8)(np.zeros((8, 8, 3)))
    with pytest.raises(UserError, match="8 x 9 pixels where 8 x 8 are taken as they are"):
        Preprocessing(8, "exact")(np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(UserError, match="1 x 60000 pixels is too narrow"):
        Preprocessing(8)(np.zeros((1, 60_000, 3), np.uint8))
