"""MT-Diffusion's network on a DiT: one modality is diffused, others enter as conditions and leave by heads on its features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.nets.dit import Block, check_split, layer_norm, modulate, stack, zeros
from mmdiff.nets.embed import Dense, Patches, TimeEmbed, patchify, xavier
from mmdiff.nets.fields import Network, check_fields

embedding = nn.initializers.normal(0.02)


class Seen(NamedTuple):
    """What a head may read: the tokens half way and at the end [B, N, width], the condition [B, width], z, the output, their patches,
    and the norms' epsilon."""

    middle: jax.Array
    final: jax.Array
    condition: jax.Array
    z: jax.Array
    out: jax.Array
    patches: Patches
    norm_eps: float


class MultiTaskDiT(Network):
    """A DiT on `target` beside which the modalities of `beside` are conditions, outputs of heads, or both.

    `__call__(x, t)`: dicts by modality, x as the process feeds it, t [B]; returns {target: [B, H, W, C], ...} with an output of every
    modality that has a head, in float32. Of the time of a modality beside the target it sees whether it is known (0), hidden or
    absent (1).

    Attributes:
      patches: of the target.
      beside: name -> `Classes`, `ClassGrid`, `Grid` or `Vector`.
      depth: blocks; heads that read the middle do so after half of them. scan, remat, dtype, backend, qk_norm,
        norm_eps, time_scale: as in `DiT`.
    """

    patches: Patches
    beside: Mapping[str, Any]
    depth: int
    width: int
    heads: int
    target: str = "image"
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    norm_eps: float = 1e-6
    time_scale: float = 1000.0
    scan: bool = True
    remat: str = "none"
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, t):
        check_split(self.heads)
        names = sorted(self.beside)  # the order in which jax flattens a dict
        missing = [name for name in (self.target, *names) if name not in x or name not in t]
        if missing:
            raise KeyError(f"MultiTaskDiT: no input or time for {missing}; it was built for {[self.target, *names]}.")
        z = x[self.target]
        h = self.patches.encode(z.astype(self.dtype), self.width, self.dtype, self.target)
        c = TimeEmbed(self.width, self.dtype, self.time_scale, name="time")(t[self.target])
        for name in names:
            # A clean target carries nothing: what is hidden beside it is absent.
            hidden = (t[name] < 1) & (t[self.target] > 0)
            state = jnp.where(t[name] > 0, jnp.where(hidden, 1, 2), 0)
            c = c + nn.Embed(3, self.width, embedding_init=embedding, dtype=self.dtype, name=f"{name}_state")(state)
            h, c = self.beside[name].enter(h, c, x[name], self.dtype, name)
        options = dict(
            heads=self.heads, mlp_ratio=self.mlp_ratio, qk_norm=self.qk_norm, norm_eps=self.norm_eps, backend=self.backend,
            dtype=self.dtype)  # fmt: skip
        half = partial(Trunk, scan=self.scan, remat=self.remat, options=options)
        middle = half(depth=self.depth // 2, name="first")(h, c)
        final = half(depth=self.depth - self.depth // 2, name="second")(middle, c)
        out = leave(self.patches, final, c, self.dtype, self.target, self.norm_eps)
        seen = Seen(middle, final, c, z, out, self.patches, self.norm_eps)
        heads = {name: self.beside[name].leave(seen, half, self.dtype, name) for name in names}
        outputs = {self.target: out, **{name: head for name, head in heads.items() if head is not None}}
        return {name: value.astype(jnp.float32) for name, value in outputs.items()}


class Trunk(nn.Module):
    """Blocks of a DiT, with fields `options`."""

    depth: int
    scan: bool
    remat: str
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, h, c):
        return stack(partial(Block, **self.options), self.depth, self.scan, self.remat)(h, c) if self.depth else h


def leave(patches: Patches, h: jax.Array, c: jax.Array, dtype: Any, name: str, eps: float) -> jax.Array:
    """The output block of an image: norm, modulated by the condition, and a product; [B, N, width] -> [B, H, W, C]."""
    layer = Dense(2 * h.shape[-1], kernel_init=zeros, dtype=dtype, name=f"{name}_adaln")
    shift, scale = jnp.split(layer(nn.silu(c)), 2, axis=-1)
    return patches.decode(modulate(layer_norm(h, eps), shift, scale), dtype, name)


def pooled(h: jax.Array, size: int, dtype: Any, name: str, eps: float) -> jax.Array:
    """A layer and a product on the mean token: [B, N, width] -> [B, size]."""
    h = layer_norm(layer_norm(h, eps).mean(1), eps)
    h = nn.gelu(Dense(2 * h.shape[-1], kernel_init=xavier, dtype=dtype, name=f"{name}_head")(h), approximate=True)
    return Dense(size, kernel_init=zeros, dtype=dtype, name=f"{name}_out")(h)


# A modality beside the target: `enter` adds it to the tokens or to the condition, `leave` is its head. Called inside a linen module,
# whose parameters they create under the modality's name.


@dataclasses.dataclass(frozen=True)
class Grid:
    """Images on the target's grid of patches [B, H, W, C]: in like further channels of it, out by a copy of its output block.

    Attributes:
      patches: as many as the target's.
      head: whether the network tells it.
    """

    patches: Patches
    head: bool = True

    def enter(self, h, c, x, dtype, name):
        tokens = Dense(h.shape[-1], kernel_init=xavier, dtype=dtype, name=f"{name}_in")(patchify(x.astype(dtype), self.patches.patch))
        return h + tokens, c

    def leave(self, seen, half, dtype, name):
        return leave(self.patches, seen.final, seen.condition, dtype, name, seen.norm_eps) if self.head else None


@dataclasses.dataclass(frozen=True)
class ClassGrid(Grid):
    """A class for each pixel [B, H, W], or probabilities [B, H, W, K]: a `Grid` of K channels, one a class; out as logits [B, H, W, K].

    The channels of `patches` are K; a pixel without a class (the mask of `absorbing(K)`) is zero in all of them.
    """

    def enter(self, h, c, x, dtype, name):
        known = jax.nn.one_hot(x, self.patches.channels) if jnp.issubdtype(x.dtype, jnp.integer) else x
        return super().enter(h, c, known, dtype, name)


@dataclasses.dataclass(frozen=True)
class Classes:
    """A class [B] below `states`, the null included, or probabilities [B, classes]: in by the condition; out as logits [B, classes].

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

    def enter(self, h, c, x, dtype, name):
        table = nn.Embed(self.states, h.shape[-1], embedding_init=embedding, dtype=dtype, name=f"{name}_in")
        known = x.astype(dtype) @ table.embedding[: self.classes].astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else table(x)
        return h, c + known

    def leave(self, seen, half, dtype, name):
        if not self.head:
            return None
        if self.head == "middle":
            return pooled(seen.middle, self.classes, dtype, name, seen.norm_eps)
        both = jnp.concatenate([seen.z.astype(dtype), seen.out.astype(dtype)], -1)
        patches = dataclasses.replace(seen.patches, channels=both.shape[-1])
        h = patches.encode(both, seen.final.shape[-1], dtype, f"{name}_classifier")
        return pooled(half(depth=self.depth, name=f"{name}_trunk")(h, seen.condition), self.classes, dtype, name, seen.norm_eps)


@dataclasses.dataclass(frozen=True)
class Vector:
    """Features [B, size]: in by the condition, out by an MLP on the mean token half way.

    Attributes:
      size: how many.
      head: whether the network tells them.
    """

    size: int
    head: bool = True

    def __post_init__(self):
        check_fields(self)

    def enter(self, h, c, x, dtype, name):
        hidden = nn.silu(Dense(h.shape[-1], kernel_init=xavier, dtype=dtype, name=f"{name}_in")(x.astype(dtype)))
        return h, c + Dense(h.shape[-1], kernel_init=embedding, dtype=dtype, name=f"{name}_condition")(hidden)

    def leave(self, seen, half, dtype, name):
        return pooled(seen.middle, self.size, dtype, name, seen.norm_eps) if self.head else None


SIGNAL = 0.1  # alpha / sigma at the time at which a class is encoded


def by_network(
    apply: Callable,
    chain: Any,
    shape: tuple[int, ...],
    name: str,
    classes: int,
    target: str = "image",
    rms: float = 0.8,
    mixed: bool = False,
) -> Callable:
    """An encoder `(params, probabilities [B, K]) -> [B, *shape]` of a class: what the network believes of z_0 where nothing else is there.

    E(c) = rms x0_hat / RMS(x0_hat), x0_hat = chain.clean(network(z = 0 at t, class c known)), near E[z_0 | c] up to a factor, whatever
    the network predicts. (The raw output of eps, v or velocity is *minus* that.) t is the last of 1/1000, ..., 1 at which
    alpha >= sigma / 10: where alpha is tiny, all of an output for eps is error. Of probabilities it is the mean of E (K network calls), or,
    for many classes, `mixed`: E of the mean embedding (B calls). It depends on no z_t, and no gradient passes. For a network of the two
    modalities alone.

    Args:
      apply: the network. classes: K. target: the name of z. rms: of what is returned.
      chain: the process of z without what is added, a `Gaussian`; None for the raw output at t = 1, which is what the weights of runs
        from before the belief know.
      shape: of z. name: of the class.
    """
    raw = chain is None
    with jax.ensure_compile_time_eval():
        t = 1.0 if raw else last_time(chain.schedule, SIGNAL)

    def images(params, x):
        z, end = jnp.zeros((len(x), *shape)), jnp.full(len(x), t, jnp.float32)
        net_z, net_t = (z, end) if raw else chain.inputs(z, end)
        out = apply(params, {target: net_z, name: x}, {target: net_t, name: jnp.zeros(len(x))})[target]
        believed = (out if raw else chain.clean(out, z, end))[..., : shape[-1]]
        square = (believed**2).mean(tuple(range(1, believed.ndim)), keepdims=True) + (1e-6 if raw else 0.0)
        return rms * believed / jnp.sqrt(jnp.where(square > 0, square, 1.0))

    def encode(params, probabilities):
        if mixed:
            return images(params, probabilities)
        return jnp.tensordot(probabilities, images(params, jnp.arange(classes)), 1)

    return encode


def last_time(schedule: Callable, signal: float) -> float:
    """The last of the times 1/1000, ..., 1 at which alpha >= signal sigma; the first if there is none."""
    t = np.arange(1, 1001, dtype=np.float32) / 1000
    alpha, sigma = (np.asarray(c) for c in schedule(jnp.asarray(t)))
    return float(t[max(np.flatnonzero(alpha >= signal * sigma), default=0)])
