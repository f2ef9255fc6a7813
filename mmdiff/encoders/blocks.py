"""What several published networks are built from, with PyTorch's numerics: two-pass variances, stated epsilons, explicit paddings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# By the names that published config.json files use.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}

# linen's default variance E[x^2] - E[x]^2 loses digits where the mean is large, as in decoders.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)
GroupNorm = functools.partial(nn.GroupNorm, use_fast_variance=False)


def conv(features: int, size: int | tuple[int, int], stride: int = 1, padding=0, **options) -> nn.Conv:
    """A convolution with explicit padding: a number, or ((top, bottom), (left, right)). 'SAME' pads odd and even sides differently."""
    size = (size, size) if isinstance(size, int) else size
    padding = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    return nn.Conv(features, size, (stride, stride), padding=padding, **options)


class BatchNorm(nn.Module):
    """Batch normalization with the statistics of training: scale (x - running_mean) / sqrt(running_var + epsilon) + bias, per channel."""

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale, variance = (self.param(name, nn.initializers.ones, (x.shape[-1],)) for name in ("scale", "running_var"))
        bias, mean = (self.param(name, nn.initializers.zeros, (x.shape[-1],)) for name in ("bias", "running_mean"))
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return x * factor.astype(self.dtype) + (bias - mean * factor).astype(self.dtype)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, *, scale: float | None = None, bias: jax.Array | None = None
) -> jax.Array:
    """softmax(scale q k^T + bias) v over heads, the softmax in float32 or wider.

    Args:
      q, k, v: [B, N, heads * d] and [B, M, heads * d].
      scale: by default d^-1/2. bias: broadcast to [B, heads, N, M]; -inf where nothing is attended to.

    Returns:
      [B, N, heads * d].
    """
    q, k, v = (x.reshape(*x.shape[:-1], heads, -1) for x in (q, k, v))
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    weights = jax.nn.softmax(scores if bias is None else scores + bias).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(*q.shape[:-2], -1)
