"""What a config's `build(config)` returns: every part of a run. A config states some of them, and the others follow."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.lazy_logits import as_arrays
from mmdiff.processes import Given, Joint
from mmdiff.sampling import make_sampler

Params = Any
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """The parts of a run. The trainer, the sampler command and the evaluators read nothing else of the system they serve.

    A joint model of images and labels needs six; what is left out follows from them:

    >>> import optax
    >>> from mmdiff import losses, nets, schedules, times
    >>> from mmdiff.data.modalities import Images, Labels
    >>> from mmdiff.data.sources import RandomSource
    >>> from mmdiff.processes import Gaussian, Joint, absorbing, velocity
    >>> modalities = {"image": Images(8, 8, 1), "label": Labels(10)}
    >>> process = Joint(image=Gaussian(schedules.flow(), velocity), label=absorbing(10))
    >>> net = nets.MMDiT({"image": nets.Patches(8, 8, 1, 2), "label": nets.Label(11, 10)}, depth=1, width=32, heads=2)
    >>> noise_levels = times.joint(image=times.uniform(), label=times.uniform())
    >>> experiment = Experiment(
    ...     process=process, net=net, modalities=modalities,
    ...     loss=losses.diffusion(process, net.apply, noise_levels), optimizer=optax.adamw(1e-3),
    ...     data=lambda split: RandomSource(modalities), sampler={"drop": ("label",)})
    >>> params = jax.jit(experiment.init)(jax.random.key(0))
    >>> sevens = {"label": jnp.array([7, 7])}
    >>> experiment.sample(params, jax.random.split(jax.random.key(1)), sevens, steps=2, guidance=1.5)["image"].shape
    (2, 8, 8, 1)

    `dataclasses.replace` keeps what has followed: with another process or network, set `init`, `apply`, `shape` or `sample` to None, and
    they are derived again.

    Attributes:
      process: the corruption process (usually a `Joint`).
      net: a linen network, `net.apply(params, net_x, net_t) -> out`; needless where `init` and `apply` are given.
      modalities: how a person writes and sees each modality, and its size (`parse`, `check`, `show`, `shape`): `{"image": Images(8, 8)}`.
      loss: `(params, batch, key) -> (scalar, metrics)`.
      optimizer: an `optax.GradientTransformation`.
      data: `split -> source` of "train", "validation" and "test", called by what reads the data; a source has `len(source)` and
        `source.take(indices) -> {name: array}`. Whatever is chosen is chosen on "validation": training sees it in "val/..." and
        `train.best`, and `mmdiff eval --split validation` measures on it. What is reported is measured on "test", which nothing
        else reads. Of a set that is published with one of the two alone they are the same.
      sampler: the options of `sampling.make_sampler` (paths, heun, transforms, ...). Without `drop`, guidance drops the conditions.
      evaluators: callables `(experiment, params, config, key, step) -> EvalResult`, run by `mmdiff eval` in this order.
      in_loop: those that measure on the validation data while it trains, every config.train.metrics_every steps: cheap ones, each with
        `better`, {metric: "min" or "max"} of those that `train.best` may name, and, if it has something to open or to measure once,
        `prepared(experiment, config) -> evaluator`.
      init: `key -> params`, pure, so that it can be jitted onto a mesh; the network's own by default.
      apply: `(params, net_x, net_t) -> out`; the network's own by default.
      shape: the shape of one example of every modality of the process, `{"image": (8, 8, 1), "label": ()}`; those of `modalities`.
      sample: `(params, keys, given, *, steps, guidance, absent=(), history=False) -> {name: array}`: a sampler that holds the modalities
        in `given` at t = 0 and those in `absent` at t = 1; with `history` it returns every state on the way, see `sampling.sample`.
        `steps` (int), `guidance` (float), `absent` and `history` are static under jit.
      train_data, validation_data, test_data: `() -> source`; those of `data`.
      rules: the sharding table (see `training.sharding`), the first match wins; that of the transformers by default.
      cache: of a tokenizer or towers, what `mmdiff cache` writes: a `data.network_cache.CacheWriter`.
      split: the name of what is in `test_data`, for evaluators that have more data than these: "test", or "validation" (`on_validation`).
      frozen_deps: the frozen networks that the weights were trained with and need (a tokenizer, towers): name -> `() -> fingerprint`,
        None where they are not available. A run remembers them and is refused with others.

    Raises:
      UserError: a modality of the process is missing in `modalities`.
    """

    process: Any
    modalities: Mapping[str, Any]
    loss: Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    optimizer: Any
    net: Any = None
    data: Callable[[str], Any] | None = None
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluators: Sequence[Callable[..., Any]] = ()
    in_loop: Sequence[Callable[..., Any]] = ()
    init: Callable[[jax.Array], Params] | None = None
    apply: Callable[..., Any] | None = None
    shape: Mapping[str, tuple[int, ...]] | None = None
    sample: Callable[..., Mapping[str, jax.Array]] | None = None
    train_data: Callable[[], Any] | None = None
    validation_data: Callable[[], Any] | None = None
    test_data: Callable[[], Any] | None = None
    rules: Any = None
    cache: Any = None
    split: str = "test"
    frozen_deps: Mapping[str, Callable[[], str | None]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        def follow(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        if self.data is not None:
            for split in ("train", "validation", "test"):
                follow(f"{split}_data", functools.partial(self.data, split))
        if isinstance(self.process, Joint):
            missing = [name for name in self.process.parts if name not in self.modalities]
            if missing and self.shape is None:
                raise UserError(f"Experiment: the process has the modality {missing[0]!r}, but `modalities` has {sorted(self.modalities)}.")
            follow("shape", {name: modality.shape for name, modality in self.modalities.items() if name in self.process.parts})
        if self.net is not None:
            follow("init", initialiser(self.net, self.process, self.shape))
            follow("apply", lambda *args, **named: as_arrays(self.net.apply(*args, **named)))
        if isinstance(self.process, Joint) and self.apply is not None and self.sample is None:
            conditions = self.process.conditions
            nothing = len(conditions) == len(self.process.parts)
            options = {"drop": conditions, **self.sampler}
            follow("sample", _samples_nothing if nothing else make_sampler(self.process, self.apply, self.shape, **options))

    def on_validation(self) -> Experiment:
        """The experiment whose evaluators measure on the validation data: for choosing, never for reporting."""
        return dataclasses.replace(self, test_data=self.validation_data, split="validation")


def watched(evaluators: Sequence[Any]) -> dict[str, str]:
    """What such evaluators measure in the loop, as metrics.jsonl calls it, and which is better: {"val/FID": "min"}."""
    return {f"val/{name}": way for evaluator in evaluators for name, way in getattr(evaluator, "better", {}).items()}


def best_metric(experiment: Experiment, asked: str) -> tuple[str, str]:
    """-> (a metric, "min" or "max"): what config.train.best says, "val/FID" or "max:val/IS"; "min" unless one says otherwise."""
    way, colon, name = asked.partition(":")
    if colon and way in ("min", "max"):
        return name, way
    return asked, watched(getattr(experiment, "in_loop", ())).get(asked, "min")


def _samples_nothing(params, keys, given, *, steps, guidance, absent=(), history=False):
    raise UserError("this model samples nothing: all its modalities are conditions. See the head of its config for its use.")


def reconstructing(net: Any, name: str = "image") -> dict[str, Any]:
    """What the experiment of a tokenizer has from its network alone, `Experiment(**reconstructing(net), loss=..., ...)`.

    Nothing is diffused and nothing sampled: the image (or music) is a condition, and a sample is what its tokens decode to,
    "reconstruction".

    Args:
      net: a linen module `examples -> (..., reconstructions, ...)`, the second entry, of examples of its `shape`.
      name: the modality.
    """

    def reconstruct(params, examples):
        return {"reconstruction": net.apply(params, examples)[1]}

    def sample(params, keys, given, *, steps, guidance, absent=()):
        if name not in given:
            raise UserError(f"a tokenizer samples nothing by itself: give it something to encode, --given {name}=FILE.")
        return {**given, **reconstruct(params, given[name])}

    return {
        "process": Joint(**{name: Given(0.0)}),
        "init": lambda key: net.init(key, jnp.zeros((1, *net.shape))),
        "apply": lambda params, x, t: reconstruct(params, x[name]),
        "shape": {name: net.shape, "reconstruction": net.shape},
        "sample": sample,
    }


def initialiser(net: Any, process: Any, shape: Any) -> Callable[[jax.Array], Params]:
    """`key -> params` of a linen network, called on one example as the process feeds it (a sample of the prior at t = 1)."""

    def init(key):
        xt = process.prior(jax.random.split(key, 1), shape)
        t = {name: jnp.ones(1) for name in shape} if isinstance(shape, Mapping) else jnp.ones(1)
        return net.init(key, *process.inputs(xt, t))

    return init
