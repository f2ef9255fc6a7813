"""A text encoder that is trained with the diffusion model."""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.nets.layers import normal
from mmdiff.nets.tokens import Block, check_ids
from mmdiff.nets.transformer import Transformer


class TextEncoder(Transformer):
    """A transformer over a text: ids int [B, length] below `vocabulary` -> features [B, length, width].

    Padding is an id like any other (0, the null of the text's `Given`) and no key is masked, as in CDCD: an absent text, all padding, has
    features of its own.

    Attributes:
      normalise: every token's features have length 1 (what CDCD does to CLIP's).
      freeze: no gradient reaches the weights, as in the released CDCD. Weight decay needs no gradient: mask it for these weights.
      norm_eps: CLIP's.
      depth, width, heads, ...: see `Transformer`.
    """

    vocabulary: int
    length: int
    normalise: bool = False
    freeze: bool = False
    norm_eps: float = dataclasses.field(default=1e-5, kw_only=True)

    @nn.compact
    def __call__(self, ids):
        if ids.shape[1:] != (self.length,):
            raise UserError(f"this text encoder takes {self.length} ids a text, not {ids.shape[1:]}: pad or cut the texts.")
        check_ids("text", ids, self.vocabulary)
        embed = partial(nn.Embed, features=self.width, embedding_init=normal, dtype=self.dtype)
        h = embed(self.vocabulary, name="tokens_in")(ids) + embed(self.length, name="columns")(jnp.arange(self.length))
        h = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm")(self.stack(Block)(h)[0])
        if self.normalise:
            size = jnp.sqrt(jnp.square(h.astype(jnp.float32)).sum(-1, keepdims=True))
            h = h / jnp.maximum(size, 1e-6).astype(h.dtype)
        return jax.lax.stop_gradient(h) if self.freeze else h
