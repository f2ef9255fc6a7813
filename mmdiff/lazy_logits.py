r"""Logits of many classes that are never whole in memory: a network returns `LazyLogits`, and terms of the loss take them chunk by chunk.

The logits of L tokens and K classes, and what a loss makes of them, are several float32 arrays [B, L, K]: with K = 49,408 far more than all
activations of the network. They are the product of its last layer, so a chunk of tokens at a time is enough, computed again in the backward
pass. What it costs: each term computes its own, four products as large as the last layer's, where all terms of whole logits share three.

    net = nets.TokenTransformer(classes=16_384, grid=(16, 16), ..., logit_chunks=16)
    loss = losses.diffusion(process, net.apply, ...)        # lazily; the samplers of an `Experiment` compute them whole
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LazyLogits:
    """The logits `hidden kernel + bias`, float32 [B, ..., K], not yet computed.

    Attributes:
      hidden: [B, ..., W], of every token.
      kernel: [W, K], float32, in which its gradient is summed over the chunks.
      bias: [K].
      chunks: in how many parts the tokens of an example are taken. A chip's tokens in one of them are the rows of a product that reads
        all of the kernel: some hundreds of rows keep it busy.
      dtype: of the product's factors.

    >>> logits = LazyLogits(jnp.ones((2, 6, 4)), jnp.ones((4, 10)), jnp.zeros(10), chunks=3, dtype=jnp.float32)
    >>> logits.shape, logits.whole().shape
    ((2, 6, 10), (2, 6, 10))
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array
    chunks: int = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.kernel.shape[-1])

    def whole(self) -> jax.Array:
        """The logits as an array."""
        hidden, kernel = (x.astype(self.dtype) for x in (self.hidden, self.kernel))
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return jnp.matmul(hidden, kernel, preferred_element_type=wide) + self.bias.astype(wide)


def as_arrays(out: Any) -> Any:
    """A network's output with all `LazyLogits` in it computed, as samplers need it."""

    def lazy(leaf):
        return isinstance(leaf, LazyLogits)

    return jax.tree.map(lambda leaf: leaf.whole() if lazy(leaf) else leaf, out, is_leaf=lazy)


def tokenwise(term: Callable) -> Callable:
    """A term `(out, noised) -> [B]` that is a mean over an example's tokens, also of `LazyLogits`: the mean over their chunks.

    Nothing of a chunk is kept for the backward pass. Of arrays it is the term itself.
    """

    @functools.wraps(term)
    def lazily(out, noised):
        if not isinstance(out, LazyLogits):
            return term(out, noised)
        tokens = noised.x0[0].size

        def flat(x):
            return x.reshape(len(x), tokens, *x.shape[noised.x0.ndim :])

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def of_chunk(hidden, x0, xt):
            return term(out.replace(hidden=hidden).whole(), noised.replace(x0=x0, xt=xt, batch=None, key=None, micro=None))

        size = -(-tokens // out.chunks)
        most, rest = by_chunks(of_chunk, size, flat(out.hidden), flat(noised.x0), flat(noised.xt))
        total = size * most.sum(0)
        return (total if rest is None else total + tokens % size * rest) / tokens

    return lazily


def by_chunks(function: Callable, size: int, *arrays: jax.Array) -> tuple[Any, Any]:
    """`function` of chunks of arrays [B, L, ...], `size` of L each, one after the other.

    Returns its values [L // size, ...], and that of what is left over, or None.
    """
    count = arrays[0].shape[1] // size

    def chunks(x):
        return jnp.moveaxis(x[:, : count * size].reshape(len(x), count, size, *x.shape[2:]), 1, 0)

    most = jax.lax.map(lambda chunk: function(*chunk), tuple(map(chunks, arrays)))
    left = [x[:, count * size :] for x in arrays]
    return most, function(*left) if left[0].shape[1] else None
