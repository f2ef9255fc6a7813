"""Attention for TPUs over more tokens than `fused_attention` takes: jax's splash attention, which goes through the keys block by block."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmdiff.nets.fused_attention import LONGEST, of_keys
from mmdiff.nets.target import per_device, platform, takes_kernels

LANES, LARGEST = 128, 1024  # tokens: those of every block are a multiple of the one, and at most the other

_TOKENS, _MASK = ("batch", "heads", None, None), ("batch", None)


def applies(queries: jax.ShapeDtypeStruct, keys: int, size: int, mask: Any = None) -> bool:
    """Whether the kernels can compute the attention of queries [B, N, ...] to so many keys, heads being `size` wide, and pay."""
    b, n = queries.shape[:2]
    return (
        takes_kernels(b) and queries.dtype in (jnp.bfloat16, jnp.float32)
        and size % 8 == 0 and max(n, keys) > LONGEST and min(n, keys) >= LANES and (mask is None or of_keys(mask))
    )  # fmt: skip


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`attention.attention`: q [B, N, H, D], k and v [B, M, H, D], a mask that is the same for all queries and heads."""
    b, n, m = *q.shape[:2], k.shape[1]
    if mask is not None and not of_keys(mask):
        raise ValueError(f'the attention backend "splash" takes masks [B, 1, 1, M] of keys, not {mask.shape}: choose "reference".')
    q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    if mask is None:
        visible = jnp.ones((b, m), bool)
    else:
        visible = jnp.broadcast_to(mask, (b, 1, 1, m)).reshape(b, m)
        some = visible.any(1)  # the mean over all keys where there is none: equal scores that have no gradient
        q, visible = jnp.where(some[:, None, None, None], q, 0), visible | ~some[:, None]
    rows, columns = _block(n), _block(m)
    masks = () if mask is None and m % columns == 0 else (_filled(visible.astype(jnp.int32), columns),)
    q, k, v = _filled(q, rows), _filled(k, columns), _filled(v, columns)
    run = per_device(partial(_attend, rows, columns, platform() != "tpu"), (_TOKENS,) * 3 + (_MASK,) * len(masks), (_TOKENS,))
    [out] = run(*(x.swapaxes(1, 2) for x in (q, k, v)), *masks)
    return out.swapaxes(1, 2)[:, :n]


def _attend(rows, columns, interpret, q, k, v, *masks):
    """Of one device: [B, H, N, D], and which keys are seen [B, M]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a while to import

    heads, n, m = q.shape[1], q.shape[2], k.shape[2]
    blocks = splash.BlockSizes(
        block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_kv_dkv_compute=columns, use_fused_bwd_kernel=True
    )
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((n, m))] * heads),
        block_sizes=blocks,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    # Tokens see those of their own segment.
    segments = [splash.SegmentIds(jnp.ones((q.shape[0], n), jnp.int32), mask) for mask in masks]
    return (jax.vmap(kernel)(q, k, v, *segments),)


def _block(length: int) -> int:
    """The size of equal blocks, as few as can be."""
    count = -(-length // LARGEST)
    return -(-length // (count * LANES)) * LANES


def _filled(x: jax.Array, block: int) -> jax.Array:
    """Whole blocks of x [B, N, ...]."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)])
