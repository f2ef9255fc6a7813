"""The transformer block that all networks are stacks of, with adaLN-Zero by stream, and how a stack is compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmdiff.checks import short
from mmdiff.errors import UserError
from mmdiff.nets import fused_norm
from mmdiff.nets.embed import Dense, TimeEmbed, xavier
from mmdiff.nets.fields import Network, check_width
from mmdiff.nets.layers import MLP, Attention, CrossAttention, Layers, Vector, cut, join, layer_norm, modulate, per_token, spread, zeros
from mmdiff.nets.routes import places
from mmdiff.nets.target import axis_size, constrain, differentiable, platform, single_cpu

REMAT = {
    "none": None,
    "some": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "update", "mlp_in", "adaln"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Transformer(Network, kw_only=True):
    """The fields of every network that is a stack of transformer blocks.

    Attributes:
      depth, width, heads: blocks, features of a token, attention heads.
      mlp_ratio: hidden units of an MLP per feature.
      norm_eps: added to the variance by every LayerNorm.
      scan: compile one block and scan it (parameters "blocks/...", [depth, ...]) instead of a loop ("block_0/...").
      remat: what the backward pass finds stored: "none" (no rematerialisation: everything), "some" (what it reads: queries, keys and
        values with their bias, attention's output, updates, hidden units before their nonlinearity, modulations), "dots" (products), "full"
        (each block's input) or "offload" (products, in the host's memory: TPU and GPU). "auto" is "some" on TPUs and "none" elsewhere.
      backend: see `attention`.
      dtype: of activations and products; parameters are float32.
    """

    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    scan: bool = True
    remat: str = "none"
    backend: str | None = None
    dtype: Any = jnp.float32

    def stack(self, block: type[nn.Module], **fields: Any) -> Callable:
        """`stack` of `depth` blocks with this network's fields, and others."""
        check_heads(self.heads)
        return stack(partial(block, **self.of_blocks(), **fields), self.depth, self.scan, self.remat)

    def of_blocks(self) -> dict[str, Any]:
        """The fields that are its blocks', too."""
        return {name: getattr(self, name) for name in ("heads", "mlp_ratio", "norm_eps", "backend", "dtype")}


class DiffusionTransformer(Transformer, kw_only=True):
    """Also the fields of those whose blocks are modulated by a time.

    The recipe of 2025's networks is norm="rms", mlp="swiglu", rope=True (LightningDiT, Yao et al. 2025), and qk_norm=True (JiT).

    Attributes:
      qk_norm: queries and keys are normalised per head (RMS, learned scale).
      norm: "layer", or "rms": `x / sqrt(mean x^2 + eps)` times a learned scale.
      mlp: "gelu" or "swiglu", see `MLP`.
      rope: queries and keys are turned by their tokens' positions, each modality's its own (see `rotary`), besides what streams add.
      shift: a modulation has a shift, a scale and a gate; without, a scale and a gate: four vectors a block, not six.
      shared_adaln: the modulations of all blocks are one function of the condition, and a learned vector of each block is added
        (adaLN-single; Chen et al. 2024, PixArt-alpha): a quarter to a third fewer parameters.
      time_scale, time_offset: the sinusoidal features of a time t in [0, 1] are those of `time_scale t + time_offset`. Published DiTs count
        the steps 0 .. 999, 0 of the least noise, which ends at t = 1/1000: offset -1. SiT feeds a time that runs from noise to data: scale
        -1, offset 1.
    """

    qk_norm: bool = False
    norm: str = "layer"
    mlp: str = "gelu"
    rope: bool = False
    shift: bool = True
    shared_adaln: bool = False
    time_scale: float = 1000.0
    time_offset: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name, choices in ("norm", ("layer", "rms")), ("mlp", ("gelu", "swiglu")):
            if getattr(self, name) not in choices:
                raise UserError(f"{type(self).__name__}: {name} is {' or '.join(choices)}, not {short(getattr(self, name))}.")
        if self.rope and self.width // self.heads % 4:
            raise UserError(
                f"{type(self).__name__}: rotary positions of rows and columns need heads whose width 4 divides: width {self.width} / heads "
                f"{self.heads} is {self.width // self.heads}.")

    def of_blocks(self):
        names = ("qk_norm", "norm", "mlp", "shift", "shared_adaln")
        return super().of_blocks() | {name: getattr(self, name) for name in names}

    def sections(self, *marks: int) -> list[tuple[str, int, int]]:
        """(name, first, last) of a stack that is divided behind `marks` blocks: those behind the first N are "from_N/..." (`blocks`)."""
        edges = [0, *sorted({*marks} - {0, self.depth}), self.depth]
        return [(f"from_{first}" if first else "", first, last) for first, last in zip(edges, edges[1:])]

    def blocks(
        self, name: str = "", depth: int | None = None, heads: int = 0, rope: Mapping[str, Any] | None = None, **fields: Any
    ) -> Stack:
        """A `Stack` under a name, with this network's depth, heads and fields by default; `rope`: the streams that have positions."""
        check_heads(heads or self.heads)
        options = self.of_blocks() | {"heads": heads or self.heads, "rope": rope if self.rope else None} | fields
        stack = Stack(self.depth if depth is None else depth, self.scan, self.remat, options, name=name or None)
        if not name:
            nn.share_scope(self, stack)
        return stack

    def output(
        self, stream: Any, h: jax.Array, c: jax.Array, name: str, x: jax.Array | None = None, prefix: str | None = None
    ) -> jax.Array:
        """The last layer of a stream: `stream.decode(norm(h) (1 + scale) + shift)`, shift and scale of the condition c [B, W].

        Where the stream has a wide head, its blocks come first; x is the stream's input. The layers' prefix is f"{name}_" by default.
        """
        prefix = f"{name}_" if prefix is None else prefix
        if head := getattr(stream, "head", None):
            if x is None:
                raise UserError(f"{type(self).__name__}: the output of {name!r} is a layer on other tokens and has no wide head.")
            depth, width = head
            check_width(width, self.heads, f"the head of {name!r}")
            c = nn.silu(h + c[:, None])
            c = Dense(width, kernel_init=xavier, dtype=self.dtype, name=f"{prefix}head_condition")(c)
            h = stream.encode(x.astype(self.dtype), width, self.dtype, f"{prefix}head")
            blocks = self.blocks(f"{prefix}head_stack", depth, rope={"": stream}, nested=True)
            h = blocks({"": h}, {"": c})[0][""]
        layer = Dense(2 * h.shape[-1], kernel_init=zeros, dtype=self.dtype, name=f"{prefix}adaln")
        shift, scale = jnp.split(layer(nn.silu(c)), 2, axis=-1)
        rms = self.norm == "rms"
        normed = nn.RMSNorm(self.norm_eps, dtype=self.dtype, name=f"{prefix}norm")(h) if rms else layer_norm(h, self.norm_eps)
        return stream.decode(modulate(normed, shift, scale), self.dtype, name)

    def time_embed(self, width: int, name: str, **options: Any) -> TimeEmbed:
        """The `TimeEmbed` of this network's times."""
        return TimeEmbed(width, self.dtype, self.time_scale, self.time_offset, name=name, **options)


def check_heads(heads: int) -> None:
    """Raises UserError for heads that the mesh of the program does not divide."""
    if heads % axis_size("tensor"):
        raise UserError(f"{heads} heads do not split into {axis_size('tensor')} parts: set config.train.mesh.tensor to a divisor.")


def stack(block: partial, depth: int, scan: bool, remat: str) -> Callable:
    """`depth` copies of a block, as a loop or one scanned layer, each rematerialised by policy.

    Args:
      block: a linen class with its fields bound, `partial(Block, ...)`, whose instances are `(carry, *constants) -> (carry, output)`.
      depth, scan, remat: as in `Transformer`.

    Returns `(carry, *constants, each=None) -> (carry, outputs [depth, ...])`; of a pytree `each` [depth, ...] every block gets its own
    part, as its last argument.
    """
    if remat == "auto":
        remat = "some" if platform() == "tpu" else "none"
    if remat not in REMAT:
        raise UserError(f"no remat policy {remat!r}; choose one of auto, {', '.join(REMAT)}.")
    kind, fields = block.func, block.keywords
    if remat != "none":
        kind = nn.remat(kind, policy=REMAT[remat], prevent_cse=not scan)

    def loop(carry, *constants, each=None):
        outputs = []
        for i in range(depth):
            # XLA's CPU compiler would fuse the sum of all later blocks' gradients into each earlier block.
            carry = jax.lax.optimization_barrier(carry) if single_cpu() else carry
            own = () if each is None else (jax.tree.map(lambda leaf, i=i: leaf[i], each),)
            carry, extra = kind(**fields, name=f"block_{i}")(*constrain((carry, *constants)), *own)
            outputs.append(extra)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs) if outputs else None

    def scanned(carry, *constants, each=None):
        def body(module, carry, each):
            return module(*constrain((carry, *constants)), *(() if each is None else (each,)))

        layers = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)
        return layers(kind(**fields, name="blocks"), carry, each)

    return scanned if scan else loop


