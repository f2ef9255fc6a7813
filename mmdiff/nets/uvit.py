"""U-ViT as UniDiffuser has it (Bao et al. 2023), parameter for parameter: times are tokens, and long skips join the blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmdiff.errors import UserError
from mmdiff.nets.embed import Dense, Patches, Vectors, frequencies, xavier
from mmdiff.nets.layers import MLP, Attention, cut, normal
from mmdiff.nets.routes import kept_in
from mmdiff.nets.transformer import Transformer, check_heads, stack
from mmdiff.spans import check_no_ends

NAMES = ("image", "vision", "text")


class UViT(Transformer):
    """A network of an image, a vector of that image, and a text, all of them continuous.

    `__call__(x, t)`: dicts as a `Joint` feeds them, x["image"] [B, H, W, C] (latents), x["vision"] [B, D] and x["text"] [B, L, E]; t[name]
    [B] in [0, 1]. Returns a dict of the same shapes, in float32 or wider. The image and its vector have one time: where they have two, that
    is a UserError if the values are known, and while tracing the outputs are NaN.

    Tokens, each plus a learned position: the sinusoidal features of the image's time and of the text's (`frequencies`, thousandths), which
    data the network is asked for, the text's, the vector, the patches. The blocks are `PostNormBlock`s: half of `depth`, one in the middle,
    and the other half, in which the first has a skip from the last of the first half, and so on. A last norm, and a layer for each output.

    Attributes:
      image, vision, text: the shapes.
      data_types: how many kinds of data the network tells apart; 0 is no token for them (UniDiffuser v0). v1 has 2, pairs of the web and
        the authors' own.
      data_type: the one that it is asked for.
      norm_eps: PyTorch's.
      depth: an even number of blocks, besides the one in the middle. Published are depth 30, width 1536, 24 heads.
      width, heads, ...: see `Transformer`.

    >>> net = UViT(Patches(4, 4, 4, 2), Vectors(6), Vectors(3, 5), depth=2, width=16, heads=2)
    >>> x = {"image": jnp.zeros((2, 4, 4, 4)), "vision": jnp.zeros((2, 6)), "text": jnp.zeros((2, 5, 3))}
    >>> t = dict.fromkeys(x, jnp.ones(2))
    >>> out = jax.eval_shape(lambda key: net.apply(net.init(key, x, t), x, t), jax.random.key(0))
    >>> out["image"].shape, out["vision"].shape, out["text"].shape
    ((2, 4, 4, 4), (2, 6), (2, 5, 3))
    """

    image: Patches
    vision: Vectors
    text: Vectors
    data_types: int = dataclasses.field(default=0, kw_only=True)
    data_type: int = dataclasses.field(default=0, kw_only=True)
    norm_eps: float = dataclasses.field(default=1e-5, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.depth % 2:
            raise UserError(f"UViT: every block of one half has its skip from one of the other: depth must be even, not {self.depth}.")
        if self.data_type and not self.data_type < self.data_types:
            raise UserError(f"UViT: data_type {self.data_type} is none of {self.data_types} data_types, which count from 0.")

    @nn.compact
    def __call__(self, x, t):
        kept_in("UViT", x, {}, None)
        check_no_ends("UViT", t)
        if missing := [name for name in NAMES if name not in x or name not in t]:
            raise KeyError(f"UViT: no input or time for {missing}; it needs {list(NAMES)}.")
        check_one_time(t)
        check_heads(self.heads)
        streams = {name: getattr(self, name) for name in ("text", "vision", "image")}  # in the order of the tokens
        parts = [frequencies(t[name], self.width)[:, None].astype(self.dtype) for name in ("image", "text")]
        if self.data_types:
            table = nn.Embed(self.data_types, self.width, embedding_init=normal, dtype=self.dtype, name="data_type_in")
            parts.append(table(jnp.full((len(x["image"]), 1), self.data_type)))
        parts += [stream.embed(x[name].astype(self.dtype), self.width, self.dtype, name) for name, stream in streams.items()]
        lengths = [part.shape[1] for part in parts]
        count = sum(lengths)
        positions = nn.Embed(count, self.width, embedding_init=normal, dtype=self.dtype, name="positions")(jnp.arange(count))
        blocks, half = partial(Blocks, remat=self.remat, options=self.of_blocks()), self.depth // 2
        h, behind = blocks(half, self.scan, name="in")(jnp.concatenate(parts, axis=1) + positions)
        h, _ = blocks(1, scan=False, name="mid")(h)
        h, _ = blocks(half, self.scan, name="out")(h, behind[::-1])
        h = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm")(h)
        out = {name: streams[name].decode(part, self.dtype, name) for name, part in zip(streams, cut(h, lengths)[-len(streams) :])}
        out = {name: value.astype(jnp.promote_types(value.dtype, jnp.float32)) for name, value in out.items()}
        alike = t["image"] == t["vision"]
        return {name: jnp.where(alike.reshape(-1, *(1,) * (value.ndim - 1)), value, jnp.nan) for name, value in out.items()}


def check_one_time(t: Mapping[str, jax.Array]) -> None:
    """Raises UserError where the times of an image and of its vector are known and differ."""
    known = not any(isinstance(t[name], jax.core.Tracer) for name in ("image", "vision"))
    if known and not np.array_equal(t["image"], t["vision"]):
        raise UserError(
            "UViT: the image and its vector have one time, and here they have two: train them at times.shared('image', 'vision', ...), and "
            "give, leave out or sample both.")


class Blocks(nn.Module):
    """`depth` `PostNormBlock`s in a scope of their own -> (tokens, those behind each block [depth, B, N, W] or, with skips, None)."""

    depth: int
    scan: bool
    remat: str
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, x, skips=None):
        return stack(partial(PostNormBlock, **self.options), self.depth, self.scan, self.remat)(x, each=skips)


class PostNormBlock(nn.Module):
    """A block whose norms come last, `x <- LN(x + f(x))` for f attention, then the MLP.

    With a skip it begins with `x <- LN(Dense([x, skip]))`. LN is LayerNorm with a scale and a bias. Queries, keys and values have no bias;
    the MLP has GELU itself, not its approximation.

    Attributes:
      heads, mlp_ratio, norm_eps, backend, dtype: as in `Transformer`.
    """

    heads: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, skip=None):
        def normed(name, value):
            return nn.LayerNorm(self.norm_eps, dtype=self.dtype, name=f"{name}_norm")(value)

        if skip is not None:
            layer = Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="skip")
            x = normed("skip", checkpoint_name(layer(jnp.concatenate([x, skip], axis=-1)), "update"))
        attend = Attention(self.heads, backend=self.backend, dtype=self.dtype, qkv_bias=False, name="attention")
        x = normed("attention", x + checkpoint_name(attend({"": x})[0][""], "update"))
        x = normed("mlp", x + checkpoint_name(MLP(self.mlp_ratio, "erf_gelu", dtype=self.dtype, name="mlp")(x), "update"))
        return x, x if skip is None else None
