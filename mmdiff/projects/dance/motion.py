"""Encoders of the conditions of music, trained with the diffusion model: a dance, its genre, features of its video."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.errors import UserError
from mmdiff.nets.embed import Dense
from mmdiff.nets.fields import Network
from mmdiff.nets.layers import normal
from mmdiff.nets.tokens import Block, check_ids, time_features
from mmdiff.nets.transformer import Transformer


class MotionEncoder(Transformer):
    """A transformer over a dance: [B, frames, joints, 3] -> features [B, frames / stride, width], in order of time.

    A token is the positions and velocities (per second of `fps` frames) of `stride` frames, with the `time_features` of its time.

    Attributes:
      stride: frames for a token.
      fps: frames in a second.
      depth, width, heads, ...: see `Transformer`.
    """

    stride: int = 4
    fps: int = 60

    @nn.compact
    def __call__(self, motion):
        if motion.ndim != 4 or motion.shape[1] % self.stride:
            raise UserError(f"motion is [B, frames, joints, 3] in tokens of {self.stride} frames, not {list(motion.shape)}.")
        b, frames, *_ = motion.shape
        count = frames // self.stride
        place = motion.reshape(b, frames, -1).astype(jnp.float32)
        velocity = self.fps * jnp.diff(place, axis=1, prepend=place[:, :1])
        h = jnp.concatenate([place, velocity], -1).reshape(b, count, -1).astype(self.dtype)
        time = time_features((self.stride / self.fps) * np.arange(count), self.width)
        h = Dense(self.width, kernel_init=normal, dtype=self.dtype, name="in")(h)
        h = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm_in")(h)
        h, _ = self.stack(Block)(h + time.astype(self.dtype))
        return nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm")(h)


class DanceEncoder(Network):
    """The conditions of music as a context for cross-attention: `(motion, *[genre], *[video]) -> [B, N, width]`, see `conditions`.

    A token for every token of the `MotionEncoder`, one for the genre [B], one for the video's features [B, F]. With `fused` a single one,
    `Dense(concatenate(mean of the motion's, genre, video))`, as in CDCD: attention to it adds the same vector to all positions of the
    music, so the timing of the dance is lost.

    Attributes:
      motion: the encoder of the dance; its width is the context's.
      genres: rows of the genre's table, 0 without genres. A `Given(null=C)` needs C + 1.
      video: whether there are features of the video.
      fused: see above.
      freeze: no gradient reaches the motion's encoder and the genre's table, as in the released CDCD, where only the projections of their
        features are trained. Weight decay needs no gradient: mask it for the weights that match `FROZEN`.
      dtype: of activations and products.
    """

    FROZEN = "/encoder/(motion|genre)/"

    motion: MotionEncoder
    genres: int = 0
    video: bool = False
    fused: bool = False
    freeze: bool = False
    dtype: Any = jnp.float32

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the conditions, in the order of the arguments."""
        return ("motion", *["genre"] * bool(self.genres), *["video"] * self.video)

    @nn.compact
    def __call__(self, *conditions):
        given = dict(zip(self.conditions, conditions, strict=True))
        features = {"motion": self.motion(given["motion"])}
        if self.genres:
            check_ids("genre", given["genre"], self.genres)
            table = nn.Embed(self.genres, self.motion.width // 4, embedding_init=normal, dtype=self.dtype, name="genre")
            features["genre"] = table(given["genre"])[:, None]
        if self.freeze:
            features = {name: jax.lax.stop_gradient(part) for name, part in features.items()}
        if self.video:
            features["video"] = given["video"].astype(self.dtype)[:, None]
        dense = partial(Dense, self.motion.width, kernel_init=normal, dtype=self.dtype)
        if self.fused:
            return dense(name="out")(jnp.concatenate([part.mean(1, keepdims=True) for part in features.values()], -1))
        return jnp.concatenate([dense(name=f"{name}_out")(part) for name, part in features.items()], 1)
