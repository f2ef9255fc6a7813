"""Images as published networks take them: equal to the original image processors."""

import dataclasses

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
