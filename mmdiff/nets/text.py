"""A text encoder that is trained with the network it serves."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.nets.dit import check_split, stack
from mmdiff.nets.fields import Network
from mmdiff.nets.tokens import Block, check_ids, normal


class TextEncoder(Network):
    """A transformer over a text: ids int [B, length] below `vocabulary` -> features [B, length, width].

    Padding is an id like any other (0, the null of the text's `Given`) and no key is hidden, as in CDCD: so an absent text, all padding,
    has features of its own.

    Attributes:
      normalise: every token's features have length 1 (what CDCD does to CLIP's).
      freeze: no gradient reaches the weights, which so keep their values: the released CDCD trains none of its encoders. Weight decay
        goes by no gradient: mask it for these weights.
      depth, width, heads, mlp_ratio, norm_eps (CLIP's, too), scan, remat, backend, dtype: as in `TokenTransformer`.
    """

    vocabulary: int
    length: int
    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    normalise: bool = False
    freeze: bool = False
    norm_eps: float = 1e-5
    scan: bool = True
    remat: str = "none"
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids):
        check_split(self.heads)
        if ids.shape[1:] != (self.length,):
            raise UserError(f"this text encoder reads {self.length} ids a text, not {ids.shape[1:]}: pad or cut the texts.")
        check_ids("text", ids, self.vocabulary)
        embed = partial(nn.Embed, features=self.width, embedding_init=normal, dtype=self.dtype)
        h = embed(self.vocabulary, name="tokens_in")(ids) + embed(self.length, name="columns")(jnp.arange(self.length))
        block = partial(Block, heads=self.heads, mlp_ratio=self.mlp_ratio, norm_eps=self.norm_eps, backend=self.backend, dtype=self.dtype)
        h = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm")(stack(block, self.depth, self.scan, self.remat)(h))
        if self.normalise:
            size = jnp.sqrt(jnp.square(h.astype(jnp.float32)).sum(-1, keepdims=True))
            h = h / jnp.maximum(size, 1e-6).astype(h.dtype)
        return jax.lax.stop_gradient(h) if self.freeze else h
