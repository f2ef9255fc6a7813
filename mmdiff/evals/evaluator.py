"""What an evaluator returns, and running a function over many examples in batches of one shape."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import console, hosts
from mmdiff.errors import UserError
from mmdiff.evals import streaming
from mmdiff.evals.accuracy import posterior

SECONDS = "evaluation_seconds"  # the setting that says how long every stage of an evaluation took


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure of a report: a Pillow image, or the text of an SVG, with the sentence that goes under it.

    `sounds` are players below it: name -> the bytes of a wav file.
    """

    image: Any
    caption: str
    sounds: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What an evaluator `(experiment, params, config, key, step) -> EvalResult` measured.

    >>> result = EvalResult({"accuracy": 0.9}, {"accuracy": "share of 500 held-out images", "other": "of what was not measured"})
    >>> result.definitions
    {'accuracy': 'share of 500 held-out images'}

    Two of them make one by `|`, with the seconds of both:

    >>> (result | EvalResult({"recall": 0.8}, settings={"evaluation_seconds": {"recall": 3.0}})).metrics
    {'accuracy': 0.9, 'recall': 0.8}

    Attributes:
      metrics: the measured numbers by name.
      definitions: one sentence for each metric, which says what was measured, on how many examples; those of other metrics are left out.
      figures: by title.
      settings: what the metrics depend on: counts, steps, guidance, features, ...
    """

    metrics: Mapping[str, float]
    definitions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        known = {name: text for name, text in self.definitions.items() if name in self.metrics}
        object.__setattr__(self, "definitions", known)

    def __or__(self, other: EvalResult) -> EvalResult:
        fields = [field.name for field in dataclasses.fields(EvalResult)]
        both = {name: {**getattr(self, name), **getattr(other, name)} for name in fields}
        seconds = [each.settings[SECONDS] for each in (self, other) if SECONDS in each.settings]
        if seconds:
            both["settings"][SECONDS] = {stage: value for each in seconds for stage, value in each.items()}
        return EvalResult(**both)


def in_batches(function: Callable, params: Any, keys: jax.Array, given: Any, size: int) -> Any:
    """`function(params, keys, given)` over many examples, `size` of them at a time on each device of each process, by one program.

    All processes of a run call it together, and get all results, whose bits depend on `size` at most.

    Args:
      function: maps keys [size] and a pytree of arrays [size, ...] to such a pytree, every example on its own.
      keys: one key per example, [n].
      given: pytree of arrays [n, ...].

    Returns the results as NumPy arrays [n, ...].

    Raises:
      UserError: results that are not finite, see `finite`.
    """
    count = keys.shape[0]
    size = min(size, count)
    mine = hosts.part(streaming.count_of(count, size))
    turns = console.progress(mine, "batch") if hosts.is_first() else mine
    found = streaming.stream(function, params, keys, given, count, size, blocks=mine)
    parts = [results for _, (_, results) in zip(turns, found)]
    if jax.process_count() > 1:  # one without a block has nothing to say of what kind results are
        like = jax.eval_shape(function, params, *jax.tree.map(lambda array: array[:size], (keys, given)))
        parts.append(jax.tree.map(lambda leaf: np.empty((0, *leaf.shape[1:]), leaf.dtype), like))
    results = jax.tree.map(lambda *arrays: hosts.joined(np.concatenate(arrays)), *parts)
    for path, array in jax.tree_util.tree_leaves_with_path(results):
        finite(jax.tree_util.keystr(path, simple=True, separator="/") or "the network's answers", array)
    return results


def finite(name: str, array: np.ndarray, start: int = 0) -> np.ndarray:
    """`array` [n, ...], if all its numbers are finite: the door of every read-out, since a NaN is smaller and larger than nothing.

    Its first example is called the one of the number `start`.

    Raises:
      UserError: how many of the n examples are not, and the first of them.
    """
    array = np.asarray(array)
    if array.dtype.kind in "fc" or array.dtype.name == "bfloat16":
        wrong = np.flatnonzero(~np.isfinite(array.astype(np.float64) if array.dtype.kind != "c" else array).reshape(len(array), -1).all(-1))
        if len(wrong):
            raise UserError(
                f"{name}: {len(wrong):,} of {len(array):,} examples, the first of them {start + wrong[0]}, hold values that are not finite "
                "(NaN or infinite), which mean nothing: take a checkpoint from before the training diverged (--step), or weaker guidance.")
    return array


def best(name: str, scores: np.ndarray) -> np.ndarray:
    """The place of the largest of the scores [n, m] of every example: int64 [n]; -1, no class at all, where several are equally large.

    Thus scores that say nothing, all of them equal, are right about no example, whatever the order of the classes.

    >>> best("scores", np.array([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]]))
    array([ 1, -1])

    Raises:
      UserError: scores that are not finite.
    """
    scores = finite(name, scores)
    largest = scores.max(-1, keepdims=True)
    return np.where((scores == largest).sum(-1) > 1, -1, scores.argmax(-1))


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """Keys [count], `fold_in(key, i)`: what is sampled for an example does not depend on the batch size."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count, dtype=jnp.uint32))


