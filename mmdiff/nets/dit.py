"""DiT: the diffusion transformer with adaLN-Zero (Peebles & Xie 2023), parameter for parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.nets.embed import Dense, Patches, Prefixed, patchify
from mmdiff.nets.layers import normal, zeros
from mmdiff.nets.routes import check_route, kept_in, put, take
from mmdiff.nets.taps import Tap, check_fused, check_taps
from mmdiff.nets.transformer import DiffusionTransformer
from mmdiff.routing import kept_of
from mmdiff.spans import check_no_ends

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "H": (32, 1280, 16)}  # depth, width, heads


def sizes(size: str) -> tuple[int, int, int]:
    """(depth, width, heads) of the published sizes: "S", "B", "L", "XL", or JiT's "H"."""
    if size not in SIZES:
        raise UserError(f"no DiT of size {size!r}; choose one of {', '.join(SIZES)}.")
    return SIZES[size]


def options(model: Mapping[str, Any], without: str | Sequence[str] = ()) -> dict[str, Any]:
    """The options of a network that the `model` section of a config states, `MMDiT(..., **options(config.model, without="patch"))`.

    A published `size` becomes depth, width and heads, `dtype` a type; layers are not scanned unless it says so (small networks compile
    faster in that way). What it states of other parts is left out by name.
    """
    found = {"scan": False, **model}
    without = (without,) if isinstance(without, str) else tuple(without)
    if isinstance(found.get("size"), str) and "size" not in without:
        found |= zip(("depth", "width", "heads"), sizes(found.pop("size")))
    if "dtype" in found:
        found["dtype"] = jnp.dtype(found["dtype"])
    return {name: value for name, value in found.items() if name not in without}


