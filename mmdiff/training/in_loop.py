"""What a run makes of its averaged weights while it trains: grids of samples, and the metrics of `Experiment.in_loop`.

Noise and conditions are the same each time, so that what changes is the model. No random key of the training is read: a run with grids
and metrics has the bits of one without, and one that continues has those of one that was not stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmdiff import checks
from mmdiff.errors import UserError
from mmdiff.evals.sample_grid import SampleGrid
from mmdiff.experiment import Experiment
from mmdiff.keys import key_of_use
from mmdiff.training import distributed
from mmdiff.training.metrics_logger import MetricsLogger

SEED = 0  # of noise, whatever config.seed is; `sample` and `eval` have other keys of it
SHARE = 0.05  # of the time, where config.train.evaluation_share does not say


@dataclasses.dataclass
class Cadence:
    """When something is due: every `every` steps (0: never) and at the last one, but not before the step `next`.

    >>> cadence = Cadence(every=100, share=0.05)
    >>> cadence.due(100), cadence.due(150), cadence.due(150, last=True)
    (True, False, True)
    >>> cadence.taken(100, seconds=19.0, pace=1.0)  # 19 s are 5 % of the time if 361 s of training follow them
    >>> cadence.next, cadence.due(400), cadence.due(500)
    (461, False, True)
    """

    every: int
    share: float
    next: int = 0

    def due(self, step: int, last: bool = False) -> bool:
        return bool(self.every) and step >= self.next and (last or step % self.every == 0)

    def taken(self, step: int, seconds: float, pace: float) -> None:
        """It took so many seconds at this step; training takes `pace` seconds a step."""
        self.next = step + max(1, math.ceil(seconds * (1 / self.share - 1) / pace) if pace else 1)


class InLoop:
    """`(step, state.ema, logger) -> metrics`: makes what is due, and says when it is next. All processes call it together.

    Everything that can fail for a missing file or a config that does not fit does so here, before the first step.

    Args:
      experiment, config: of the run. mesh: where its averages are.

    Raises:
      UserError: nothing to make, or nothing to make it with.
    """

    def __init__(self, experiment: Experiment, config: ml_collections.ConfigDict, mesh: Mesh):
        options = config.train
        every = {"grid": options.get("sample_every", 0), "metrics": options.get("metrics_every", 0)}
        share = options.get("evaluation_share", SHARE) / max(1, sum(map(bool, every.values())))
        self.cadences = {name: Cadence(steps, share) for name, steps in every.items()}
        self._experiment, self._config, self._mesh = experiment.on_validation(), config, mesh
        self._grid = SampleGrid().prepared(self._experiment, config) if every["grid"] else None

    def due(self, step: int) -> bool:
        return any(cadence.due(step, step == self._config.train.steps) for cadence in self.cadences.values())

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: when each is next due."""
        return {name: cadence.next for name, cadence in self.cadences.items()}

    def restore(self, state: Mapping[str, int]) -> None:
        for name, step in state.items():
            self.cadences[name].next = step

    def __call__(self, step: int, ema: Any, logger: MetricsLogger) -> dict[str, float]:
        params, values = self._local(ema), {}
        for name, make in (("grid", self._make_grid),):
            cadence = self.cadences[name]
            if not cadence.due(step, step == self._config.train.steps):
                continue
            began, pace = time.perf_counter(), logger.pace(step)
            try:
                values |= make(step, params, logger)
            except Exception as error:  # training is worth more; but where others wait for this process, all must end
                if jax.process_count() > 1 and not isinstance(error, UserError):
                    raise
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {checks.short(str(error), 300)}"
                logger.say(f"step {step}: no {name}, training continues: {text}")
            cadence.taken(step, seconds := time.perf_counter() - began, pace)
            cadence.next = distributed.from_first(functools.partial(getattr, cadence, "next"))
            following = -(-cadence.next // cadence.every) * cadence.every
            if following > (step // cadence.every + 1) * cadence.every:
                took = f"{seconds:.1f} s are more than {cadence.share:.1%} of the time"
                logger.say(f"step {step}: the {name}: {took}; next at step {following} (config.train.evaluation_share)")
        return values

    def _make_grid(self, step: int, params: Any, logger: MetricsLogger) -> dict[str, float]:
        figures = self._grid(self._experiment, params, self._config, key_of_use(SEED, "grid"), step).figures
        for name, figure in figures.items():
            logger.image(step, name if len(figures) > 1 else "", figure.image)
        return {}

    def _local(self, ema: Any) -> Any:
        """The averages whole on the first device of each process."""
        if any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(ema)):
            ema = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self._mesh, PartitionSpec()))(ema)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), ema)
