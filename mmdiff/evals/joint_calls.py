"""Quality of joint samples against network calls, for samplers that differ in more than their steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mmdiff.evals.evaluator import EvalResult, sample_batched, say


@dataclasses.dataclass(frozen=True)
class JointCalls:
    """The metrics of joint samples of several samplers, from the same keys, as METRIC_NAME.

    Attributes:
      samplers: NAME -> (as `Experiment.sampler`, steps).
      judge: `experiment -> (number of samples, pairs -> {METRIC: (value, its definition)})`.
      batch: examples in a call of the sampler.
    """

    samplers: Mapping[str, tuple[Mapping[str, Any], int]]
    judge: Callable
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        count, judged = self.judge(experiment)
        metrics, definitions = {}, {}
        for name, (options, steps) in self.samplers.items():
            say(f"sampling {count} joint samples, {name.replace('_', ' ')}")
            other = dataclasses.replace(experiment, sample=None, sampler=options)
            pairs = sample_batched(other, params, key, {}, count, batch=self.batch, steps=steps, guidance=float(config.sample.guidance))
            for metric, (value, definition) in judged(pairs).items():
                metrics[f"{metric}_{name}"], definitions[f"{metric}_{name}"] = value, definition
        return EvalResult(metrics, definitions)