class Stack(nn.Module):
    """A `stack` of `Block`s with fields `options`; a cache is of all blocks, [depth, ...]."""

    depth: int
    scan: bool
    remat: str
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, streams, conditions={}, visible={}, context=None, added={}, cache=None, keep=False, kept={}, taps=()):
        """-> (streams, what blocks keep, [depth, ...]), or for taps, numbers of blocks, (streams, {number: streams behind so many})."""
        if not self.depth:
            return streams, {}
        block = partial(Block, **self.options, keep=keep)
        if self.options["shared_adaln"]:
            made, modulations = Layers(self.options.get("weights"), (), self.options["dtype"]), {}
            for name, c in conditions.items():
                size = vectors(name, self.options["shift"], self.options.get("cross_stream")) * streams[name].shape[-1]
                modulations[name] = made(Dense, name, "blocks_adaln", features=size, kernel_init=zeros)(nn.silu(c))
            conditions = modulations
        if taps:
            block, cache = partial(TappedBlock, **self.options), jnp.arange(1, self.depth + 1)
            streams = streams, {number: jax.tree.map(jnp.zeros_like, streams) for number in taps}
        found, outputs = stack(block, self.depth, self.scan, self.remat)(streams, conditions, visible, context, added, kept, each=cache)
        return found if taps else (found, outputs)


