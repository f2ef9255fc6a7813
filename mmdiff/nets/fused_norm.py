"""A norm and its modulation for TPUs as one kernel each way, which reads and writes every token once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp

from mmdiff.nets.target import per_device, platform, takes_kernels

ROWS = 256  # tokens that are in work at a time, where they divide all

_TOKENS = ("batch", None, None)


def applies(x: jax.Array) -> bool:
    """Whether the kernels can compute the norm of tokens [B, N, W], and pay."""
    b, n, width = x.shape
    return takes_kernels(b) and x.dtype in (jnp.bfloat16, jnp.float32) and width % 128 == 0 and 64 <= n and _rows(n) * width <= 2**19


def norm_and_modulation(
    x: jax.Array, shifts: Sequence[jax.Array], scales: Sequence[jax.Array], eps: float, lengths: Sequence[int] = ()
) -> tuple[jax.Array, jax.Array]:
    """x [B, N, W] -> `(x - mean) / sqrt(var + eps) (1 + scale) + shift`, and x.

    Shifts and scales [B, W] are one each of `lengths` tokens that follow each other, without lengths of all. What is computed of the x that
    is returned has its gradient added in the backward kernel, without a pass of its own.
    """
    interpret, starts = platform() != "tpu", tuple(accumulate((0, *lengths[:-1])))
    forward = per_device(partial(_call, _forward, eps, starts, interpret), (_TOKENS,) * 3, (_TOKENS,))
    backward = per_device(partial(_call, _backward, eps, starts, interpret), (_TOKENS,) * 4, (_TOKENS,) * 3)

    @jax.custom_vjp
    def both(x, shift, scale):
        return forward(x, shift, scale)[0], x

    def saving(x, shift, scale):
        return both(x, shift, scale), (x, scale)

    def gradient(saved, gradients):
        x, scale = saved
        dx, *sums = backward(x, *gradients, scale)
        return dx, *(each.astype(scale.dtype) for each in sums)

    both.defvjp(saving, gradient)
    return both(x, jnp.stack(shifts, 1), jnp.stack(scales, 1))


def _call(kernel, eps, starts, interpret, *operands):
    """The kernel on some tokens of one example at a time: a result for each of them, and of the backward pass sums over them."""
    from jax.experimental import pallas as pl  # takes a while to import
    from jax.experimental.pallas import tpu as pltpu

    x = operands[0]
    b, n, width = x.shape
    tokens = pl.BlockSpec((1, _rows(n), width), lambda example, part: (example, part, 0))
    vector = pl.BlockSpec((1, len(starts), width), lambda example, part: (example, 0, 0))
    sums = [jax.ShapeDtypeStruct((b, len(starts), width), jnp.float32)] * 2 if kernel is _backward else []
    return pl.pallas_call(
        partial(kernel, eps, starts), grid=(b, n // _rows(n)), in_specs=[tokens if each.shape[1] == n else vector for each in operands],
        out_specs=[tokens, *[vector] * len(sums)], out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *sums],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")), interpret=interpret,
    )(*operands)  # fmt: skip


def _rows(n: int) -> int:
    return n if n % ROWS else ROWS


def _normalised(x, eps):
    """Tokens [n, W] with mean 0 and variance 1, float32, and the factor [n, 1] that made it 1."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return centred * inverse, inverse


def _of_tokens(vectors, starts, n):
    """Vectors [1, P, W] of parts that start at these tokens: that of each token in work [n, W], or of all of them [1, W]."""
    found, token = vectors[0, :1].astype(jnp.float32), _tokens(n)
    for i, start in enumerate(starts[1:], 1):
        found = jnp.where(token >= start, vectors[0, i : i + 1].astype(jnp.float32), found)
    return found


def _tokens(n):
    from jax.experimental import pallas as pl

    return pl.program_id(1) * n + jax.lax.broadcasted_iota(jnp.int32, (n, 1), 0)


def _forward(eps, starts, x, shift, scale, out):
    normed = _normalised(x[0], eps)[0]
    shift, scale = (_of_tokens(each, starts, len(normed)) for each in (shift, scale))
    out[0] = (normed * (1 + scale) + shift).astype(out.dtype)


def _backward(eps, starts, x, g, passed, scale, dx, dshift, dscale):
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(1) == 0)
    def _():
        dshift[...] = dscale[...] = jnp.zeros(dshift.shape, jnp.float32)

    normed, inverse = _normalised(x[0], eps)
    g, token = g[0].astype(jnp.float32), _tokens(len(normed))
    for i, start in enumerate(starts):
        part = g
        if len(starts) > 1:
            part = jnp.where((token >= start) & (token < (*starts, x.shape[1] * pl.num_programs(1))[i + 1]), g, 0)
        dshift[0, i : i + 1] += part.sum(0, keepdims=True)
        dscale[0, i : i + 1] += (part * normed).sum(0, keepdims=True)
    g = g * (1 + _of_tokens(scale, starts, len(normed)))
    own = (g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True)) * inverse
    dx[0] = (passed[0].astype(jnp.float32) + own).astype(dx.dtype)
