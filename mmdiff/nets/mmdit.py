"""MMDiT: one stream of tokens per modality, one attention over all of them, each modality modulated by its own time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.nets.embed import Dense, TimeEmbed, patchify, xavier
from mmdiff.nets.layers import normal, zeros
from mmdiff.nets.routes import check_route, kept_in, put, take
from mmdiff.nets.taps import Tap, check_fused, check_taps
from mmdiff.nets.transformer import DiffusionTransformer
from mmdiff.spans import end_of


class MMDiT(DiffusionTransformer):
    """A diffusion transformer over any set of modalities.

    `__call__(x, t)`: dicts by modality, x as the modality's stream takes it, t [B] in [0, 1]; returns a dict of outputs in float32.
    A modality's time says whether it is a condition (0), absent (1) or noised. For those in `spans`, t may also hold the time at which a
    step ends, "NAME/end", by default the time itself: the output is then an average over the span (see `losses.averaged`).

    Attributes:
      modalities: name -> stream (`Patches`, `Tokens`, `Label`, `Vectors`).
      shared: one set of weights for all streams, whose tokens run through each product together, else one per stream (Esser et al. 2024).
        The modulation is always a function of the stream's own condition.
      spans: modalities whose condition also embeds how long their step is. Slopes in time grow with `time_scale`: their networks need one
        of the order of 1 (published: 1), not the 1000 of others.
      fused: modality -> the one that it shares tokens with, both `Patches` of equal grids: their embeddings are added, and so are their
        conditions, so that features of an image cost no tokens (ReDi, Kouzelis et al. 2025).
      taps: name of an output -> `Tap`, projected tokens between two blocks.
      route: (first, last), the blocks behind the first up to the last that tokens may skip in training, see `mmdiff.routing`.
      depth, width, heads, ...: see `Transformer` and `DiffusionTransformer`.

    >>> import jax
    >>> from mmdiff.nets import Label, Patches
    >>> net = MMDiT({"image": Patches(8, 8, 1, patch=2), "label": Label(states=11, classes=10)}, depth=1, width=16, heads=2)
    >>> x, t = {"image": jnp.zeros((2, 8, 8, 1)), "label": jnp.zeros(2, int)}, {"image": jnp.ones(2), "label": jnp.ones(2)}
    >>> out = jax.eval_shape(lambda key: net.apply(net.init(key, x, t), x, t), jax.random.key(0))
    >>> out["image"].shape, out["label"].shape
    ((2, 8, 8, 1), (2, 10))
    """

    modalities: Mapping[str, Any]
    shared: bool = False
    spans: tuple[str, ...] = ()
    fused: Mapping[str, str] | None = None
    taps: Mapping[str, Tap] | None = None
    route: tuple[int, int] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, host in (self.fused or {}).items():
            check_fused("MMDiT", name, self.modalities.get(name), host, None if host in self.fused else self.modalities.get(host))
        check_taps("MMDiT", self.taps, self.modalities, self.depth, self.route)
        check_route("MMDiT", self.route, self.depth)

    @nn.compact
    def __call__(self, x, t):
        names = sorted(self.modalities)  # the order in which jax flattens a dict
        missing = [name for name in names if name not in x or name not in t]
        if missing:
            raise KeyError(f"MMDiT: no input or time for {missing}; it was built for {sorted(names)}.")
        unknown = [name for name in self.spans if name not in names]
        extra = [name for name in names if end_of(name) in t and name not in self.spans]
        if unknown or extra:
            what = f"there is no modality {unknown} to have spans" if unknown else f"the times say where steps of {extra} end"
            raise UserError(f"MMDiT: {what}: set spans to those of {names} that take steps of average velocities.")
        time = self.time_embed(self.width, "time")
        span = TimeEmbed(self.width, self.dtype, self.time_scale, name="span") if self.spans else None
        kinds = self.param("modality", normal, (len(names), self.width), jnp.float32)
        streams, conditions = {}, {}
        for i, name in enumerate(names):
            stream = self.modalities[name]
            value = x[name].astype(self.dtype) if jnp.issubdtype(x[name].dtype, jnp.floating) else x[name]
            if name in (self.fused or {}):  # its host's tokens have the positions
                value = patchify(value, stream.patch)
                streams[name] = Dense(self.width, kernel_init=xavier, dtype=self.dtype, name=f"{name}_in")(value)
            else:
                streams[name] = stream.encode(value, self.width, self.dtype, name)
            conditions[name] = time(t[name]) + kinds[i].astype(self.dtype)
            if name in self.spans:
                conditions[name] += span(t[name] - t.get(end_of(name), t[name]))
        home = {name: (self.fused or {}).get(name, name) for name in names}  # whose tokens a modality has
        for name, host in (self.fused or {}).items():
            change = Dense(self.width, kernel_init=zeros, dtype=self.dtype, name=f"{name}_condition")(nn.silu(conditions.pop(name)))
            streams[host], conditions[host] = streams[host] + streams.pop(name), conditions[host] + change
        options = {"rope": self.modalities, "merged": True, "weights": dict.fromkeys(names, "") if self.shared else None}
        keep = kept_in("MMDiT", x, {name: h.shape[1] for name, h in streams.items()}, self.route)
        out, taps, whole, (first, last) = {}, self.taps or {}, None, self.route or (0, 0)
        for section, begin, end in self.sections(first, last):
            if keep and begin == first:
                whole, streams = streams, {name: take(h, keep[name]) if name in keep else h for name, h in streams.items()}
            kept = keep if first <= begin < last else {}
            inner = sorted({tap.depth - begin for tap in taps.values() if begin < tap.depth < end})
            streams, tapped = self.blocks(section, end - begin, **options)(streams, conditions, kept=kept, taps=inner)
            if kept and end == last:
                streams = {name: put(whole[name], keep[name], h) if name in keep else h for name, h in streams.items()}
            tapped |= {end - begin: streams}
            for name, tap in taps.items():
                if begin < tap.depth <= end:
                    h = tapped[tap.depth - begin][home[tap.of]]
                    out[name] = tap.project(h, self.modalities[tap.of], self.dtype, name)
        for name in names:
            out[name] = self.output(self.modalities[name], streams[home[name]], conditions[home[name]], name, x[name])
        return jax.tree.map(lambda value: value.astype(jnp.float32), out)
