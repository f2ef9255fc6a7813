"""The transformer of CDCD and VQ-Diffusion: from tokens, some of them masked or replaced, to logits of the clean ones."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmdiff.errors import UserError
from mmdiff.nets.embed import Dense, frequencies, patchify, readout, unpatchify
from mmdiff.nets.layers import Attention, CrossAttention, layer_norm, modulate, normal
from mmdiff.nets.routes import kept_in
from mmdiff.nets.target import constrain
from mmdiff.nets.transformer import Transformer

# The uniform law of +-1 / sqrt(fan in), the default of the framework that the published convolutions were left to.
conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# The published sizes; K, L, depth, width and so on as the paper's configurations have them, conditions as features.
CDCD = {
    "aist": dict(classes=2048, grid=(1, 1033), depth=19, width=1024, heads=16, times=80, context=("dance",)),
    "aist_2s": dict(classes=2048, grid=(1, 344), depth=19, width=1024, heads=16, times=80, context=("dance",)),
    "tiktok": dict(classes=2048, grid=(1, 344), depth=19, width=1024, heads=16, times=100, context=("dance",)),
    "coco": dict(classes=2887, grid=(32, 32), depth=18, width=192, heads=16, times=80, context=("text",), mlp_ratio=2, conv=True),
    "imagenet": dict(
        classes=974, grid=(16, 16), positions=(32, 32), depth=24, width=512, heads=16, times=80, labels=1000, mlp_ratio=4, conv=True),
}  # fmt: skip


class MLP(nn.Module):
    """Two products, or two 3x3 convolutions on the `grid` of the tokens (1x3 of a sequence), with `x sigmoid(1.702 x)` between them."""

    ratio: float
    grid: tuple[int, int] | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = x.shape
        layer = partial(Dense, kernel_init=normal, dtype=self.dtype)
        if self.grid is not None:
            kernel = tuple(min(3, 2 * side - 1) for side in self.grid)  # of a sequence the other two rows would see nothing
            layer = partial(nn.Conv, kernel_size=kernel, kernel_init=conv_init, dtype=self.dtype)
            # As one vector per example, which no device holds a part of: convolutions of grids that are split by rows and by features
            # come out wrong from XLA's partitioner (jax 0.10.2).
            x = constrain(x.reshape(len(x), -1)).reshape(len(x), *self.grid, -1)
        hidden = checkpoint_name(layer(int(self.ratio * shape[-1]), name="in")(x), "mlp_in")
        out = layer(shape[-1], name="out")(hidden * nn.sigmoid(1.702 * hidden))
        return out if self.grid is None else constrain(out.reshape(len(x), -1)).reshape(shape)


class Block(nn.Module):
    """Self-attention, cross-attention where there is a context, and an MLP, each added to x after a norm of its own.

    The attentions' norms are modulated by the time, the MLP's by the label: `LN(x) (1 + scale) + shift` with scale and shift from
    `Dense(silu(e))`, e a row of a table that each norm has for itself, sinusoidal features of a time that is no integer, or the vector
    itself where the label is one. Without time or label it is a plain LayerNorm.
    """

    heads: int
    times: int = 0
    labels: int = 0
    mlp_ratio: float = 4.0
    grid: tuple[int, int] | None = None
    norm_eps: float = 1e-5
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, time=None, label=None, context=None):
        options = dict(heads=self.heads, kernel_init=normal, backend=self.backend, dtype=self.dtype)
        x = x + Attention(**options, name="attention")({"": self._norm(x, "attention", time, self.times)})[0][""]
        if context is not None:
            x = x + CrossAttention(**options, name="cross")(self._norm(x, "cross", time, self.times), context)
        return x + MLP(self.mlp_ratio, self.grid, self.dtype, name="mlp")(self._norm(x, "mlp", label, self.labels)), None

    def _norm(self, x, name, which, rows):
        if which is None:
            return nn.LayerNorm(self.norm_eps, dtype=self.dtype, name=f"{name}_norm")(x)
        width = x.shape[-1]
        if which.ndim == 2:
            e = which
        elif jnp.issubdtype(which.dtype, jnp.integer):
            e = nn.Embed(rows, width, embedding_init=normal, dtype=self.dtype, name=f"{name}_table")(which)
        else:
            e = frequencies(which, width, scale=4000.0).astype(self.dtype)
        both = Dense(2 * width, kernel_init=normal, dtype=self.dtype, name=f"{name}_adaln")(nn.silu(e))
        scale, shift = jnp.split(checkpoint_name(both, "adaln"), 2, axis=-1)
        return modulate(layer_norm(x, self.norm_eps), shift, scale)


class TokenTransformer(Transformer):
    """The denoiser of CDCD (Zhu et al. 2023, after Gu et al. 2022), parameter for parameter.

    `__call__(x, t)`: dicts by modality, as a `Joint` feeds them. x["tokens"] int [B, L] in 0 .. classes, where `classes` is the mask,
    in raster order of the grid; t["tokens"] [B]. Returns {"tokens": logits [B, L, classes]}, float32 or wider; the name is `modality`.
    Conditions have no time of their own: an absent one is its null, a row of a table or an id of the text's like any other.

    Attributes:
      classes: K, the classes of a clean token.
      grid: (rows, columns) of tokens; a sequence has one row.
      labels: rows of the table for x["label"] [B], 0 for a network without labels. A `Given(null=C)` needs C + 1.
      context: names of the conditions for cross-attention: the inputs of the `encoder`, or without one a single array of features
        [B, N, C].
      encoder: a linen module `(*conditions) -> [B, N, C]`, such as `TextEncoder` or `DanceEncoder`; its parameters live in this network.
      pooled: the mean of the context over its tokens modulates the MLPs' norms in place of a label. Not in the paper.
      aligned: the number of leading context tokens that are simultaneous with the sequence: interpolated to its length, they are also
        added to its embeddings (after a product). Not in the paper, where attention has to find the alignment.
      times: T, rows of the tables for the time, which row round(t T) - 1 stands for (so t in (0, 1]); 0 for sinusoidal features.
      mlp_ratio, conv: the MLP's width, and whether it convolves over the grid.
      positions: (rows, columns) of the position tables, the grid's by default. Tokens take its entries in raster order from the first on,
        so a table that is wider than the grid wraps at other columns (published for ImageNet: 32x32 for 16x16).
      patch: patch x patch tokens (of a sequence `patch` in a row) are one in the blocks: the sum of their embeddings, from a table for each
        place in the patch.
      logit_chunks: not 0 for an output of `LazyLogits` in so many chunks of the tokens, without patches: for losses of many classes.
      modality: the name of the tokens.
      seconds: the duration of a sequence in time, whose position table is initialised by `time_features`; 0 for a random one.
      norm_eps: 1e-5 as in the released networks.
      depth, width, heads, ...: see `Transformer`.
    """

    classes: int
    grid: tuple[int, int]
    labels: int = 0
    context: tuple[str, ...] = ()
    encoder: nn.Module | None = None
    pooled: bool = False
    aligned: int = 0
    times: int = 0
    conv: bool = False
    positions: tuple[int, int] | None = None
    patch: int = 1
    logit_chunks: int = 0
    modality: str = "tokens"
    seconds: float = 0.0
    norm_eps: float = dataclasses.field(default=1e-5, kw_only=True)

    @nn.compact
    def __call__(self, x, t):
        kept_in("TokenTransformer", x, {}, None)
        patch = (1 if self.grid[0] == 1 else self.patch, self.patch)
        cells = (self.grid[0] // patch[0], self.grid[1] // patch[1])
        count = cells[0] * cells[1]
        table = self.positions or cells
        if any(side % part for side, part in zip(self.grid, patch)):
            raise UserError(f"patches of {patch[0]}x{patch[1]} do not tile a grid of {self.grid[0]}x{self.grid[1]} tokens.")
        if self.logit_chunks and patch != (1, 1):
            raise UserError(f"logits in chunks are of single tokens: with patches of {self.patch} set logit_chunks to 0.")
        if table[0] * table[1] < count:
            raise UserError(f"a position table of {table[0]}x{table[1]} is too small for {count} tokens.")
        names = [self.modality, *(["label"] if self.labels else []), *self.context]
        missing = [name for name in names if name not in x]
        if missing:
            raise KeyError(f"TokenTransformer: no input for {missing}; it was built for {names}.")
        tokens, label, time, context = x[self.modality], None, t[self.modality], None
        if tokens.shape[1:] != (self.grid[0] * self.grid[1],):
            raise UserError(f"a grid of {self.grid[0]}x{self.grid[1]} needs {self.grid[0] * self.grid[1]} tokens, not {tokens.shape[1:]}.")
        check_ids(self.modality, tokens, self.classes + 1)
        if self.labels:
            label = x["label"]
            check_ids("label", label, self.labels)
        if self.times:
            time = jnp.round(time * self.times).astype(jnp.int32) - 1
            check_ids(f"the time, counted in steps of 1/{self.times} from the first,", time, self.times)
            time = jnp.maximum(time, 0)  # under jit: the output for clean tokens (t = 0) is not used
        if self.context:
            context = self.encoder(*(x[name] for name in self.context)) if self.encoder else x[self.context[0]]
            context = context.astype(self.dtype)
        if self.pooled:
            if context is None or self.labels:
                raise UserError("pooled needs a context, and stands where labels would: give one or the other.")
            label = context.mean(1)

        embed = partial(nn.Embed, features=self.width, embedding_init=normal, dtype=self.dtype)
        states, group, place = self.classes + 1, patch[0] * patch[1], np.arange(count)
        ids = patchify(tokens.reshape(-1, *self.grid, 1), patch) + states * np.arange(group)
        h = embed(group * states, name="tokens_in")(ids).sum(-2)
        columns = embed(table[1], embedding_init=partial(_as_times, self.seconds) if self.seconds else normal, name="columns")
        h = h + embed(table[0], name="rows")(place // table[1]) + columns(place % table[1])
        if self.aligned:
            if context is None or context.shape[1] < self.aligned:
                found = 0 if context is None else context.shape[1]
                raise UserError(f"{self.aligned} tokens of the context are to go through time with the sequence, and it has {found}.")
            along = jax.image.resize(context[:, : self.aligned], (len(context), count, context.shape[-1]), "linear")
            h = h + Dense(self.width, kernel_init=normal, dtype=self.dtype, name="aligned")(along)
        blocks = self.stack(Block, times=self.times, labels=self.labels, grid=cells if self.conv else None)
        h, _ = blocks(h, time, label, context)
        h = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm")(h)
        out = readout(Dense(group * self.classes, kernel_init=normal, dtype=self.dtype, name="tokens_out"), h, self.logit_chunks)
        if self.logit_chunks:
            return {self.modality: out}
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        return {self.modality: unpatchify(out, patch, *self.grid).reshape(*tokens.shape, self.classes)}


def time_features(seconds: jax.Array, size: int) -> jax.Array:
    """Sinusoidal features [..., size] of times [...], with periods from 0.1 s to 6 s."""
    return frequencies(seconds, size, scale=60.0, max_period=60.0)


def _as_times(seconds, key, shape, dtype=jnp.float32):
    """An initialiser of position tables [n, size]: the features of n times in so many seconds, as large as `normal` makes them."""
    return (0.02 * 2**0.5 * time_features(np.arange(shape[0]) * (seconds / shape[0]), shape[1])).astype(dtype)


def cdcd(size: str, **options) -> TokenTransformer:
    """A published network: "aist" (6 s of music), "aist_2s", "tiktok", "coco" (CUB-200's too) or "imagenet"; `options` replace fields.

    Conditions: "dance" [B, 1, 1024] of a motion encoder, "text" [B, 77, 512] of CLIP, both features unless an `encoder` makes them, and
    one of 1,000 labels. For guidance on labels add a row for their null: `cdcd("imagenet", labels=1001)`.

    >>> net = cdcd("imagenet", labels=1001)
    >>> x, t = {"tokens": jnp.zeros((1, 256), int), "label": jnp.zeros(1, int)}, {"tokens": jnp.ones(1)}
    >>> jax.eval_shape(lambda key: net.apply(net.init(key, x, t), x, t), jax.random.key(0))["tokens"].shape
    (1, 256, 974)
    """
    if size not in CDCD:
        raise UserError(f"no CDCD network {size!r}; choose one of {', '.join(CDCD)}.")
    return TokenTransformer(**{**CDCD[size], **options})


def check_ids(name: str, ids: jax.Array, count: int) -> None:
    """Raises UserError for ids that a table of `count` rows does not have, where they are known (not while tracing)."""
    if isinstance(ids, jax.core.Tracer):
        return
    ids = np.asarray(ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < count:
        raise UserError(f"{name} must lie in 0..{count - 1}, got values from {ids.min()} to {ids.max()}.")
