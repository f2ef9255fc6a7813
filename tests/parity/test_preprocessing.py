"""Preprocessing against transformers', torchvision's and torch-fidelity's, at full size."""

import json

import numpy as np
import pytest
from originals.preprocessing import _image, _originals, _processors

from mmdiff.encoders import preprocessing

SIZES = ((480, 641), (225, 224), (224, 224), (301, 999), (1025, 700), (97, 83), (31, 517), (513, 512))


@pytest.mark.parametrize("name", ["CLIP", "OPEN_CLIP", "SIGLIP", "DINOV2", "AUTOENCODER", "INCEPTION"])
def test_images_of_any_size_are_equal_bit_for_bit(name):
    ours = getattr(preprocessing, name)
    original = _originals(ours.size, ours.shortest or ours.size)[name]
    for height, width in SIZES:
        image = _image(height, width)
        np.testing.assert_array_equal(ours(image), original(image), f"{height} x {width}")


@pytest.mark.parametrize("name", ["CLIP", "SIGLIP", "DINOV2"])
def test_what_transformers_writes_beside_weights_is_read(name):
    ours, image = getattr(preprocessing, name), _image(301, 287)
    processor = _processors(ours.size, ours.shortest)[name]
    read = preprocessing.Preprocessing.from_config(json.loads(processor.to_json_string()))
    assert (read.size, read.resize, read.shortest, read.kernel) == (ours.size, ours.resize, ours.shortest, ours.kernel)
    np.testing.assert_array_equal(read(image), ours(image))
