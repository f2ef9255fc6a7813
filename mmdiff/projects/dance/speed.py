"""How fast music is sampled: seconds of it for a second of sampling."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from mmdiff.data.sources import Subset, load_all
from mmdiff.evals.evaluator import EvalResult, costs, say


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of music for a second of sampling on this machine, in all of config.sample.steps and in a quarter of them.

    Attributes:
      given: the modalities of a clip that the model is given.
      seconds: of a clip.
      batch: clips that are sampled at once.
      repeats: runs of each kind, of which the median counts.
    """

    given: tuple[str, ...]
    seconds: float
    batch: int = 50
    repeats: int = 3

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        say("measuring how fast music is sampled")
        known = load_all(Subset(experiment.test_data(), self.batch))
        given = {name: np.asarray(known[name]) for name in self.given}
        count = len(given[self.given[0]])
        few = max(1, steps // 4)
        ways = {
            name: (functools.partial(experiment.sample, steps=n, guidance=guidance), given, count)
            for name, n in (("music_per_second", steps), ("music_per_second_quarter", few))
        }
        metrics = {name: self.seconds / each for name, each in costs(params, key, ways, self.repeats).items()}
        what = f"seconds of music for a second of sampling (tokens alone), median of {self.repeats}, {count} clips at once"
        definitions = {name: f"{what}, {n} steps, guidance {guidance:g}" for name, n in zip(metrics, (steps, few))}
        return EvalResult(metrics, definitions)
