r"""`BatchLoss`: a loss with a state of its own, or one that compares the examples of a batch, as an explicit object.

**Comparisons** (InfoNCE, SigLIP, negatives from the batch). Such a loss is no mean over micro-batches: 8 examples have fewer negatives
than 64. It therefore states what it needs of the whole batch, in two pure pieces,

    value_j, metrics_j, e_j = pieces(params, batch_j, key, micro=micro_j)    a mean over the micro-batch, and embeddings [b, ...]
    value, metrics          = contrast(params, e),   e = all e_j, [B, ...]   of the whole batch

whose sum, mean_j value_j + value, is the loss. `training.make_step` computes its gradient for m micro-batches: first all e_j without
derivatives, then contrast, its gradient and dL/de, then, with each micro-batch computed again, the gradient of
value_j + m <dL/de_j, e_j> (GradCache, Gao et al. 2021). Where there are no embeddings, the last pass is the only one.

**State** (statistics of importance-sampled times). As optax has it: `state = loss.init(params)`, the pieces take the state and return
what they saw, sums over their examples, and `state = loss.update(state, seen)` once a step. They also take the averaged parameters, for
a process whose encoder is the network itself. `training.make_step` keeps both in its own state.

`losses.diffusion`, `combine`, `prepared` and `contrastive.resampled_negatives` make a `BatchLoss`; a loss of one's own may be one. A plain
function around one that compares examples, or has a state, would hide that from the step, and is refused: `hides` finds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr

from mmdiff.errors import UserError

WHOLE_BATCH = "mmdiff: of the whole batch"
NO_STATE = "mmdiff: without the loss's state"


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

    Of a batch whose rows are spread over devices in blocks, every device thus keeps its rows and gives an equal share of them to
    each micro-batch: nothing moves. (Splitting into blocks of rows would give each micro-batch to a few devices only.)

    >>> split(jnp.arange(6), 2).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    _check(x, parts)
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


def join(x: jax.Array) -> jax.Array:
    """[parts, B/parts, ...] -> [B, ...]: the inverse of `split`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _check(x, parts):
    if x.shape[0] % parts:
        raise UserError(f"a batch of {x.shape[0]} cannot be split into {parts} equal micro-batches.")


class Pieces(NamedTuple):
    """What a loss makes of a micro-batch (`BatchLoss.pieces`) or of all embeddings (`BatchLoss.contrast`).

    Attributes:
      value: the scalar.
      metrics: name -> scalar.
      embeddings: a pytree of arrays [b, ...], empty where no examples are compared.
      seen: what `BatchLoss.update` learns from, a dict of sums over the examples, nested or not.
    """

    value: jax.Array
    metrics: Mapping[str, jax.Array]
    embeddings: Any = ()
    seen: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BatchLoss:
    """A loss `(params, batch, key) -> (scalar, metrics)` in the pieces that micro-batches and a state of its own need.

    Attributes:
      pieces: `(params, batch, key, *, state=None, average=None, micro=None) -> Pieces`: the mean of what examples give on their own, their
        embeddings and what they add to `seen`. `state` is the loss's own (that of `init` by default), `average` the averaged parameters
        (`params` by default). With a `MicroBatch` the batch is that share of micro.batch.
      contrast: `(params, embeddings [B, ...]) -> Pieces`, the comparison.
      init: `params -> state`, a pytree of arrays; None of a loss that has no state.
      update: `(state, seen of the whole batch) -> state`.
      check: raises ValueError for a batch (NumPy arrays) that its processes refuse.

    A regression to centred targets, whose mean so far is the state:

    >>> def pieces(params, batch, key, *, state=None, **_):
    ...     mean = 0.0 if state is None else state
    ...     return Pieces(((params - (batch["x"] - mean)) ** 2).mean(), {}, seen={"sum": batch["x"].sum(), "count": batch["x"].size})
    >>> loss = BatchLoss(
    ...     pieces=pieces, init=lambda params: jnp.zeros(()), update=lambda state, seen: 0.5 * state + 0.5 * seen["sum"] / seen["count"])
    >>> state = loss.init(1.0)
    >>> value, (metrics, seen) = loss.evaluate(1.0, {"x": jnp.array([1.0, 3.0])}, None, state)
    >>> float(value), float(loss.update(state, seen))
    (2.0, 1.0)
    """

    pieces: Callable[..., Pieces]
    contrast: Callable[[Any, Any], Pieces] | None = None
    init: Callable[[Any], Any] = lambda params: None
    update: Callable[[Any, Any], Any] = lambda state, seen: state
    check: Callable[[Mapping], None] = lambda batch: None

    def __call__(self, params, batch, key, state=None, average=None):
        value, (metrics, _) = self.evaluate(params, batch, key, state, average)
        return value, metrics

    def evaluate(self, params, batch, key, state=None, average=None):
        """`(scalar, (metrics, seen))` of a whole batch."""
        own = self.pieces(params, batch, key, state=state, average=average)
        if not jax.tree.leaves(own.embeddings):
            return own.value, (own.metrics, own.seen)
        more = self.contrast(params, whole_batch(own.embeddings))
        return own.value + more.value, (added(own.metrics, more.metrics), added(own.seen, more.seen))

    @classmethod
    def of(cls, loss: Callable) -> BatchLoss:
        """The loss itself, or a plain function `(params, batch, key) -> (scalar, metrics)` as one without embeddings and state."""
        if isinstance(loss, cls):
            return loss

        def pieces(params, batch, key, **_):
            if hides(jax.make_jaxpr(loss)(params, batch, key), NO_STATE):
                raise UserError(
                    "a function of your own wraps a loss that has a state (importance-sampled times, or an encoder that is the network), "
                    "which would be lost: use what mmdiff.losses makes unwrapped (losses.combine, losses.prepared), or wrap its pieces by "
                    "dataclasses.replace(loss, pieces=...).")
            return Pieces(*loss(params, batch, key))

        return cls(pieces=pieces)


def added(metrics: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The union of two dicts of metrics, nested or not; where both have one, their sum."""
    result = dict(metrics)
    for name, value in more.items():
        old = result.get(name)
        result[name] = value if old is None else added(old, value) if isinstance(value, Mapping) else old + value
    return result


def whole_batch(tree: Any) -> Any:
    """`tree`, unchanged, marked for `hides`: what follows compares its rows, and would be another thing for some of them."""
    return jax.tree.map(lambda x: checkpoint_name(x, WHOLE_BATCH), tree)


def without_state(tree: Any) -> Any:
    """`tree`, unchanged, marked for `hides`: it stands in for a state, or for averaged parameters, that a loss was not given."""
    return jax.tree.map(lambda x: checkpoint_name(x, NO_STATE), tree)


def hides(jaxpr: ClosedJaxpr | Jaxpr, mark: str) -> bool:
    """Whether a traced function holds something with this mark, in whatever functions it is wrapped."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name" and equation.params["name"] == mark:
            return True
        inner = [leaf for leaf in jax.tree.leaves(list(equation.params.values())) if isinstance(leaf, (ClosedJaxpr, Jaxpr))]
        if any(hides(each, mark) for each in inner):
            return True
    return False


def compares_examples(jaxpr: ClosedJaxpr | Jaxpr) -> bool:
    """Whether a traced loss compares the examples of its batch."""
    return hides(jaxpr, WHOLE_BATCH)