def vectors(stream: str, shift: bool, cross_stream: str | None) -> int:
    """How many vectors modulate a stream in a block: (shift,) scale and gate of attention, MLP and perhaps cross-attention."""
    return (3 if shift else 2) * (3 if stream == cross_stream else 2)


class Block(nn.Module):
    """A transformer block over streams of tokens: attention among them, cross-attention of one, and an MLP per token.

    With f one of these, and c the stream's condition (adaLN-Zero, the identity at initialisation; Peebles & Xie 2023):

        x <- x + gate f(LN(x) (1 + scale) + shift)        (shift, scale, gate) of each f = split(Dense(silu(c)))

    A stream without a condition has `x <- x + f(LN(x))`, the norm with a scale and a bias of its own.

    Attributes:
      attends, qk_norm: see `Attention`.
      rope: stream -> the `embed.Stream` whose positions turn its queries and keys.
      norm, mlp, shift: as in `DiffusionTransformer`.
      bias: of the products of attention and MLP.
      gates: the updates of streams without a condition are multiplied by learned vectors, 0 at first.
      shared_adaln: the conditions are the modulations, to which a vector of this block is added.
      weights, attention_weights: stream -> the prefix of its layers (see `Attention`); those of attention by default as the others.
      nested: the layers of attention lie in "attention/", as in DiT, not in the block itself.
      merged: all streams run as one: norms, attention and the layers that they share work on all tokens at once.
      cross_stream: the one that cross-attends to the context.
      keep: return keys and values of all streams, too.
      mlp_norm_eps: of the MLPs' norms, `norm_eps` by default.
      heads, mlp_ratio, norm_eps, backend, dtype: as in `Transformer`.
    """

    heads: int
    attends: Mapping[str, tuple[str, ...]] | None = None
    weights: Mapping[str, str] | None = None
    attention_weights: Mapping[str, str] | None = None
    nested: bool = False
    merged: bool = False
    cross_stream: str | None = None
    keep: bool = False
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    norm: str = "layer"
    mlp: str = "gelu"
    rope: Mapping[str, Any] | None = None
    shift: bool = True
    bias: bool = True
    gates: bool = False
    shared_adaln: bool = False
    norm_eps: float = 1e-6
    mlp_norm_eps: float | None = None
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, streams, conditions={}, visible={}, context=None, added={}, kept={}, cache={}):
        """-> (streams, {name: (keys, values)}, empty without `keep`).

        Args:
          streams: name -> tokens [B, N, W].
          conditions: name -> [B, W], or of each token [B, N, W].
          visible, cache: as in `Attention`.
          context: (tokens [B, M, C], bool [B, M]) for `cross_stream`; False masks one.
          added: name -> [B, N, D], which is added to the stream by a product of this block.
          kept: name -> int [B, N], the places of the stream's tokens among all of its own, where some skip this block.
        """
        names, streams, weights, parts = sorted(streams), dict(streams), self.weights or {}, ()
        members = {name: [name] for name in streams}  # stream -> whose tokens it consists of
        if self.merged:
            parts = tuple((weights.get(name, name), streams[name].shape[1]) for name in names)
            streams, members = {"": join([streams[name] for name in names])}, {"": names}
        made, lengths = Layers(weights, parts, self.dtype), [length for _, length in parts]

        modulations = {}  # stream -> ((shift,) scale, gate) of its attention, MLP and cross-attention, each for all members
        for stream, members_of in members.items() if conditions else ():
            count, alike, found = vectors(stream, self.shift, self.cross_stream), {}, {}
            size, step = count * streams[stream].shape[-1], 3 if self.shift else 2
            for name in members_of:
                alike.setdefault((weights.get(name, name), conditions[name].shape), []).append(name)
            for (prefix, _), those in alike.items():  # one product, thus one sum of its gradient over devices
                c = conditions[those[0]] if len(those) == 1 else jnp.stack([conditions[name] for name in those])
                if self.shared_adaln:
                    whole = c + made.layer(Vector, prefix, "adaln", features=size)()
                else:
                    whole = checkpoint_name(made.layer(Dense, prefix, "adaln", features=size, kernel_init=zeros)(nn.silu(c)), "adaln")
                found |= dict(zip(those, whole if len(those) > 1 else [whole]))
            each = list(zip(*(jnp.split(found[name], count, axis=-1) for name in members_of)))
            modulations[stream] = {which: each[step * i : step * i + step] for i, which in enumerate(("attention", "mlp", "cross"))}

        def in_kernels(name, vectors):
            backend = differentiable(self.backend)
            known = backend == "pallas" or (backend is None and fused_norm.applies(streams[name]))
            return known and all(each.ndim == 2 for each in vectors)

        def before(name, which):
            eps = self.mlp_norm_eps if which == "mlp" and self.mlp_norm_eps is not None else self.norm_eps
            if name not in modulations or self.norm == "rms":
                kind = nn.RMSNorm if self.norm == "rms" else nn.LayerNorm
                normed = made(kind, name, f"{which}_norm", epsilon=eps)(streams[name])
                if name not in modulations:
                    return normed
            *shift, scale, _ = modulations[name][which]
            if self.norm == "layer" and self.shift and in_kernels(name, scale):
                out, streams[name] = fused_norm.norm_and_modulation(streams[name], shift[0], scale, eps, lengths)
                return out
            if self.norm == "layer":
                normed = layer_norm(streams[name], eps)
            pieces = zip(cut(normed, lengths), *(shift or [[None] * len(scale)]), scale)
            return join([modulate(*piece) for piece in pieces])

        def after(name, which, update):
            if name not in modulations:
                gate = made.layer(Vector, weights.get(name, name), f"{which}_gate", features=update.shape[-1])() if self.gates else 1
                return streams[name] + (gate * update if self.gates else update)
            update, gates = checkpoint_name(update, "update"), modulations[name][which][-1]
            if len(gates) > 1 and in_kernels(name, gates):
                return streams[name] + spread(gates, lengths) * update
            gated = zip(cut(update, lengths), gates)
            return streams[name] + join([per_token(gate) * piece for piece, gate in gated])

        def flat(module):
            """The module, whose layers lie in this one."""
            nn.share_scope(self, module)
            return module

        for name, value in added.items():
            streams[name] = streams[name] + made(Dense, name, "in", features=streams[name].shape[-1], kernel_init=xavier)(value)
        weights = weights if self.attention_weights is None else self.attention_weights
        turned = {name: (stream,) for name, stream in (self.rope or {}).items() if name in streams}
        if self.merged and self.rope:
            turned = {"": tuple(self.rope[name] for name in names)}
            kept = {"": places(kept, names, [self.rope[name].length for name in names])} if kept else {}
        attend = Attention(
            self.heads, self.attends, weights, parts, self.qk_norm, turned, self.bias, xavier, self.backend, self.dtype, name="attention")
        updates, keys = (attend if self.nested else flat(attend))({n: before(n, "attention") for n in streams}, visible, cache, kept)
        streams |= {name: after(name, "attention", update) for name, update in updates.items()}
        if self.cross_stream in streams and context is not None:
            cross = flat(CrossAttention(self.heads, "cross_", xavier, self.backend, self.dtype, name="cross"))
            streams[self.cross_stream] = after(self.cross_stream, "cross", cross(before(self.cross_stream, "cross"), *context))
        for name in streams:
            update = made(MLP, name, "mlp", ratio=self.mlp_ratio, kind=self.mlp, bias=self.bias)(before(name, "mlp"))
            streams[name] = after(name, "mlp", update)
        if self.merged:
            streams = dict(zip(names, cut(streams[""], lengths)))
        return streams, keys if self.keep else {}


class TappedBlock(Block):
    """A block of a stack that is tapped: carries (streams, {number: streams behind that block}); its last argument is its own number.

    What is tapped is carried along, not stacked or cut out of the scan: the memory is that of one block's output for each tap, and the
    parameters have the names that they have without taps.
    """

    def __call__(self, carry, conditions, visible, context, added, kept, number):
        streams, _ = super().__call__(carry[0], conditions, visible, context, added, kept)
        here = {tap: jax.tree.map(partial(jnp.where, number == tap), streams, before) for tap, before in carry[1].items()}
        return (streams, here), {}
