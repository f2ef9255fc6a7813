r"""DiffDis' dual-stream transformer: one trunk that draws images of a text, and denoises the text's vector given an image.

The two tasks are two passes over streams of tokens, the image I, the caption C and the query Q (one token, the noised vector):

    row reads column   I         C         Q
    I                  always    draw      name, if `two_way`
    C                  draw      draw      never
    Q                  name      never     name

The query takes no part in drawing and the caption none in naming, so neither can leak. Within a pass a condition is hidden where it
is absent: the caption at t = 1 and wherever it is padding (the id 0, or features that are all 0), the image, from naming, at t = 1.
What a pass diffuses is always seen. A hidden token has a weight of exactly 0: outputs do not depend on it, bit for bit.

Source: Huang et al. 2023 (DiffDis), carried over from a U-Net.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.nets.attention import attention, split_heads
from mmdiff.nets.dit import MLP, REMAT, check_split, layer_norm, modulate, zeros
from mmdiff.nets.embed import Dense, Patches, TimeEmbed, xavier
from mmdiff.nets.fields import Network, check_width
from mmdiff.nets.target import one_cpu, placed
from mmdiff.nets.towers import learned_logits, logit_outputs


class DualBlock(nn.Module):
    """Attention between the streams that are there, and an MLP per token.

    `tie`: which weights the streams share: "none" (each its own, as `JointBlock`), "attention" (the query those of the image's
    attention; the caption is no stream but a context that the image's tokens cross-attend to), or "all" (plain blocks with an
    affine norm, without a condition). The others are modulated by their stream's condition, adaLN-Zero.
    """

    heads: int
    tie: str
    two_way: bool
    reinject: bool = False
    cross: bool = False
    keep: bool = False
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    norm_eps: float = 1e-6
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, streams, conditions, visible, entry, context, seen):
        """Returns the streams, and with `keep` their keys and values by name.

        Args:
          streams: name -> tokens [B, N, W]. conditions: name -> [B, W].
          visible: name -> bool [B, N] for streams of which something may be hidden.
          entry: [B, 1, D], what is added to the query by a product of this block, if `reinject`.
          context: [B, L, W], what the image cross-attends to; hidden as visible["text"] says.
          seen: name -> (keys, values) of streams that are not there, from an earlier call.
        """
        width = next(iter(streams.values())).shape[-1]
        made = {}

        def layer(kind, name, part, **fields):
            attends = self.tie == "attention" and name == "query" and part in ("qkv", "out")
            tied = "" if self.tie == "all" else "image" if attends else name
            path = f"{tied}_{part}" if tied else part
            if path not in made:
                made[path] = kind(**fields, dtype=self.dtype, name=path)
            return made[path]

        def dense(name, part, features, init=xavier):
            return layer(Dense, name, part, features=features, kernel_init=init)

        parts = {}  # stream -> the shift, scale and gate of its attention, MLP and cross-attention
        for name in streams if self.tie != "all" else ():
            count = 9 if self.cross and name == "image" else 6
            values = jnp.split(dense(name, "adaln", count * width, zeros)(nn.silu(conditions[name])), count, axis=-1)
            parts[name] = dict(zip(("attention", "mlp", "cross"), (values[i : i + 3] for i in range(0, count, 3))))

        def before(name, which, h):
            if self.tie == "all":
                return layer(nn.LayerNorm, name, f"{which}_norm", epsilon=self.norm_eps)(h)
            return modulate(layer_norm(h, self.norm_eps), *parts[name][which][:2])

        def after(name, which, h, update):
            return h + update if self.tie == "all" else h + parts[name][which][2][:, None] * update

        streams = dict(streams)
        if self.reinject and "query" in streams:
            streams["query"] = streams["query"] + dense("query", "in", width)(entry)
        asks, holds = {}, dict(seen)
        for name, h in streams.items():
            q, k, v = split_heads(dense(name, "qkv", 3 * width)(before(name, "attention", h)), self.heads)
            if self.qk_norm:
                q, k = layer(nn.RMSNorm, "", "q_norm")(q), layer(nn.RMSNorm, "", "k_norm")(k)
            asks[name], holds[name] = q, (k, v)
        columns = {"image": ["image", "text"] + ["query"] * self.two_way, "text": ["image", "text"], "query": ["image", "query"]}
        for name, q in asks.items():
            read = [column for column in columns[name] if column in holds]
            k, v = (jnp.concatenate(both, axis=1) for both in zip(*(holds[column] for column in read)))
            mask = None
            if any(column in visible for column in read):
                all_of = [jnp.ones(holds[column][0].shape[:2], bool) for column in read]
                mask = jnp.concatenate([visible.get(column, ones) for column, ones in zip(read, all_of)], axis=1)[:, None, None]
            update = attention(q, k, v, mask, self.backend).reshape(*q.shape[:2], width)
            streams[name] = after(name, "attention", streams[name], dense(name, "out", width)(update))
        if self.cross and context is not None:
            streams["image"] = self._cross(streams["image"], context, visible["text"], dense, before, after)
        for name, h in streams.items():
            mlp = layer(MLP, name, "mlp", ratio=self.mlp_ratio)
            streams[name] = after(name, "mlp", h, mlp(before(name, "mlp", h)))
        return streams, {name: holds[name] for name in asks} if self.keep else {}

    def _cross(self, h, context, visible, dense, before, after):
        b, n, width = h.shape
        q = dense("cross", "q", width)(before("image", "cross", h)).reshape(b, n, self.heads, -1)
        kv = dense("cross", "kv", 2 * width)(context).reshape(b, context.shape[1], self.heads, 2, -1)
        update = attention(q, kv[..., 0, :], kv[..., 1, :], visible[:, None, None], self.backend).reshape(b, n, width)
        # Without any text there is nothing to attend to: the mean over hidden tokens must not come through.
        return after("image", "cross", h, jnp.where(visible.any(1)[:, None, None], dense("cross", "out", width)(update), 0))


class Layers(nn.Module):
    """`depth` blocks with fields `options`, in a loop or one scanned layer: returns the streams and what the blocks kept, stacked."""

    depth: int
    scan: bool
    remat: str
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, streams, conditions=None, visible=None, entry=None, context=None, seen=None, keep=False):
        constants, seen = (conditions or {}, visible or {}, entry, context), seen or {}
        if not self.depth:
            return streams, {}
        if self.remat not in REMAT:
            raise UserError(f"no remat policy {self.remat!r}; choose one of {', '.join(REMAT)}.")
        kind = DualBlock
        if self.remat != "none":
            kind = nn.remat(kind, policy=REMAT[self.remat], prevent_cse=not self.scan)
        block = partial(kind, **self.options, keep=keep)
        if self.scan:

            def body(module, streams, seen):
                return module(*placed((streams, *constants)), seen)

            layers = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            return layers(block(name="blocks"), streams, seen)
        kept = []
        for i in range(self.depth):
            streams = jax.lax.optimization_barrier(streams) if one_cpu() else streams  # as in `nets.dit.stack`
            streams, own = block(name=f"block_{i}")(*placed((streams, *constants)), jax.tree.map(lambda a, i=i: a[i], seen))
            kept.append(own)
        return streams, jax.tree.map(lambda *parts: jnp.stack(parts), *kept)


class DualStream(Network):
    """DiffDis' network: two passes through one trunk, `draw` and `name` (see the module's head).

    `__call__(x, t)`: dicts by modality, x["image"] [B, H, W, C], x["text"] as its stream takes it (or not there: no caption),
    x["query"] [B, size]; t [B] each. Returns, in float32, {"image": ...} of the pass "draw" ("text", too, with `captions`) and
    {"query": [B, size], "logit_scale": [B], "logit_bias": [B]} of "name": the scale and the bias are learned numbers for
    `matching.embedding_loss`, the same for all examples.

    By default both passes run. Under jit one whose outputs nobody uses costs nothing; `tasks` says it outright:

        draw, name = (partial(net.apply, tasks=(task,)) for task in ("draw", "name"))

    With weights fresh from `init` the query adds nothing to the image, and what draws is a `DiT` or `MMDiT` with `text`.

    Attributes:
      patches: the image's. text: its stream, `Tokens` or `Vectors`; None for a network without captions. size: of the query.
      depth: blocks that draw. shared: how many of them name, too (rho = shared / depth; about half).
      fusion: "mmdit" (own weights for every stream, one attention over them) or "shared" (the paper's: the query rides in the image's
        self-attention with the image's weights, but skips its cross-attention to the caption and has an MLP of its own).
      two_way: the image reads the query (the paper's r = 1). Without, the image's part of naming can be computed once, `look`.
      reinject: the noised query enters every block anew (the paper's), else the first.
      head_depth, head_width, head_heads: M blocks after the trunk over query and image, with weights of their own; width and heads are
        the trunk's where they are 0.
      pooled: the mean of the caption's tokens modulates the image in drawing, beside its time (SD3's).
      captions: the caption has an output, for a process that diffuses it ("mmdit" alone).
      logits: scale and bias at first: CLIP's 1 / 0.07; SigLIP starts from (10, -10).
      mlp_ratio, qk_norm, norm_eps, time_scale, scan, remat, backend, dtype: as in `DiT`.
    """

    patches: Patches
    text: Any
    size: int
    depth: int
    width: int
    heads: int
    shared: int
    fusion: str = "mmdit"
    two_way: bool = True
    reinject: bool = True
    head_depth: int = 6
    head_width: int = 0
    head_heads: int = 0
    pooled: bool = False
    captions: bool = False
    logits: tuple[float, float] = (1 / 0.07, 0.0)
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    norm_eps: float = 1e-6
    time_scale: float = 1000.0
    scan: bool = True
    remat: str = "none"
    backend: str | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_width(self.head_width or self.width, self.head_heads or self.heads, "DualStream", "head_")
        if self.shared > self.depth:
            raise UserError(f"DualStream: of a depth of {self.depth} blocks shared={self.shared} cannot be shared by both tasks.")

    @nn.compact
    def __call__(self, x, t, tasks=("draw", "name"), seen=None):
        """`tasks`: "draw", "name" or ("look",), which returns what `name` takes as `seen` instead of an image; see `look`."""
        width, mmdit = self.width, self.fusion == "mmdit"
        self._check(x, t, tasks, seen)
        options = dict(
            two_way=self.two_way, mlp_ratio=self.mlp_ratio, qk_norm=self.qk_norm, norm_eps=self.norm_eps, backend=self.backend,
            dtype=self.dtype)  # fmt: skip
        time_embed = partial(TimeEmbed, dtype=self.dtype, scale=self.time_scale)
        block = dict(
            heads=self.heads, tie="none" if mmdit else "attention", reinject=self.reinject, cross=not mmdit and self.text is not None)
        layers = partial(Layers, scan=self.scan, remat=self.remat)
        trunk = layers(depth=self.shared, options=block | options, name="trunk")
        decoder = layers(depth=self.depth - self.shared, options=block | options, name="decoder")
        last = dict(heads=self.head_heads or self.heads, tie="all")
        head = layers(depth=self.head_depth, options=last | options, name="head")

        streams, conditions, told, visible, context, entry = {}, {}, {}, {}, None, None
        if "image" in x:
            streams["image"] = self.patches.encode(x["image"].astype(self.dtype), width, self.dtype, "image")
            conditions["image"] = time_embed(width, name="image_time")(t["image"])
            visible["image"] = jnp.broadcast_to((t["image"] < 1)[:, None], streams["image"].shape[:2])
        if "draw" in tasks and self.text is not None and "text" in x:
            features = jnp.issubdtype(x["text"].dtype, jnp.floating)
            value = x["text"].astype(self.dtype) if features else x["text"]
            context = self.text.encode(value, width, self.dtype, "text")
            there = ((value != 0).any(-1) if features else value != 0).reshape(context.shape[:2])
            visible["text"] = there if self.captions else there & (t["text"] < 1)[:, None]
            if mmdit:
                streams["text"] = context
                conditions["text"] = time_embed(width, name="text_time")(t["text"])
            if self.pooled:
                shown = visible["text"][..., None].astype(self.dtype)
                mean = (context * shown).sum(1) / jnp.maximum(shown.sum(1), 1)
                told = {"image": conditions["image"] + Dense(width, kernel_init=xavier, dtype=self.dtype, name="text_pooled")(mean)}
        if "name" in tasks:
            stamp = time_embed(self.size, name="query_stamp")(t["query"])
            entry = (x["query"].astype(self.dtype) + stamp)[:, None]
            streams["query"] = jnp.zeros((len(entry), 1, width), self.dtype)
            if not self.reinject:
                streams["query"] = Dense(width, kernel_init=xavier, dtype=self.dtype, name="query_in")(entry)
            conditions["query"] = time_embed(width, name="query_time")(t["query"])

        def only(names, tree):
            return {name: tree[name] for name in names if name in tree}

        def drawn(layers, streams):
            names = ("image", "text")
            return layers(only(names, streams), only(names, conditions | told), only(("text",), visible), None, context)[0]

        def named(layers, streams, seen, names=("image", "query"), **options):
            hidden = only(("image",), visible) or {"image": seen["visible"]}
            return layers(only(names, streams), only(names, conditions), hidden, entry, None, (seen or {}).get(layers.name), **options)

        def headed(streams):
            if not self.head_depth or not self.head_width:
                return streams
            into = Dense(self.head_width, kernel_init=xavier, dtype=self.dtype, name="head_in")
            return {name: into(h) for name, h in streams.items() if name != "text"}

        everything = None
        if self.is_initializing():  # a scanned layer makes its parameters in its first call: all streams go through it
            everything = trunk(streams, conditions, visible, entry, context)[0]
        out = {}
        if "look" in tasks:
            image, kept = named(trunk, streams, None, keep=True)
            return {"visible": visible["image"], "trunk": kept, "head": named(head, headed(image), None, keep=True)[1]}
        if "draw" in tasks:
            end = drawn(decoder, everything or drawn(trunk, streams))
            for name in ("image", "text") if self.captions else ("image",):
                layer = Dense(2 * width, kernel_init=zeros, dtype=self.dtype, name=f"{name}_adaln")
                shift_scale = layer(nn.silu((conditions | told)[name]))
                tokens = modulate(layer_norm(end[name], self.norm_eps), *jnp.split(shift_scale, 2, axis=-1))
                out[name] = (self.patches if name == "image" else self.text).decode(tokens, self.dtype, name)
        if "name" in tasks:
            middle = everything or named(trunk, streams, seen)[0]
            end = named(head, headed(middle), seen)[0]["query"][:, 0]
            out["query"] = Dense(self.size, kernel_init=xavier, dtype=self.dtype, name="query_out")(layer_norm(end, self.norm_eps))
            out |= logit_outputs(*learned_logits(self.param, self.logits), len(end))
        return {name: value.astype(jnp.float32) for name, value in out.items()}

    def _check(self, x, t, tasks, seen):
        check_split(self.heads)
        check_split(self.head_heads or self.heads)
        if self.fusion not in ("mmdit", "shared"):
            raise UserError(f"DualStream: there is no fusion {self.fusion!r}; choose mmdit or shared.")
        if self.captions and (self.fusion == "shared" or self.text is None):
            raise UserError("DualStream: captions leave by a stream of their own: they need text and fusion='mmdit'.")
        if self.two_way and ("look" in tasks or seen is not None):
            raise UserError("DualStream: where the image reads the query its keys cannot be kept: build the network with two_way=False.")
        wanted = (["image"] if seen is None else []) + (["query"] if "name" in tasks else [])
        wanted += ["text"] if self.captions and "draw" in tasks else []
        missing = [name for name in wanted if name not in x or name not in t]
        if missing:
            raise KeyError(f"DualStream: no input or time for {missing}; the tasks {list(tasks)} need {wanted}.")


def look(net: DualStream, params: Any, image: jax.Array, time: jax.Array | None = None) -> Any:
    """What `naming` needs of images [B, H, W, C]: their keys and values in every block that names. For a network without `two_way`.

    `time` [B] is the images', clean (0) by default; at t = 1 they are hidden.
    """
    time = jnp.zeros(len(image)) if time is None else time
    return net.apply(params, {"image": image}, {"image": time}, tasks=("look",))


def naming(net: DualStream, cache: Any) -> Callable:
    """The network of the query alone, `(params, x, t) -> {"query": ...}`, beside the images that `look` saw: one token a call."""

    def apply(params, x, t):
        return net.apply(params, {"query": x["query"]}, {"query": t["query"]}, tasks=("name",), seen=cache)

    return apply