class DiT(DiffusionTransformer):
    """Class-conditional DiT on images or latents.

    `__call__(x, t, label)`: x [B, H, W, C] float, t [B] in [0, 1], label [B] int in 0 .. classes, where `classes` is the null row (a
    `Given(null=classes)` or the mask of `absorbing(classes)`). Returns [B, H, W, C], or 2C channels with `learn_sigma`, in float32 or
    wider. A network with `fused` takes `others`, {name: (x, t)} of these, too, and with that or `taps` it returns (the image's output,
    {name: output}).

    Attributes:
      patches: the image's shape and patch size.
      classes: of the labels.
      in_context: (tokens, first) puts so many tokens before the image's behind the first blocks, all of them the label's embedding plus a
        learned vector each; they see and are seen, and the last layer leaves them out (JiT: 32 behind the fourth block of B).
      route: as in `MMDiT`; with in_context tokens not across the place where these come in.
      fused: name -> `Patches` of features of the image, as many as the image's, which share its tokens: their embedding is added to them,
        and that of their time to the condition (ReDi, Kouzelis et al. 2025). What they add is 0 at first: weights of an image's network
        compute what they did.
      taps: name of an output -> `Tap` of the image, projected tokens between two blocks (REPA, Yu et al. 2025).
      freq_shift, mlp_norm_eps: see `frequencies` and `Block`. 1 and 1e-5 in diffusers, whose DiT is another function of the same weights.
      depth, width, heads, ...: see `Transformer` and `DiffusionTransformer`; `DiT.preset("XL", 2)` builds the published sizes.
    """

    patches: Patches
    classes: int
    in_context: tuple[int, int] | None = dataclasses.field(default=None, kw_only=True)
    route: tuple[int, int] | None = dataclasses.field(default=None, kw_only=True)
    freq_shift: float = dataclasses.field(default=0.0, kw_only=True)
    mlp_norm_eps: float | None = dataclasses.field(default=None, kw_only=True)
    fused: Mapping[str, Patches] | None = dataclasses.field(default=None, kw_only=True)
    taps: Mapping[str, Tap] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        for name, stream in (self.fused or {}).items():
            check_fused("DiT", name, stream, "image", self.patches)
        check_taps("DiT", self.taps, {**(self.fused or {}), "image": self.patches}, self.depth, self.route)
        check_route("DiT", self.route, self.depth)
        if self.in_context is not None:
            if len(self.in_context) != 2 or not self.in_context[1] < self.depth:
                raise UserError(f"DiT: in_context is (tokens, blocks before them), fewer than {self.depth}, not {self.in_context}.")
            if self.route and self.route[0] < self.in_context[1] < self.route[1]:
                raise UserError(f"DiT: the in-context tokens come in behind block {self.in_context[1]}, where tokens skip: {self.route}.")

    @classmethod
    def preset(
        cls, size: str, patch: int, *, image: int = 32, channels: int = 4, classes: int = 1000, learn_sigma: bool = True, **options
    ) -> DiT:
        """The published DiT-`size`/`patch`: `DiT.preset("XL", 2)` works on 32x32x4 latents of 256-pixel images.

        >>> import jax
        >>> inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, int)
        >>> shapes = jax.eval_shape(DiT.preset("B", 2).init, jax.random.key(0), *inputs)
        >>> f"{sum(leaf.size for leaf in jax.tree.leaves(shapes)):,}"
        '130,315,808'
        """
        depth, width, heads = sizes(size)
        patches = Patches(image, image, channels, patch, 2 * channels if learn_sigma else channels)
        return cls(patches, classes, depth=depth, width=width, heads=heads, **options)

    @nn.compact
    def __call__(self, x, t, label, keep=None, others=None):
        """`keep`: int [B, M], the patches that do not skip the blocks of `route`; `others`: as above."""
        kept_in("DiT", {} if keep is None else {kept_of("image"): keep}, {"image": self.patches.length}, self.route)
        fused, taps, out = self.fused or {}, self.taps or {}, {}
        h = self.patches.encode(x.astype(self.dtype), self.width, self.dtype, "image")
        time = self.time_embed(self.width, "time", freq_shift=self.freq_shift)
        y = nn.Embed(self.classes + 1, self.width, embedding_init=normal, dtype=self.dtype, name="label")(label)
        c = time(t) + y
        added = partial(Dense, self.width, kernel_init=zeros, dtype=self.dtype)
        for name, patches in fused.items():
            value, at = others[name]
            h = h + added(name=f"{name}_in")(patchify(value.astype(self.dtype), patches.patch))
            c = c + added(name=f"{name}_condition")(nn.silu(time(at)))
        stream, before, whole = self.patches, 0, None
        (count, start), (first, last) = self.in_context or (0, 0), self.route or (0, 0)
        for section, begin, end in self.sections(start, first, last):
            if count and begin == start:
                places = nn.Embed(count, self.width, embedding_init=normal, dtype=self.dtype, name="in_context")(jnp.arange(count))
                h, stream, before = jnp.concatenate([y[:, None] + places, h], axis=1), Prefixed(count, self.patches), count
            if keep is not None and begin == first:
                keep = jnp.concatenate([jnp.broadcast_to(jnp.arange(before), (len(keep), before)), before + keep], axis=1)
                whole, h = h, take(h, keep)
            kept = {"": keep} if keep is not None and first <= begin < last else {}
            blocks = self.blocks(section, end - begin, rope={"": stream}, mlp_norm_eps=self.mlp_norm_eps, nested=True)
            inner = sorted({tap.depth - begin for tap in taps.values() if begin < tap.depth < end})
            streams, tapped = blocks({"": h}, {"": c}, kept=kept, taps=inner)
            h = put(whole, keep, streams[""]) if kept and end == last else streams[""]
            tapped |= {end - begin: {"": h}}
            for name, tap in taps.items():
                if begin < tap.depth <= end:
                    out[name] = tap.project(tapped[tap.depth - begin][""][:, before:], self.patches, self.dtype, name)
        h = h[:, before:] if before else h
        out |= {name: self.output(patches, h, c, name, others[name][0]) for name, patches in fused.items()}
        image, out = jax.tree.map(_wide, (self.output(self.patches, h, c, "image", x, prefix=""), out))
        return (image, out) if fused or taps else image


def _wide(out: jax.Array) -> jax.Array:
    return out.astype(jnp.promote_types(out.dtype, jnp.float32))


def as_joint(net: nn.Module, image: str = "image", label: str = "label"):
    """A DiT as the network of a `Joint`: `apply(params, {image, label}, times) -> {image: out}`. The label's time is in its null row.

    What is fused with the image, and the taps, have their own names.
    """
    fused = getattr(net, "fused", None) or {}

    def apply(params, x, t):
        check_no_ends("DiT", t)
        given = {"others": {name: (x[name], t[name]) for name in fused}} if fused else {}
        given |= {"keep": x[kept_of(image)]} if kept_of(image) in x else {}
        out = net.apply(params, x[image], t[image], x[label], **given)
        return {image: out[0], **out[1]} if isinstance(out, tuple) else {image: out}

    return apply