def say(message: str) -> None:
    """A line of process 0 for the person who waits; standard output is left to results."""
    if hosts.is_first():
        console.say(f"mmdiff eval: {message}")


def predict_batched(experiment, params, key, given, target: str, batch: int) -> np.ndarray:
    """`accuracy.posterior` of all examples of `given`, by one network call each: [n, ...]; example i's key is `fold_in(key, i)`.

    Of a label or tokens these are probabilities, of images and vectors their means.
    """

    def predict(params, keys, given):
        return posterior(experiment.process, experiment.apply, params, keys, given, target, experiment.shape)

    return in_batches(predict, params, example_keys(key, len(next(iter(given.values())))), given, batch)


def sample_batched(
    experiment, params, key, given, count: int, *, batch: int, steps: int, guidance: float, absent=()
) -> dict[str, np.ndarray]:
    """`count` samples of `experiment.sample`; example i's key is `fold_in(key, i)`."""
    sample = _sampler(experiment.sample, steps, guidance, tuple(absent))
    return in_batches(sample, params, example_keys(key, count), given, batch)


@functools.lru_cache(maxsize=16)
def _sampler(sample: Callable, steps: int, guidance: float, absent: tuple[str, ...]) -> Callable:
    """One function for one setting: what is compiled for it serves every evaluation of a run."""
    return functools.partial(sample, steps=steps, guidance=guidance, absent=absent)


def states(experiment, params, key, given, name: str, *, steps: int, guidance: float, count: int = 10, rows: int = 6) -> np.ndarray:
    """What `count` trajectories pass through on their way from noise to a sample of modality `name`: [rows * count, ...], row by row.

    `given` holds at least `count` examples each, or nothing.
    """
    trajectory = jax.jit(functools.partial(experiment.sample, steps=steps, guidance=guidance, history=True))
    passed = trajectory(params, example_keys(key, count), jax.tree.map(lambda array: jnp.asarray(array[:count]), dict(given)))[name]
    picked = np.linspace(0, len(passed) - 1, rows).round().astype(int)
    return np.concatenate(np.asarray(passed)[picked])


def costs(params, key, ways: Mapping[str, tuple[Any, Any, float]], repeats: int = 5) -> dict[str, float]:
    """Seconds per example, the median of `repeats` calls in turn: name -> (function `(params, keys, given)`, given, examples in it)."""
    compiled = {}
    for name, (function, given, count) in ways.items():
        keys = example_keys(key, len(jax.tree.leaves(given)[0]))
        compiled[name] = functools.partial(jax.jit(function), params, keys, given)
        jax.block_until_ready(compiled[name]())
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append((time.perf_counter() - start) / ways[name][2])
    return {name: float(np.median(values)) for name, values in seconds.items()}


class Clock:
    """Says what happens, and keeps how many seconds each stage took."""

    def __init__(self):
        self.seconds, self._stage = {}, None

    def start(self, stage: str, message: str) -> None:
        """Ends the stage before, if there is one, and begins another."""
        self.stop()
        say(message)
        self._stage, self._since = stage, time.monotonic()

    def stop(self) -> None:
        """Ends a stage."""
        if self._stage:
            self.seconds[self._stage] = round(time.monotonic() - self._since, 1)
            self._stage = None
