"""Attention for TPUs as one kernel each way, for sequences of which a core's fast memory holds all keys and values of a head.

Tokens lie along the lanes: of a head queries are [D, N], keys and values [D, M], scores [M, N], so that no D needs padding and the softmax
over keys runs down the columns. Nothing of [M, N] is ever in main memory: the backward pass computes the scores again from the queries,
keys and values, which are all that it needs. The same numbers as `attention`'s reference, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmdiff.nets.target import per_device, platform, takes_kernels

LONGEST = 1280  # tokens
CHUNK = 256  # queries that are in work at a time where there are many scores
HEADS = 4  # of one step of a kernel, at most

_LOG2E = math.log2(math.e)


def applies(queries: jax.ShapeDtypeStruct, keys: int, size: int, mask: Any = None) -> bool:
    """Whether the kernels can compute the attention of queries [B, N, ...] to so many keys, heads being `size` wide, and pay."""
    b, n = queries.shape[:2]
    return (
        takes_kernels(b) and queries.dtype in (jnp.bfloat16, jnp.float32)
        and size % 4 == 0 and max(n, keys) <= LONGEST and n >= 8 and n * keys >= 2**13  # of fewer, scores are small
        and (mask is None or of_keys(mask))
    )  # fmt: skip


def self_attention(qkv: jax.Array, bias: jax.Array, heads: int) -> jax.Array:
    """`attention.self_attention`: qkv [B, N, 3HD], bias [3HD] -> [B, N, HD]."""
    size = qkv.shape[-1] // (3 * heads)
    return _attend(size, (checkpoint_name(qkv.swapaxes(1, 2), "qkv"),), (bias[:, None],), ()).swapaxes(1, 2)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`attention.attention`: q [B, N, H, D], k and v [B, M, H, D], a mask that is the same for all queries and heads."""
    b, n, heads, size = q.shape
    if mask is not None and not of_keys(mask):
        raise ValueError(f'the attention backend "pallas" takes masks [B, 1, 1, M] of keys, not {mask.shape}: choose "reference".')
    columns = () if mask is None else (jnp.broadcast_to(mask, (b, 1, 1, k.shape[1])).reshape(b, -1, 1).astype(jnp.float32),)
    arrays = tuple(checkpoint_name(x.reshape(b, x.shape[1], -1).swapaxes(1, 2), "qkv") for x in (q, k, v))
    return _attend(size, arrays, (), columns).swapaxes(1, 2).reshape(b, n, heads, size)


def of_keys(mask: jax.Array) -> bool:
    """Whether a mask [B, H, N, M] is the same for all queries and heads."""
    return all(length == 1 for length in (1, 1, *mask.shape)[-3:-1])


def _attend(size: int, arrays: tuple, bias: tuple, mask: tuple) -> jax.Array:
    """[B, HD, N] of qkv [B, 3HD, N] and its bias [3HD, 1], or of q, k, v and perhaps a mask [B, M, 1]."""
    form = _Form(size, len(arrays), bool(bias), bool(mask))
    inputs = (_PARTS["rows"],) * len(arrays) + (_PARTS["bias"],) * len(bias) + (_PARTS["mask"],) * len(mask)
    gradients = (_PARTS["rows"],) * len(arrays) + (_PARTS["sums"],) * len(bias)
    forward = per_device(partial(_forward, form, platform() != "tpu"), inputs, (_PARTS["rows"],))
    backward = per_device(partial(_backward, form, platform() != "tpu"), (*inputs, _PARTS["rows"]), gradients)

    @jax.custom_vjp
    def attend(arrays, bias, mask):
        return forward(*arrays, *bias, *mask)[0]

    def saving(arrays, bias, mask):
        return checkpoint_name(attend(arrays, bias, mask), "attention"), (arrays, bias, mask)

    def gradient(saved, g):
        arrays, bias, mask = saved
        found = backward(*arrays, *bias, *mask, g)
        sums = [sums.sum((0, 2))[:, None].astype(b.dtype) for sums, b in zip(found[len(arrays) :], bias)]
        return tuple(found[: len(arrays)]), tuple(sums), tuple(map(jnp.zeros_like, mask))

    attend.defvjp(saving, gradient)
    return attend(arrays, bias, mask)


# How an array is split over devices.
_PARTS = {"rows": ("batch", "heads", None), "bias": ("heads", None), "mask": ("batch", None, None), "sums": ("batch", "heads", None)}


class _Form(NamedTuple):
    """The width of a head; 1 array (q, k and v of a head one after the other) or 3 of them; a bias of theirs; a mask of keys."""

    size: int
    arrays: int
    biased: bool
    masked: bool

    @property
    def operands(self) -> list[str]:
        return ["rows"] * self.arrays + ["bias"] * self.biased + ["mask"] * self.masked

    def rows(self, refs: Sequence[Any], head: int, part: int) -> tuple[Any, slice]:
        """Where q, k or v (part 0, 1 or 2) of a head lies."""
        start = (3 * head + part if self.arrays == 1 else head) * self.size
        return refs[0 if self.arrays == 1 else part], slice(start, start + self.size)

    def read(self, refs: Sequence[Any], head: int, part: int) -> jax.Array:
        ref, rows = self.rows(refs, head, part)
        found = ref[0, rows, :]
        if self.biased:
            found = (found.astype(jnp.float32) + refs[1][rows, :].astype(jnp.float32)).astype(found.dtype)
        return found


# ---- The programs of one device ----


