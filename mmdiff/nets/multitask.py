"""MT-Diffusion's network on a DiT: one modality is diffused, others enter as conditions and leave by heads on its features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.nets.embed import Dense, Patches, patchify, xavier
from mmdiff.nets.fields import check_fields
from mmdiff.nets.layers import layer_norm, normal, zeros
from mmdiff.nets.routes import kept_in
from mmdiff.nets.transformer import DiffusionTransformer
from mmdiff.spans import check_no_ends


class Features(NamedTuple):
    """Inputs of heads: tokens half way and at the end [B, N, width], the condition [B, width], z, the output, their patches, the norms'
    epsilon, and the network's method for outputs."""

    middle: jax.Array
    final: jax.Array
    condition: jax.Array
    z: jax.Array
    out: jax.Array
    patches: Patches
    norm_eps: float
    output: Callable


class MultiTaskDiT(DiffusionTransformer):
    """A DiT on `target`; the auxiliary modalities are conditions, outputs of heads, or both (Chen et al. 2024, MT-Diffusion).

    `__call__(x, t)`: dicts by modality, x as the process feeds it, t [B]; returns {target: [B, H, W, C], ...} with an output of every
    modality that has a head, in float32. The time of an auxiliary modality enters as one of three states: known (0), noised or absent (1).

    Attributes:
      patches: of the target.
      aux_modalities: name -> `Classes`, `ClassGrid`, `Grid` or `Vector`.
      target: the name of what is diffused.
      depth: blocks; heads that read the middle do so after half of them.
      width, heads, ...: see `Transformer` and `DiffusionTransformer`.

    >>> net = MultiTaskDiT(Patches(8, 8, 1, 2), {"label": Classes(states=11, classes=10)}, depth=2, width=16, heads=2)
    >>> x, t = {"image": jnp.zeros((2, 8, 8, 1)), "label": jnp.zeros(2, int)}, {"image": jnp.ones(2), "label": jnp.ones(2)}
    >>> out = jax.eval_shape(lambda key: net.apply(net.init(key, x, t), x, t), jax.random.key(0))
    >>> out["image"].shape, out["label"].shape
    ((2, 8, 8, 1), (2, 10))
    """

    patches: Patches
    aux_modalities: Mapping[str, Any]
    target: str = "image"

    @nn.compact
    def __call__(self, x, t):
        check_no_ends("MultiTaskDiT", t)
        kept_in("MultiTaskDiT", x, {}, None)
        names = sorted(self.aux_modalities)  # the order in which jax flattens a dict
        missing = [name for name in (self.target, *names) if name not in x or name not in t]
        if missing:
            raise KeyError(f"MultiTaskDiT: no input or time for {missing}; it was built for {[self.target, *names]}.")
        z = x[self.target]
        h = self.patches.encode(z.astype(self.dtype), self.width, self.dtype, self.target)
        c = self.time_embed(self.width, "time")(t[self.target])
        for name in names:
            # A clean target carries no other modality: what is noised with it is absent.
            noised = (t[name] < 1) & (t[self.target] > 0)
            state = jnp.where(t[name] > 0, jnp.where(noised, 1, 2), 0)
            c = c + nn.Embed(3, self.width, embedding_init=normal, dtype=self.dtype, name=f"{name}_state")(state)
            h, c = self.aux_modalities[name].encode(h, c, x[name], self.dtype, name)

        def blocks(depth, name, h):
            return self.blocks(name, depth, rope={"": self.patches}, nested=True)({"": h}, {"": c})[0][""]

        middle = blocks(self.depth // 2, "first", h)
        final = blocks(self.depth - self.depth // 2, "second", middle)
        out = self.output(self.patches, final, c, self.target, z)
        features = Features(middle, final, c, z, out, self.patches, self.norm_eps, self.output)
        heads = {name: self.aux_modalities[name].decode(features, blocks, self.dtype, name) for name in names}
        outputs = {self.target: out, **{name: head for name, head in heads.items() if head is not None}}
        return {name: value.astype(jnp.float32) for name, value in outputs.items()}


def pooled(h: jax.Array, size: int, dtype: Any, name: str, eps: float) -> jax.Array:
    """A layer and a product on the mean token: [B, N, width] -> [B, size]."""
    h = layer_norm(layer_norm(h, eps).mean(1), eps)
    h = nn.gelu(Dense(2 * h.shape[-1], kernel_init=xavier, dtype=dtype, name=f"{name}_head")(h), approximate=True)
    return Dense(size, kernel_init=zeros, dtype=dtype, name=f"{name}_out")(h)


# An auxiliary modality: `encode` adds it to the tokens or to the condition, `decode` is its head. Called inside a linen module, whose
# parameters they create under the modality's name.


@dataclasses.dataclass(frozen=True)
class Grid:
    """Images on the target's grid of patches [B, H, W, C]: input as further channels of it, output by a copy of its last layer.

    Attributes:
      patches: as many as the target's.
      head: whether the network predicts it.
    """

    patches: Patches
    head: bool = True

    def encode(self, h, c, x, dtype, name):
        tokens = Dense(h.shape[-1], kernel_init=xavier, dtype=dtype, name=f"{name}_in")(patchify(x.astype(dtype), self.patches.patch))
        return h + tokens, c

    def decode(self, features, blocks, dtype, name):
        return features.output(self.patches, features.final, features.condition, name) if self.head else None


@dataclasses.dataclass(frozen=True)
class ClassGrid(Grid):
    """A class for each pixel [B, H, W], or probabilities [B, H, W, K]: a `Grid` of K channels, one a class; output as logits [B, H, W, K].

    The channels of `patches` are K; a pixel without a class (the mask of `absorbing(K)`) is zero in all of them.
    """

    def encode(self, h, c, x, dtype, name):
        known = jax.nn.one_hot(x, self.patches.channels) if jnp.issubdtype(x.dtype, jnp.integer) else x
        return super().encode(h, c, known, dtype, name)


@dataclasses.dataclass(frozen=True)
class Classes:
    """A class [B] below `states`, the null included, or probabilities [B, classes]: input by the condition; output as logits [B, classes].

    Attributes:
      states: the classes, and what else the process feeds (the mask of `absorbing(K)`).
      classes: K.
      head: "middle", an MLP on the mean token half way (the paper's M); "output", a classifier of its own, `depth` blocks on z and the
        output for it (E, which guides them by all of the network); or "", none.
      depth: of E's classifier.
    """

    states: int
    classes: int
    head: str = "middle"
    depth: int = 2

    def __post_init__(self):
        check_fields(self)
        if self.head not in ("middle", "output", ""):
            raise ValueError(f"Classes: no head {self.head!r}; choose middle, output or none ('').")

    def encode(self, h, c, x, dtype, name):
        table = nn.Embed(self.states, h.shape[-1], embedding_init=normal, dtype=dtype, name=f"{name}_in")
        known = x.astype(dtype) @ table.embedding[: self.classes].astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else table(x)
        return h, c + known

    def decode(self, features, blocks, dtype, name):
        if not self.head:
            return None
        if self.head == "middle":
            return pooled(features.middle, self.classes, dtype, name, features.norm_eps)
        both = jnp.concatenate([features.z.astype(dtype), features.out.astype(dtype)], -1)
        patches = dataclasses.replace(features.patches, channels=both.shape[-1])
        h = patches.encode(both, features.final.shape[-1], dtype, f"{name}_classifier")
        return pooled(blocks(self.depth, f"{name}_trunk", h), self.classes, dtype, name, features.norm_eps)


@dataclasses.dataclass(frozen=True)
class Vector:
    """Features [B, size]: input by the condition, output by an MLP on the mean token half way.

    Attributes:
      size: how many.
      head: whether the network predicts them.
    """

    size: int
    head: bool = True

    def __post_init__(self):
        check_fields(self)

    def encode(self, h, c, x, dtype, name):
        hidden = nn.silu(Dense(h.shape[-1], kernel_init=xavier, dtype=dtype, name=f"{name}_in")(x.astype(dtype)))
        return h, c + Dense(h.shape[-1], kernel_init=normal, dtype=dtype, name=f"{name}_condition")(hidden)

    def decode(self, features, blocks, dtype, name):
        return pooled(features.middle, self.size, dtype, name, features.norm_eps) if self.head else None
