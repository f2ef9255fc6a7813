r"""DiffDis' dual-stream transformer: one trunk that generates images from a text, and denoises the text's vector given an image.

The two tasks are two passes over streams of tokens, the image I, the caption C and the query Q (one token, the noised vector):

    row attends to column   I           C           Q
    I                       always      generate    align, if `two_way`
    C                       generate    generate    never
    Q                       align       never       align

The query takes no part in generation and the caption none in alignment, so neither can leak. Within a pass a condition is masked where
it is absent: the caption at t = 1 and wherever it is padding (`Tokens.padding`, or features that are all 0), the image, in alignment, at
t = 1.
What a pass diffuses is never masked. A masked token has a weight of exactly 0: outputs do not depend on it, bit for bit.

Source: Huang et al. 2023 (DiffDis), carried over from a U-Net.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.nets.embed import Dense, Patches, xavier
from mmdiff.nets.fields import check_width
from mmdiff.nets.layers import layer_norm
from mmdiff.nets.routes import kept_in
from mmdiff.nets.towers import learned_logits, logit_outputs
from mmdiff.nets.transformer import DiffusionTransformer
from mmdiff.spans import check_no_ends


class DualStream(DiffusionTransformer):
    """DiffDis' network: two passes through one trunk, "generate" and "align" (see the head of the module).

    `__call__(x, t)`: dicts by modality, x["image"] [B, H, W, C], x["text"] as its stream takes it (left out: no caption),
    x["query"] [B, size]; t [B] each. Returns, in float32, {"image": ...} of the pass "generate" ("text", too, with `captions`) and
    {"query": [B, size], "logit_scale": [B], "logit_bias": [B]} of "align": the scale and the bias are learned numbers for
    `matching`'s losses, the same for all examples.

    By default both passes run. Under jit a pass whose outputs are unused costs nothing; `tasks` selects one explicitly:

        generate, align = (partial(net.apply, tasks=(task,)) for task in ("generate", "align"))

    With weights fresh from `init` the query adds nothing to the image, and generation is a `DiT` or `MMDiT` with `text`.

    Attributes:
      patches: the image's. text: its stream, `Tokens` or `Vectors`; None for a network without captions. size: of the query.
      depth: blocks that generate. shared: how many of them align, too (rho = shared / depth; about half).
      fusion: "mmdit" (own weights for every stream, one attention over them) or "shared" (the paper's: the query rides in the image's
        self-attention with the image's weights, but skips its cross-attention to the caption and has an MLP of its own).
      two_way: the image attends to the query (the paper's r = 1). Without, an image's keys and values can be cached: `image_kv_cache`.
      reinject: the noised query is added before every block (the paper's), else before the first.
      head_depth, head_width, head_heads: M blocks after the trunk over query and image, with weights of their own; width and heads are
        the trunk's where they are 0.
      pooled: the mean of the caption's tokens modulates the image in generation, together with its time (as in SD3).
      captions: the caption has an output, for a process that diffuses it ("mmdit" alone).
      logits: initial scale and bias: CLIP's 1 / 0.07; SigLIP starts from (10, -10).
      width, heads, ...: see `Transformer` and `DiffusionTransformer`.

    Raises:
      UserError: fields that do not fit together. KeyError: a modality that the tasks need is missing.

    >>> net = DualStream(Patches(8, 8, 1, 2), None, 4, depth=2, shared=1, head_depth=1, width=16, heads=2, two_way=False)
    >>> x, t = {"image": jnp.zeros((2, 8, 8, 1)), "query": jnp.zeros((2, 4))}, {"image": jnp.zeros(2), "query": jnp.ones(2)}
    >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    >>> cache = jax.eval_shape(lambda params: image_kv_cache(net, params, x["image"]), params)
    >>> out = jax.eval_shape(lambda params, cache: with_image_cache(net, cache)(params, x, t), params, cache)
    >>> out["query"].shape
    (2, 4)
    """

    patches: Patches
    text: Any
    size: int
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

    def __post_init__(self):
        super().__post_init__()
        check_width(self.head_width or self.width, self.head_heads or self.heads, "DualStream", "head_")
        if self.shared > self.depth:
            raise UserError(f"DualStream: of a depth of {self.depth} blocks shared={self.shared} cannot be shared by both tasks.")

    @nn.compact
    def __call__(self, x, t, tasks=("generate", "align"), cache=None):
        """`tasks`: "generate", "align", or ("cache",), which returns the `cache` that stands for an image in "align"."""
        width, mmdit = self.width, self.fusion == "mmdit"
        self._check(x, t, tasks, cache)
        attends = {"image": ("image", "text", *["query"] * self.two_way), "text": ("image", "text"), "query": ("image", "query")}
        options = dict(attends=attends, rope={"image": self.patches, **({"text": self.text} if self.text is not None else {})})
        own = {} if mmdit else {"attention_weights": {"query": "image"}, "cross_stream": "image" if self.text is not None else None}
        trunk = self.blocks("trunk", self.shared, **options, **own)
        decoder = self.blocks("decoder", self.depth - self.shared, **options, **own)
        head = self.blocks("head", self.head_depth, self.head_heads, **options, weights={"image": "", "query": ""})

        streams, conditions, visible, context, added, pooled = {}, {}, {}, None, {}, None
        if "image" in x:
            streams["image"] = self.patches.encode(x["image"].astype(self.dtype), width, self.dtype, "image")
            conditions["image"] = self.time_embed(width, name="image_time")(t["image"])
            visible["image"] = jnp.broadcast_to((t["image"] < 1)[:, None], streams["image"].shape[:2])
        if "generate" in tasks and self.text is not None and "text" in x:
            features = jnp.issubdtype(x["text"].dtype, jnp.floating)
            value = x["text"].astype(self.dtype) if features else x["text"]
            tokens = self.text.encode(value, width, self.dtype, "text")
            there = ((value != 0).any(-1) if features else value != self.text.padding).reshape(tokens.shape[:2])
            visible["text"] = there if self.captions else there & (t["text"] < 1)[:, None]
            if mmdit:
                streams["text"] = tokens
                conditions["text"] = self.time_embed(width, name="text_time")(t["text"])
            else:
                context = tokens, visible["text"]
            if self.pooled:
                shown = visible["text"][..., None].astype(self.dtype)
                mean = (tokens * shown).sum(1) / jnp.maximum(shown.sum(1), 1)
                pooled = Dense(width, kernel_init=xavier, dtype=self.dtype, name="text_pooled")(mean)
        generation = conditions if pooled is None else conditions | {"image": conditions["image"] + pooled}
        if "align" in tasks:
            stamp = self.time_embed(self.size, name="query_stamp")(t["query"])
            entry = (x["query"].astype(self.dtype) + stamp)[:, None]
            if self.reinject:
                streams["query"], added = jnp.zeros((len(entry), 1, width), self.dtype), {"query": entry}
            else:
                streams["query"] = Dense(width, kernel_init=xavier, dtype=self.dtype, name="query_in")(entry)
            conditions["query"] = self.time_embed(width, name="query_time")(t["query"])

        def only(names, tree):
            return {name: tree[name] for name in names if name in tree}

        def generate(layers, streams):
            names = ("image", "text")
            return layers(only(names, streams), only(names, generation), only(("text",), visible), context)[0]

        def align(layers, streams, **options):
            names, masks = ("image", "query"), only(("image",), visible) or {"image": cache["visible"]}
            modulation = {} if layers is head else {"conditions": only(names, conditions), "added": added}
            return layers(only(names, streams), visible=masks, cache=cache and cache[layers.name], **modulation, **options)

        def headed(streams):
            if not self.head_depth or not self.head_width:
                return streams
            into = Dense(self.head_width, kernel_init=xavier, dtype=self.dtype, name="head_in")
            return {name: into(h) for name, h in streams.items() if name != "text"}

        shared = None
        if self.is_initializing():  # a scanned layer makes its parameters in its first call: all streams go through it
            shared = trunk(streams, conditions, visible, context, added)[0]
        out = {}
        if "cache" in tasks:
            image, keys = align(trunk, streams, keep=True)
            return {"visible": visible["image"], "trunk": keys, "head": align(head, headed(image), keep=True)[1]}
        if "generate" in tasks:
            end = generate(decoder, shared or generate(trunk, streams))
            for name in ("image", "text") if self.captions else ("image",):
                stream = self.patches if name == "image" else self.text
                out[name] = self.output(stream, end[name], generation[name], name, x[name])
        if "align" in tasks:
            end = align(head, headed(shared or align(trunk, streams)[0]))[0]["query"][:, 0]
            out["query"] = Dense(self.size, kernel_init=xavier, dtype=self.dtype, name="query_out")(layer_norm(end, self.norm_eps))
            out |= logit_outputs(*learned_logits(self.param, self.logits), len(end))
        return jax.tree.map(lambda value: value.astype(jnp.float32), out)

    def _check(self, x, t, tasks, cache):
        check_no_ends("DualStream", t)
        kept_in("DualStream", x, {}, None)
        unknown = [task for task in tasks if task not in ("generate", "align", "cache")]
        if unknown:
            raise UserError(f"DualStream: there is no task {unknown[0]!r}; choose generate, align or cache.")
        if self.fusion not in ("mmdit", "shared"):
            raise UserError(f"DualStream: there is no fusion {self.fusion!r}; choose mmdit or shared.")
        if self.captions and (self.fusion == "shared" or self.text is None):
            raise UserError("DualStream: an output of captions needs a stream of theirs: set text and fusion='mmdit'.")
        if self.two_way and ("cache" in tasks or cache is not None):
            raise UserError("DualStream: an image that attends to the query cannot be cached: build the network with two_way=False.")
        wanted = (["image"] if cache is None else []) + (["query"] if "align" in tasks else [])
        wanted += ["text"] if self.captions and "generate" in tasks else []
        missing = [name for name in wanted if name not in x or name not in t]
        if missing:
            raise KeyError(f"DualStream: no input or time for {missing}; the tasks {list(tasks)} need {wanted}.")


def image_kv_cache(net: DualStream, params: Any, image: jax.Array, time: jax.Array | None = None) -> Any:
    """Keys and values of images [B, H, W, C] in every block that aligns, for `with_image_cache`; of a network without `two_way`.

    `time` [B] is the images', clean (0) by default; at t = 1 they are masked.
    """
    time = jnp.zeros(len(image)) if time is None else time
    return net.apply(params, {"image": image}, {"image": time}, tasks=("cache",))


def with_image_cache(net: DualStream, cache: Any) -> Callable:
    """The network of the query alone, `(params, x, t) -> {"query": ...}`, given the images of `image_kv_cache`: one token a call."""

    def apply(params, x, t):
        return net.apply(params, {"query": x["query"]}, {"query": t["query"]}, tasks=("align",), cache=cache)

    return apply
