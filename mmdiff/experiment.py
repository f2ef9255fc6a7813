"""What a config's `build(config)` returns: every part of a run, already constructed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.processes import Given, Joint
from mmdiff.training.sharding import TRANSFORMER, Rules

Params = Any
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """The parts of a run. The trainer, the sampler command and the evaluators read nothing else of the system they serve.

    Attributes:
      process: the corruption process (usually a `Joint`).
      init: `key -> params`, the network's initialiser; pure, so that it can be jitted onto a mesh.
      apply: `(params, net_x, net_t) -> out`.
      loss: `(params, batch, key) -> (scalar, metrics)`.
      optimizer: an `optax.GradientTransformation`.
      train_data, validation_data, test_data: `() -> source`, called by what reads the data; a source has `len(source)` and
        `source.take(indices) -> {name: array}`. Whatever is chosen is chosen on `validation_data`: training sees it in "val/..." and
        `train.best`, and `mmdiff eval --split validation` measures on it. What is reported is measured on `test_data`, which nothing
        else reads. Of a set that is published with one of the two alone they are the same.
      shape: the shape of one example of every modality, `{"image": (8, 8, 1), "label": ()}`.
      draw: `(params, keys, given, *, steps, guidance, absent=(), history=False) -> {name: array}`: a sampler that holds the modalities
        in `given` at t = 0 and those in `absent` at t = 1; with `history` it returns every state on the way, see `sampling.sample`.
        `steps` (int), `guidance` (float), `absent` and `history` are static under jit.
      modalities: how a person writes and sees each modality (`parse`, `check`, `show`), `{"image": Images(...), ...}`.
      evaluators: callables `(experiment, params, config, key, step) -> Findings`, run by `mmdiff eval` in this order.
      rules: the sharding table (see `training.sharding`); the first match wins.
      cache: of a tokenizer, what `mmdiff cache` encodes: a `data.token_cache.Recipe`.
      split: the name of what is in `test_data`, for evaluators that have more data than these: "test", or "validation" (`on_validation`).
      beside: frozen networks that the weights are of use beside alone (a tokenizer, towers): name -> `() -> fingerprint`, None where they
        are not at hand. A run remembers them and is refused beside others.
    """

    process: Any
    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]
    loss: Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    optimizer: Any
    train_data: Callable[[], Any]
    validation_data: Callable[[], Any]
    test_data: Callable[[], Any]
    shape: Mapping[str, tuple[int, ...]]
    draw: Callable[..., Mapping[str, jax.Array]]
    modalities: Mapping[str, Any]
    evaluators: Sequence[Callable[..., Any]] = ()
    rules: Rules = TRANSFORMER
    cache: Any = None
    split: str = "test"
    beside: Mapping[str, Callable[[], str | None]] = dataclasses.field(default_factory=dict)

    def on_validation(self) -> Experiment:
        """The experiment whose evaluators measure on the validation data: for choosing, never for reporting."""
        return dataclasses.replace(self, test_data=self.validation_data, split="validation")


def reconstructing(net: Any, name: str = "image") -> dict[str, Any]:
    """What the experiment of a tokenizer has from its network alone, `Experiment(**reconstructing(net), loss=..., ...)`.

    Nothing is diffused and nothing drawn: the image (or music) is a condition, and a sample is what its tokens decode to,
    "reconstruction".

    Args:
      net: a linen module `examples -> (..., reconstructions, ...)`, the second entry, of examples of its `shape`.
      name: the modality.
    """

    def reconstruct(params, examples):
        return {"reconstruction": net.apply(params, examples)[1]}

    def draw(params, keys, given, *, steps, guidance, absent=()):
        if name not in given:
            raise UserError(f"a tokenizer draws nothing by itself: give it something to encode, --given {name}=FILE.")
        return {**given, **reconstruct(params, given[name])}

    return {
        "process": Joint(**{name: Given(0.0)}),
        "init": lambda key: net.init(key, jnp.zeros((1, *net.shape))),
        "apply": lambda params, x, t: reconstruct(params, x[name]),
        "shape": {name: net.shape, "reconstruction": net.shape},
        "draw": draw,
    }


def initialiser(net: Any, process: Any, shape: Any) -> Callable[[jax.Array], Params]:
    """`key -> params` of a linen network, shown one example as the process feeds it (a draw from the prior at t = 1)."""

    def init(key):
        xt = process.prior(jax.random.split(key, 1), shape)
        t = {name: jnp.ones(1) for name in shape} if isinstance(shape, Mapping) else jnp.ones(1)
        return net.init(key, *process.inputs(xt, t))

    return init
