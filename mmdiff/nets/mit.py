"""MiT: the transformer of improved MeanFlow (Geng et al. 2025), parameter for parameter: all conditions are tokens."""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.nets.embed import Patches, Vectors
from mmdiff.nets.layers import normal
from mmdiff.nets.routes import kept_in
from mmdiff.nets.transformer import DiffusionTransformer
from mmdiff.spans import end_of, velocity_of

TOKENS = {"label": 8, "guidance": 4, "interval_start": 2, "interval_end": 2, "span": 4}  # before the image's, in this order


class MiT(DiffusionTransformer):
    """A class-conditional network of average velocities, without modulations.

    `__call__(x, t)`: dicts as a `Joint` feeds them, x["image"] [B, H, W, C], x["label"] int [B] in 0 .. classes, `classes` being the null;
    t["image"] and perhaps t["image/end"], where the step ends: the network sees the difference of the two alone. Returns the average
    velocity {"image": [B, H, W, C]} and, with `velocity`, "image/velocity", that at the time itself (see `losses.averaged`), in float32 or
    wider.

    Each condition is some tokens, learned vectors plus an embedding of it, before the image's: label, weight and interval of the guidance
    that was trained in, length of the step. Blocks are `x + g f(RMS(x))` with learned vectors g, 0 at first, and no biases; queries and
    keys are normalised and turned by a token's place in the whole sequence.

    Attributes:
      patches: the image's shape and patch size.
      classes: of the labels.
      head_depth: the last so many blocks are a head's own.
      velocity: whether there is a head of velocities; sampling needs none.
      guidance, interval: what the network is told of guidance, the weight and the times between which it acts. Published networks were
        trained with all weights from 1 to 8, ours with these.
      depth, width, heads, ...: see `Transformer` and `DiffusionTransformer`. Published are (12, 768, 12) for B, (24, 768, 12) for M,
        (32, 1024, 16) for L and (48, 1024, 16) for XL.
    """

    patches: Patches
    classes: int
    head_depth: int = dataclasses.field(default=8, kw_only=True)
    velocity: bool = dataclasses.field(default=True, kw_only=True)
    guidance: float = dataclasses.field(default=1.0, kw_only=True)
    interval: tuple[float, float] = dataclasses.field(default=(0.0, 1.0), kw_only=True)
    norm: str = dataclasses.field(default="rms", kw_only=True)
    mlp: str = dataclasses.field(default="swiglu", kw_only=True)
    rope: bool = dataclasses.field(default=True, kw_only=True)
    qk_norm: bool = dataclasses.field(default=True, kw_only=True)
    time_scale: float = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise UserError(f"MiT: interval is two times, as (0.42, 0.62), not {self.interval}.")
        if not self.head_depth < self.depth:
            raise UserError(f"MiT: the heads have {self.head_depth} of {self.depth} blocks: head_depth must be fewer.")

    @nn.compact
    def __call__(self, x, t):
        kept_in("MiT", x, {}, None)
        time = t["image"]
        everywhere = jnp.ones_like(time)
        values = {
            "guidance": (1 - 1 / self.guidance) * everywhere, "interval_start": self.interval[0] * everywhere,
            "interval_end": self.interval[1] * everywhere, "span": time - t.get(end_of("image"), time)}
        label = nn.Embed(self.classes + 1, self.width, embedding_init=normal, dtype=self.dtype, name="label")
        embedded = {"label": label(x["label"])} | {name: self.time_embed(self.width, name)(value) for name, value in values.items()}
        count = sum(TOKENS.values())
        learned = nn.Embed(count, self.width, embedding_init=normal, dtype=self.dtype, name="tokens")(jnp.arange(count))
        conditions = jnp.concatenate([jnp.repeat(embedded[name][:, None], number, axis=1) for name, number in TOKENS.items()], axis=1)
        image = self.patches.embed(x["image"].astype(self.dtype), self.width, self.dtype, "image")
        tokens = jnp.concatenate([learned + conditions, image], axis=1)
        blocks = partial(
            self.blocks, rope={"": Vectors(self.width, tokens.shape[1])}, nested=True, gates=True, bias=False)
        h, out = blocks("", self.depth - self.head_depth)({"": tokens})[0], {}
        for name, output in ("image", "image"), *([("velocity", velocity_of("image"))] if self.velocity else []):
            last = blocks(f"{name}_head", self.head_depth)(h)[0][""][:, count:]
            last = nn.RMSNorm(self.norm_eps, dtype=self.dtype, name=f"{name}_norm")(last)
            value = self.patches.decode(last, self.dtype, name)
            out[output] = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        return out
