"""How far reconstructions are from their originals, pixel by pixel: PSNR and SSIM of each pair. (rFID is the FID of the two sets.)"""

from __future__ import annotations

import numpy as np

from mmdiff.errors import UserError

WINDOW, SIGMA = 11, 1.5  # pixels
K1, K2 = 0.01, 0.03


def psnr(first: np.ndarray, second: np.ndarray, data_range: float = 255.0) -> np.ndarray:
    """20 log10 R - 10 log10 mse in decibels, of each pair [n]; infinite for equal images. The usual figure is their mean.

    >>> psnr(np.zeros((1, 4, 4, 3), np.uint8), np.ones((1, 4, 4, 3), np.uint8)).round(6)
    array([48.130804])

    Args:
      first, second: [n, H, W, C] of one type.
      data_range: R, the largest value less the smallest: 255 of uint8 images, 2 of those in [-1, 1].
    """
    first, second = _pairs(first, second)
    with np.errstate(divide="ignore"):
        return 20 * np.log10(data_range) - 10 * np.log10(((first - second) ** 2).mean((1, 2, 3)))


def ssim(first: np.ndarray, second: np.ndarray, data_range: float = 255.0) -> np.ndarray:
    r"""Structural similarity of each pair [n] (Wang et al. 2004), the mean over channels and places.

        (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2)),   c = (K R)^2, K = 0.01, 0.03

    Means m and population covariances s are over Gaussian windows of 11 x 11, sigma 1.5, that lie within the image.

    Raises:
      UserError: images smaller than the window, or of two shapes.
    """
    first, second = _pairs(first, second)
    if min(first.shape[1:3]) < WINDOW:
        raise UserError(f"SSIM takes images of at least {WINDOW} x {WINDOW} pixels, not {first.shape[1]} x {first.shape[2]}.")
    weights = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()

    def mean(x):
        for axis in (1, 2):
            length = x.shape[axis] - WINDOW + 1
            x = sum(w * np.take(x, np.arange(i, i + length), axis) for i, w in enumerate(weights))
        return x

    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    m1, m2 = mean(first), mean(second)
    s1, s2, s12 = mean(first * first) - m1 * m1, mean(second * second) - m2 * m2, mean(first * second) - m1 * m2
    return (((2 * m1 * m2 + c1) * (2 * s12 + c2)) / ((m1 * m1 + m2 * m2 + c1) * (s1 + s2 + c2))).mean((1, 2, 3))


def _pairs(first, second):
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 4 or first.dtype != second.dtype:
        kinds = " and ".join(f"{x.dtype} {list(x.shape)}" for x in (first, second))
        raise UserError(f"pairs of images must be two arrays [n, H, W, C] of one shape and type, not {kinds}.")
    return first.astype(np.float64), second.astype(np.float64)
