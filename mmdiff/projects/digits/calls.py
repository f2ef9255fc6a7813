"""Quality against network calls: the metrics of one evaluator at several numbers of steps, for one or more samplers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmdiff.evals import plots
from mmdiff.evals.evaluator import EvalResult, Figure, say


@dataclasses.dataclass(frozen=True)
class Calls:
    """Repeats what an evaluator measures of samples, with the same keys for every setting.

        Calls(ClassTokenImages(bound_steps=80), ["frechet_ratio"], steps=[80, 40, 20, 10], samplers={"released": other})

    Attributes:
      evaluator: has `samples(experiment, params, key, steps, guidance) -> EvalResult`.
      names: which of its metrics; `x` becomes `x_at_40_steps`.
      steps: the numbers of steps.
      samplers: other samplers by name, as `Experiment.sample`, in addition to the experiment's own: `x_released_at_40_steps`.
    """

    evaluator: Any
    names: Sequence[str]
    steps: Sequence[int]
    samplers: Mapping[str, Callable] = dataclasses.field(default_factory=dict)

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        guidance = float(config.sample.guidance)
        metrics, definitions, first = {}, {}, None
        curves = {name: {} for name in self.names}
        for sampler, sample in {"": experiment.sample, **self.samplers}.items():
            for steps in self.steps:
                say(f"comparing: {steps} steps{f' of the sampler {sampler}' if sampler else ''}")
                other = dataclasses.replace(experiment, sample=sample)
                found = self.evaluator.samples(other, params, key, int(steps), guidance)
                first = first or found
                for name in self.names:
                    metric = "_".join(filter(None, (name, sampler, f"at_{steps}_steps")))
                    metrics[metric] = found.metrics[name]
                    definitions[metric] = f"{steps} steps{f' of the sampler {sampler!r}' if sampler else ''}: {found.definitions[name]}"
                    x, y = curves[name].setdefault(sampler or "default", ([], []))
                    x.append(steps)
                    y.append(found.metrics[name])
        charts = {
            f"{name.replace('_', ' ')} against steps": Figure(
                plots.lines(curves[name]), f"Guidance {guidance:g}; {first.definitions[name]}.")
            for name in self.names
        }
        settings = {"steps_compared": list(self.steps), "samplers_compared": ["default", *self.samplers]}
        return EvalResult(metrics, definitions, charts, settings)
