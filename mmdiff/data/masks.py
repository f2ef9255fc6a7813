"""Masks of square patches, sampled on the device: what MT-Diffusion's masked images hide (Chen et al. 2024, section 5.2).

A mask is float32 [height, width, 1], 1 where an image is hidden and 0 where it is seen; the hidden pixels of a masked image are zero,
the middle of [-1, 1]. The paper's 64 x 64 images have up to 10 patches of 16 x 16, which hide 25 % on average (63 % if they are 20); up to
10 of 2 x 2 hide 26 % of the 8 x 8 digits (20 hide 69 %).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mmdiff.errors import UserError


def patches(key: jax.Array, height: int, width: int, size: int, most: int, count: int | None = None) -> jax.Array:
    """A mask [height, width, 1]: the union of m squares of `size` pixels, each anywhere inside the image, with equal chances.

    m ~ Uniform{0, ..., most}; or exactly `count`, which may be more. Squares may overlap. For a batch, `jax.vmap` over the keys.

    >>> mask = patches(jax.random.key(0), 8, 8, size=2, most=10, count=1)
    >>> mask.shape, int(mask.sum())
    ((8, 8, 1), 4)

    Raises:
      UserError: squares larger than the image.
    """
    if not 0 < size <= min(height, width):
        raise UserError(f"patches of {size} pixels do not fit into an image of {height} x {width}: choose 1 to {min(height, width)}.")
    number_key, place_key = jax.random.split(key)
    number = jax.random.randint(number_key, (), 0, most + 1) if count is None else count
    indices = jnp.arange(most if count is None else count)
    room = jnp.array([height, width]).reshape(2, 1, 1) - size + 1
    starts = jax.random.randint(place_key, (2, indices.size, 1), 0, room)
    rows, columns = (
        (place >= start) & (place < start + size) for start, place in zip(starts, (jnp.arange(height), jnp.arange(width))))
    covered = rows[:, :, None] & columns[:, None, :] & (indices < number)[:, None, None]
    return covered.any(0)[..., None].astype(jnp.float32)


def hide(images: jax.Array, masks: jax.Array) -> jax.Array:
    """Images [..., height, width, channels] with zeros where their masks are 1."""
    return jnp.where(masks > 0, 0.0, images)


def masking(size: int, most: int, complete: float = 0.1) -> Callable[[Mapping[str, jax.Array], jax.Array], dict[str, jax.Array]]:
    """`prepare(batch, keys) -> {"mask", "masked"}`: a new mask for every image of a batch, from its own key, and the masked images.

    Args:
      size, most: of `patches`.
      complete: the share of masks that hide everything. With patches alone the network never meets one, from which it is to draw
        whole images.

    Raises:
      UserError: a share outside [0, 1], and what `patches` refuses.
    """
    if not 0 <= complete <= 1:
        raise UserError(f"the share of complete masks is in [0, 1], not {complete}.")

    def prepare(batch, keys):
        images = batch["image"]

        def draw(key):
            mask_key, complete_key = jax.random.split(key)
            mask = patches(mask_key, *images.shape[1:3], size, most)
            return jnp.where(jax.random.bernoulli(complete_key, complete), 1.0, mask)

        masks = jax.vmap(draw)(keys)
        return {"mask": masks, "masked": hide(images, masks)}

    return prepare
