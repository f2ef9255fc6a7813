"""One `attention`, several ways to compute it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmdiff.errors import import_extra
from mmdiff.nets import fused_attention, long_attention
from mmdiff.nets.target import axis_size, differentiable, platform

BACKENDS = ("reference", "xla", "cudnn", "tokamax", "pallas", "splash")


def split_heads(qkv: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, N, 3 H D] -> q, k, v [B, N, H, D]. The features are ordered by head first, so that a split of them is a split of heads."""
    b, n, size = qkv.shape
    qkv = qkv.reshape(b, n, heads, 3, size // (3 * heads))
    return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, backend: str | None = None) -> jax.Array:
    r"""`softmax(q k^T / sqrt(d)) v`, softmax in float32 or wider.

    Args:
      q: queries [B, N, H, D]; k, v: keys and values [B, M, H, D].
      mask: boolean, broadcastable to [B, H, N, M]; False masks a key. A row without any key is the mean over all values.
      backend: "reference" (batched products over B*H; the fastest here on CPU), "xla" (`jax.nn.dot_product_attention`), "cudnn" (its
        fused kernel: half precision on NVIDIA GPUs, tokens not split over devices), "tokamax" (that package's: the extra tokamax),
        "pallas" (`fused_attention`: TPUs, masks of keys; elsewhere it is interpreted, for tests), "splash" (`long_attention`: of more
        tokens). None takes a fused kernel where it applies, else the reference. Only the reference and "xla" can be differentiated in
        forward mode (`jax.jvp`): within `spans.forward_mode` the reference stands in for the others.

    Returns [B, N, H, D] in q's dtype.

    Raises:
      ValueError: an unknown backend.

    >>> q = k = v = jnp.ones((1, 3, 2, 4))
    >>> attention(q, k, v).shape
    (1, 3, 2, 4)
    """
    backend = _backend(backend, q, k.shape[1], q.shape[-1], mask)
    if backend == "pallas":
        return fused_attention.attention(q, k, v, mask)
    if backend == "splash":
        return long_attention.attention(q, k, v, mask)
    if backend != "reference":
        if mask is not None:
            mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
        q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
        if backend == "tokamax":
            attend = import_extra("tokamax", "tokamax").dot_product_attention
            return checkpoint_name(attend(q, k, v, mask=mask), "attention")
        return checkpoint_name(jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=backend), "attention")
    q, k, v = (checkpoint_name(x, "qkv").swapaxes(1, 2) for x in (q, k, v))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhnd,bhmd->bhnm", q * q.shape[-1] ** -0.5, k, preferred_element_type=wide)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
    # Unnormalised weights, divided by their sum at the end: one pass over N x M numbers less.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v, preferred_element_type=wide)
    return checkpoint_name((out / weights.sum(-1, keepdims=True)).astype(q.dtype).swapaxes(1, 2), "attention")


def self_attention(qkv: jax.Array, bias: jax.Array, heads: int, backend: str | None = None) -> jax.Array:
    """`attention` of tokens to each other, by a product [B, N, 3HD] ordered as in `split_heads` and its bias [3HD]: [B, N, HD]."""
    if _backend(backend, qkv, qkv.shape[1], qkv.shape[-1] // (3 * heads)) == "pallas":
        return fused_attention.self_attention(qkv, bias, heads)
    return attention(*split_heads(qkv + bias.reshape(1, 1, -1), heads), backend=backend).reshape(*qkv.shape[:2], -1)


def _backend(backend: str | None, queries: jax.Array, keys: int, size: int, mask: jax.Array | None = None) -> str:
    """The backend for queries [B, N, ...] of heads that are `size` wide."""
    backend = differentiable(backend)
    if backend is None:
        half = queries.dtype in (jnp.bfloat16, jnp.float16)
        if fused_attention.applies(queries, keys, size, mask):
            return "pallas"
        if long_attention.applies(queries, keys, size, mask):
            return "splash"
        # cuDNN's gradient with a mask wants even lengths.
        fits = half and size % 8 == 0 and size <= 128 and (mask is None or queries.shape[1] % 2 == keys % 2 == 0)
        return "cudnn" if platform() == "gpu" and axis_size("seq") == 1 and fits else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"attention: no backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    return backend
