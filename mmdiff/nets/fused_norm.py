"""A norm and its modulation for TPUs as one kernel each way, which reads and writes every token once."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from mmdiff.nets.target import per_device, platform, takes_kernels

ROWS = 256  # tokens that are in work at a time, where they divide all

_TOKENS = ("batch", None, None)


def applies(x: jax.Array) -> bool:
    """Whether the kernels can compute the norm of tokens [B, N, W], and pay."""
    b, n, width = x.shape
    return takes_kernels(b) and x.dtype in (jnp.bfloat16, jnp.float32) and width % 128 == 0 and 64 <= n and _rows(n) * width <= 2**19


def norm_and_modulation(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x [B, N, W], shift and scale [B, W] -> `(x - mean) / sqrt(var + eps) (1 + scale) + shift`, and x.

    What is computed of the x that is returned has its gradient added in the backward kernel, without a pass of its own.
    """
    interpret = platform() != "tpu"
    forward = per_device(partial(_call, _forward, eps, interpret), (_TOKENS,) * 3, (_TOKENS,))
    backward = per_device(partial(_call, _backward, eps, interpret), (_TOKENS,) * 4, (_TOKENS,) * 3)

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
    return both(x, shift[:, None], scale[:, None])


def _call(kernel, eps, interpret, *operands):
    """The kernel on some tokens of one example at a time: a result for each of them, and of the backward pass two sums over them."""
    from jax.experimental import pallas as pl  # takes a while to import
    from jax.experimental.pallas import tpu as pltpu

    x = operands[0]
    b, n, width = x.shape
    tokens = pl.BlockSpec((1, _rows(n), width), lambda example, part: (example, part, 0))
    vector = pl.BlockSpec((1, 1, width), lambda example, part: (example, 0, 0))
    sums = [jax.ShapeDtypeStruct((b, 1, width), jnp.float32)] * 2 if kernel is _backward else []
    return pl.pallas_call(
        partial(kernel, eps), grid=(b, n // _rows(n)), in_specs=[vector if each.shape[1] == 1 else tokens for each in operands],
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


def _forward(eps, x, shift, scale, out):
    normed = _normalised(x[0], eps)[0]
    out[0] = (normed * (1 + scale[0].astype(jnp.float32)) + shift[0].astype(jnp.float32)).astype(out.dtype)


def _backward(eps, x, g, passed, scale, dx, dshift, dscale):
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(1) == 0)
    def _():
        dshift[...] = dscale[...] = jnp.zeros(dshift.shape, jnp.float32)

    normed, inverse = _normalised(x[0], eps)
    g = g[0].astype(jnp.float32)
    dshift[0] += g.sum(0, keepdims=True)
    dscale[0] += (g * normed).sum(0, keepdims=True)
    g = g * (1 + scale[0].astype(jnp.float32))
    own = (g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True)) * inverse
    dx[0] = (passed[0].astype(jnp.float32) + own).astype(dx.dtype)
