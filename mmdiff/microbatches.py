r"""Losses that compare the examples of a batch (InfoNCE, SigLIP, negatives from the batch), and the micro-batches they are computed in.

Such a loss is no mean over micro-batches: 8 examples have fewer negatives than 64. So it says what it needs of the whole batch, in two
pure pieces,

    value_j, metrics_j, e_j = pieces(params, batch_j, key, micro_j)      a mean over the micro-batch, and embeddings [b, ...]
    value, metrics          = contrast(params, e),   e = all e_j, [B, ...]   of the whole batch

whose sum, mean_j value_j + value, is the loss. `training.make_step` computes its gradient for m micro-batches: first all e_j without
derivatives, then contrast, its gradient and dL/de, then, with each micro-batch computed again, the gradient of
value_j + m <dL/de_j, e_j> (GradCache, Gao et al. 2021). Where there are no embeddings, the last pass is the only one.

`losses.diffusion`, `combine`, `prepared` and `contrastive.own_chain` make a `BatchLoss`; a loss of one's own may be one. What compares
examples within a plain function cannot be computed so, and is refused: `compares_examples` finds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr

from mmdiff.errors import UserError

MARK = "mmdiff: of the whole batch"


@flax.struct.dataclass
class MicroBatch:
    """Which examples of a batch a micro-batch holds, for negatives that come from the whole of it.

    Attributes:
      batch: the entries of the whole batch, [B, ...].
      number: int32 [], which of the `count` micro-batches.
      count: m.
      x0: the clean data of the whole batch, of one modality or all: where a process is known.
    """

    batch: Mapping[str, jax.Array]
    number: jax.Array
    count: int = flax.struct.field(pytree_node=False)
    x0: Any = None

    def rows(self, x: jax.Array) -> jax.Array:
        """The micro-batch's rows of x [B, ...]: [B/m, ...], those of `split(x, m)[number]`."""
        _check(x, self.count)
        return jax.lax.dynamic_index_in_dim(x.reshape(-1, self.count, *x.shape[1:]), self.number, axis=1, keepdims=False)

    def of(self, name: str) -> MicroBatch:
        """With the clean data of one modality."""
        return self.replace(x0=self.x0[name])


def split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B/parts, ...], micro-batch j being the rows j, j + parts, j + 2 parts, ...

    Of a batch whose rows are spread over devices in blocks, every device so keeps its rows and gives an equal share of them to
    each micro-batch: nothing moves. (Splitting into blocks of rows would give each micro-batch to a few devices only.)
    """
    _check(x, parts)
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


def join(x: jax.Array) -> jax.Array:
    """[parts, B/parts, ...] -> [B, ...]: the inverse of `split`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _check(x, parts):
    if x.shape[0] % parts:
        raise UserError(f"a batch of {x.shape[0]} cannot be split into {parts} equal micro-batches.")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BatchLoss:
    """A loss `(params, batch, key) -> (scalar, metrics)` in the two pieces that micro-batches need.

    Attributes:
      pieces: `(params, batch, key, micro=None) -> (value, metrics, embeddings)`: the mean of what examples give on their own, and a
        pytree of arrays [b, ...], empty where no examples are compared. With a `MicroBatch` the batch is that share of micro.batch.
      contrast: `(params, embeddings [B, ...]) -> (value, metrics)`, the comparison.
      stats: the statistics of importance-sampled times, see `losses`; None without.
      averaged: whether it needs the averaged parameters, batch["ema"].
      check: raises ValueError for a batch (NumPy arrays) that its processes refuse.
    """

    pieces: Callable[..., tuple[jax.Array, dict, Any]]
    contrast: Callable[[Any, Any], tuple[jax.Array, dict]] | None = None
    stats: Any = None
    averaged: bool = False
    check: Callable[[Mapping], None] = lambda batch: None

    def __call__(self, params, batch, key):
        value, metrics, embeddings = self.pieces(params, batch, key)
        if not jax.tree.leaves(embeddings):
            return value, metrics
        more, extra = self.contrast(params, whole_batch(embeddings))
        return value + more, added(metrics, extra)

    @classmethod
    def of(cls, loss: Callable) -> BatchLoss:
        """The loss itself, or a plain function as one without embeddings."""
        if isinstance(loss, cls):
            return loss
        return cls(
            pieces=lambda params, batch, key, micro=None: (*loss(params, batch, key), ()),
            stats=getattr(loss, "stats", None),
            averaged=getattr(loss, "averaged", False),
        )


def added(metrics: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The union of two dicts of metrics, nested or not; where both have one, their sum."""
    result = dict(metrics)
    for name, value in more.items():
        old = result.get(name)
        result[name] = value if old is None else added(old, value) if isinstance(value, Mapping) else old + value
    return result


def whole_batch(tree: Any) -> Any:
    """`tree`, unchanged, marked for `compares_examples`: what follows compares its rows, and would be another thing for some of them."""
    return jax.tree.map(lambda x: checkpoint_name(x, MARK), tree)


def compares_examples(jaxpr: ClosedJaxpr | Jaxpr) -> bool:
    """Whether a traced function holds something that was marked by `whole_batch`, in whatever functions it is wrapped."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name" and equation.params["name"] == MARK:
            return True
        inner = [leaf for leaf in jax.tree.leaves(list(equation.params.values())) if isinstance(leaf, (ClosedJaxpr, Jaxpr))]
        if any(map(compares_examples, inner)):
            return True
    return False