def _forward(form: _Form, interpret: bool, *operands: jax.Array) -> Sequence[jax.Array]:
    first = operands[0]
    out = jax.ShapeDtypeStruct((first.shape[0], first.shape[1] // (3 if form.arrays == 1 else 1), first.shape[2]), first.dtype)
    return _call(_forward_kernel, form, operands, form.operands, [out], ["rows"], interpret)


def _backward(form: _Form, interpret: bool, *operands: jax.Array) -> Sequence[jax.Array]:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[: form.arrays]]
    # The gradient of a bias is summed over a device's examples; 128 sums are left.
    shapes += [jax.ShapeDtypeStruct((1, operands[0].shape[1], 128), jnp.float32)] * form.biased
    kinds = ["rows"] * form.arrays + ["sums"] * form.biased
    return _call(_backward_kernel, form, operands, [*form.operands, "rows"], shapes, kinds, interpret)


def _call(kernel, form, operands, kinds, shapes, made, interpret):
    """A kernel that gets some heads of one example at a time, of arrays of these kinds."""
    from jax.experimental import pallas as pl  # takes a while to import
    from jax.experimental.pallas import tpu as pltpu

    examples, rows, n = operands[0].shape
    heads = rows // form.size // (3 if form.arrays == 1 else 1)
    most = max(1, HEADS // len(_chunks(n, operands[form.arrays - 1].shape[2])))
    # Blocks are whole tiles of eight rows.
    fit = [group for group in range(1, heads + 1) if heads % group == 0 and (group * form.size % 8 == 0 or group == heads)]
    groups = heads // max([group for group in fit if group <= most], default=fit[0])

    def block(kind, shape):
        where = {
            "rows": lambda example, group: (example, group, 0),
            "sums": lambda example, group: (0, group, 0),
            "bias": lambda example, group: (group, 0),
            "mask": lambda example, group: (example, 0, 0),
        }[kind]
        lengths = (shape[0] // groups, 1) if kind == "bias" else (1, shape[1] // (1 if kind == "mask" else groups), shape[2])
        return pl.BlockSpec(lengths, (lambda group, example: where(example, group)) if form.biased else where)

    return pl.pallas_call(
        partial(kernel, form), out_shape=shapes, interpret=interpret,
        # With a bias, a group's examples come one after the other: its block stays where it is, and so does the sum that is its gradient.
        grid=(groups, examples) if form.biased else (examples, groups),
        in_specs=[block(*each) for each in zip(kinds, (x.shape for x in operands))],
        out_specs=[block(*each) for each in zip(made, (x.shape for x in shapes))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )(*operands)  # fmt: skip


def _chunks(n: int, m: int) -> list[slice]:
    """The queries that are in work at a time."""
    size = n if n * m <= 2**17 else CHUNK
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


# ---- The kernels ----


def _forward_kernel(form, *refs):
    *inputs, out = refs
    visible = inputs[-1][0] > 0 if form.masked else None
    for h in range(out.shape[1] // form.size):
        q, k, v = (form.read(inputs, h, part) for part in range(3))
        q = _scaled(q)
        for part in _chunks(q.shape[1], k.shape[1]):
            weights, total = _weights(k, q[:, part], visible)
            value = _dot(v, weights.astype(v.dtype), 1, 0) / total
            out[0, h * form.size : (h + 1) * form.size, part] = value.astype(out.dtype)


def _backward_kernel(form, *refs):
    from jax.experimental import pallas as pl

    count = len(form.operands)
    inputs, gradient, outputs = refs[:count], refs[count], refs[count + 1 :]
    visible = inputs[-1][0] > 0 if form.masked else None
    if form.biased:

        @pl.when(pl.program_id(1) == 0)
        def _():
            outputs[1][...] = jnp.zeros(outputs[1].shape, jnp.float32)

    def write(value, h, part, lanes=slice(None)):
        ref, rows = form.rows(outputs, h, part)
        ref[0, rows, lanes] = value.astype(ref.dtype)
        for start in range(0, value.shape[1], 128) if form.biased else ():
            tile = value[:, start : start + 128]
            outputs[1][0, rows, : tile.shape[1]] += tile

    for h in range(gradient.shape[1] // form.size):
        q, k, v = (form.read(inputs, h, part) for part in range(3))
        q, dk, dv = _scaled(q), 0.0, 0.0
        for part in _chunks(q.shape[1], k.shape[1]):
            weights, total = _weights(k, q[:, part], visible)
            inverse = 1 / total
            # Of the gradient divided by the sums, so that the weights need not be.
            g = gradient[0, h * form.size : (h + 1) * form.size, part].astype(jnp.float32)
            g = (g * inverse).astype(v.dtype)
            dp = _dot(v, g, 0, 0)
            ds = weights * (dp - (weights * dp).sum(0, keepdims=True) * inverse)
            if form.masked:  # a query without any key has equal weights, whatever its scores
                ds = jnp.where(visible, ds, 0)
            ds = ds.astype(k.dtype)
            write(_dot(k, ds, 1, 0) * form.size**-0.5, h, 0, part)
            dk, dv = dk + _dot(q[:, part], ds, 1, 1), dv + _dot(g, weights.astype(v.dtype), 1, 1)
        write(dk / _LOG2E, h, 1)
        write(dv, h, 2)


def _weights(k, q, visible):
    """Softmax over keys [M, N], not yet normalised, and its sums [1, N]; q is `_scaled`."""
    scores = _dot(k, q, 0, 0)
    if visible is not None:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp2(scores - scores.max(0, keepdims=True))
    return weights, weights.sum(0, keepdims=True)


def _scaled(q):
    """log2(e) / sqrt(D) q: powers of 2 take less than those of e."""
    return (q.astype(jnp.float32) * (_LOG2E * q.shape[0] ** -0.5)).astype(q.dtype)


def _dot(a, b, i, j):
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)
