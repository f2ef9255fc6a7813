"""Masks: squares inside the image, zeros on their union and nowhere else, as many as asked for, a new mask for every key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.data.masks import hide, masking, patches
from mmdiff.errors import UserError


def drawn(number, *args, **options):
    return np.asarray(jax.jit(jax.vmap(lambda key: patches(key, *args, **options)))(jax.random.split(jax.random.key(0), number)))


def coverage(height, width, size, counts):
    """The exact share of hidden pixels, averaged over numbers of squares: a pixel is missed by each square independently."""
    def hit(length):
        starts = np.arange(length - size + 1)
        place = np.arange(length)[:, None]
        return ((place >= starts) & (place < starts + size)).mean(1)

    missed = 1 - np.outer(hit(height), hit(width))
    return np.mean([1 - missed**m for m in counts])


def squares(mask, size):
    """Where a whole square of ones fits, [height - size + 1, width - size + 1], and the union of those squares."""
    windows = np.lib.stride_tricks.sliding_window_view(mask[..., 0], (size, size))
    fits, union = windows.min((-1, -2)) == 1, np.zeros(mask.shape[:2])
    for row, column in zip(*np.nonzero(fits)):
        union[row : row + size, column : column + size] = 1
    return fits, union


def test_a_mask_is_a_union_of_squares_inside_the_image():
    masks = drawn(300, 6, 9, 2, 5)
    assert masks.shape == (300, 6, 9, 1) and masks.dtype == np.float32 and set(np.unique(masks)) == {0, 1}
    anywhere = np.zeros((5, 8), bool)
    for mask in masks:
        fits, union = squares(mask, 2)
        np.testing.assert_array_equal(mask[..., 0], union)
        anywhere |= fits
    assert anywhere.all()


@pytest.mark.parametrize("count", [0, 1, 15])
def test_an_exact_count(count):
    masks = drawn(2000, 8, 8, 2, 10, count=count)
    hidden = masks.sum((1, 2, 3))
    assert hidden.max() <= 4 * count and (count != 1 or (hidden == 4).all())
    assert abs(masks.mean() - coverage(8, 8, 2, [count])) < 0.006


@pytest.mark.parametrize("height, size", [(8, 2), pytest.param(64, 16, marks=pytest.mark.slow)])
def test_the_number_of_squares_is_uniform(height, size):
    masks = drawn(2000, height, height, size, 10)
    shares = masks.mean((1, 2, 3))
    assert abs(shares.mean() - coverage(height, height, size, range(11))) < 4 * shares.std() / np.sqrt(2000)
    assert abs((shares == 0).mean() - 1 / 11) < 4 * np.sqrt(1 / 11 / 2000)  # m = 0


def test_digits_and_the_papers_images_are_covered_alike():
    for height, size, mean, many in ((64, 16, 0.25, 0.63), (8, 2, 0.26, 0.69)):
        assert abs(coverage(height, height, size, range(11)) - mean) < 0.005
        assert abs(coverage(height, height, size, [20]) - many) < 0.005


def test_an_image_is_zero_on_the_mask_and_itself_elsewhere():
    rng, keys = np.random.default_rng(0), jax.random.split(jax.random.key(3), 50)
    images = np.float32(rng.uniform(0.1, 1, (50, 8, 8, 3)) * rng.choice([-1, 1], (50, 8, 8, 3)))
    prepare = jax.jit(masking(2, 10))
    found = {name: np.asarray(array) for name, array in prepare({"image": images}, keys).items()}
    assert set(found) == {"mask", "masked"}
    mask, masked = found["mask"], found["masked"]
    assert mask.shape == (50, 8, 8, 1) and masked.shape == images.shape
    np.testing.assert_array_equal(masked == 0, np.broadcast_to(mask == 1, masked.shape))
    np.testing.assert_array_equal(masked, images * (1 - mask))
    whole = mask.max((1, 2, 3)) == 0
    assert whole.any() and (masked[whole] == images[whole]).all()
    np.testing.assert_array_equal(hide(images, np.ones_like(mask)), np.zeros_like(images))
    # A mask is a function of its own key, and another key's is another.
    np.testing.assert_array_equal(prepare({"image": images}, keys[::-1])["mask"], mask[::-1])
    assert len({one.tobytes() for one in mask}) > 35


def test_complete_masks_have_their_share():
    images, keys = jnp.ones((3000, 8, 8, 1)), jax.random.split(jax.random.key(0), 3000)
    complete = np.asarray(jax.jit(masking(2, 3))({"image": images}, keys)["mask"]).min((1, 2, 3)) == 1
    assert abs(complete.mean() - 0.1) < 0.022


def test_mistakes():
    for size in (0, 9):
        with pytest.raises(UserError, match="do not fit into an image of 8 x 9: choose 1 to 8"):
            patches(jax.random.key(0), 8, 9, size, 3)
    with pytest.raises(UserError, match="share of complete masks"):
        masking(2, 10, 1.5)
