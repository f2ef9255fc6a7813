"""PSNR and SSIM of pairs with known values."""

import numpy as np
import pytest

from mmdiff.errors import UserError
from mmdiff.evals.image_pairs import psnr, ssim

Y, X = np.mgrid[:64, :64]
RAMP = (7 * X + 13 * Y) % 256


def image(values):
    return np.broadcast_to(np.asarray(values, np.uint8).reshape(1, *np.shape(values), 1), (1, *np.shape(values), 3))


@pytest.mark.parametrize("difference, expected", [(1, 48.1308036087), (16, 24.0484039556)])
def test_psnr_of_a_constant_difference(difference, expected):
    flat = np.full((32, 32), 100)
    assert psnr(image(flat), image(flat + difference)) == pytest.approx(expected, abs=1e-9)
    unit = [array / np.float32(127.5) - 1 for array in (image(flat), image(flat + difference))]
    assert psnr(*unit, data_range=2) == pytest.approx(expected, abs=1e-4)


def test_psnr_is_of_each_pair():
    zeros = np.zeros((3, 4, 4, 1), np.uint8)
    found = psnr(zeros, zeros + np.array([1, 10, 0], np.uint8).reshape(3, 1, 1, 1))
    assert found[:2].mean() == pytest.approx(38.131, abs=1e-3)  # not 31.098, that of the mean error
    assert np.isposinf(found[2])


@pytest.mark.parametrize("first, second, expected", [
    (np.full((64, 64), 100), np.full((64, 64), 110), 0.99547644409),
    (RAMP, (RAMP + 20) % 256, 0.56654715),
    (RAMP, np.clip(RAMP + 16 * ((X + Y) % 2), 0, 255), 0.96003819),
    (RAMP, 255 - RAMP, -0.67353316),
    (RAMP, RAMP, 1.0),
])  # fmt: skip
def test_ssim(first, second, expected):
    assert ssim(image(first), image(second)) == pytest.approx(expected, abs=1e-8)


def test_pairs_that_are_none_are_sentences():
    flat = image(np.zeros((10, 12)))
    with pytest.raises(UserError, match="SSIM takes images of at least 11 x 11 pixels, not 10 x 12"):
        ssim(flat, flat)
    with pytest.raises(UserError, match=r"not uint8 \[1, 10, 12, 3\] and float32 \[1, 10, 12, 3\]"):
        psnr(flat, flat.astype(np.float32))
