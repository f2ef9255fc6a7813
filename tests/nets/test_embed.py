"""Embeddings: times, positions, patches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.nets import Patches, embed


@pytest.mark.parametrize("patch, height, width, channels", [(1, 4, 4, 3), (2, 4, 6, 1), (4, 8, 4, 2)])
def test_patchify_and_back(patch, height, width, channels):
    x = jax.random.normal(jax.random.key(0), (2, height, width, channels))
    tokens = embed.patchify(x, patch)
    assert tokens.shape == (2, height * width // patch**2, patch * patch * channels)
    np.testing.assert_array_equal(embed.unpatchify(tokens, patch, height, width), x)
    # Raster order: the last token of the first row is the patch at its right end.
    corner = tokens[:, width // patch - 1].reshape(2, patch, patch, channels)
    np.testing.assert_array_equal(corner, x[:, :patch, width - patch :])


def test_time_features():
    """DiT's: cosines then sines of 1000 t / 10000^(i / half)."""
    t = jnp.asarray([0.0, 0.25, 1.0])
    got = np.asarray(embed.frequencies(t))
    assert got.shape == (3, 256)
    angles = 1000 * np.asarray(t, np.float64)[:, None] * 10000 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(got, np.concatenate([np.cos(angles), np.sin(angles)], -1), atol=2e-4)
    assert embed.frequencies(jnp.ones((2, 3)), size=8).shape == (2, 3, 8)


def test_positions():
    table = embed.sincos_2d(16, 3, 4)
    assert table.shape == (12, 16) and table.dtype == np.float32
    assert len(np.unique(table.round(5), axis=0)) == 12  # every place has its own
    grid = table.reshape(3, 4, 16)
    np.testing.assert_array_equal(grid[0, :, :8], grid[2, :, :8])  # the first half is the column's alone
    np.testing.assert_array_equal(grid[:, 0, 8:], grid[:, 3, 8:])  # the second the row's
    np.testing.assert_allclose(grid[0, 1, :4], np.sin(1 / 10000 ** (np.arange(4) / 4)), rtol=1e-6)


def test_patches_must_tile_the_image():
    assert Patches(8, 4, 1, 2).length == 8
    with pytest.raises(ValueError, match="patches of 3 do not tile an image of 8x8"):
        Patches(8, 8, 1, 3)


class Encoded(nn.Module):
    stream: Patches

    @nn.compact
    def __call__(self, x):
        return self.stream.encode(x, 8, jnp.float32, "image")


def test_a_stem_sees_past_the_borders_of_patches():
    x = jnp.zeros((2, 8, 8, 1)).at[1, 3, 3].set(1.0)  # a pixel at the corner of the first of four patches
    changed = {}
    for stem in (0, 4):
        tokens, params = Encoded(Patches(8, 8, 1, 4, stem=stem)).init_with_output(jax.random.key(0), x)
        changed[stem] = (np.abs(tokens[1] - tokens[0]).max(-1) > 1e-6).tolist()
        assert sorted(params["params"]) == ["image_in", *(["image_stem_0", "image_stem_1"] if stem else [])]
    assert changed == {0: [True, False, False, False], 4: [True] * 4}
    with pytest.raises(ValueError, match="a convolutional stem halves the sides.*not 3"):
        Patches(9, 9, 1, 3, stem=8)
