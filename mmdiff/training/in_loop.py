"""What a run makes of its averaged weights while it trains: grids of samples, and the metrics of `Experiment.in_loop`.

Noise and conditions are the same each time, so that what changes is the model. No random key of the training is read: a run with grids
and metrics has the bits of one without, and one that continues has those of one that was not stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmdiff import checks
from mmdiff.errors import UserError
from mmdiff.evals.sample_grid import SampleGrid
from mmdiff.experiment import Experiment, watched
from mmdiff.keys import key_of_use
from mmdiff.nets.target import compiling_for
from mmdiff.training import distributed
from mmdiff.training.metrics_logger import MetricsLogger

SEED = 0  # of noise, whatever config.seed is; `sample` and `eval` have other keys of it
SHARE = 0.05  # of the time, where config.train.evaluation_share does not say


@dataclasses.dataclass
class Cadence:
    """When something is due: every `every` steps (0: never) and at the last one after them, but not before the step `next`.

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
        return bool(self.every) and step >= max(self.next, self.every) and (last or step % self.every == 0)

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
        if every["metrics"] and not experiment.in_loop:
            raise UserError(
                "config.train.metrics_every asks for metrics, and the experiment states none as in_loop: set it to 0 or, where the config "
                "has config.eval.encoder.kind, name a network there.")
        wanted = {"grid": [SampleGrid()] if every["grid"] else [], "metrics": experiment.in_loop if every["metrics"] else []}
        self._evaluators = {
            name: [each.prepared(self._experiment, config) if hasattr(each, "prepared") else each for each in evaluators]
            for name, evaluators in wanted.items()}
        self.watched = watched(self._evaluators["metrics"])
        self._explained = False

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
        for name, cadence in self.cadences.items():
            if not cadence.due(step, step == self._config.train.steps):
                continue
            began, pace = time.perf_counter(), logger.pace(step)
            try:
                values |= self._make(name, step, params, logger)
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

    def _make(self, name: str, step: int, params: Any, logger: MetricsLogger) -> dict[str, float]:
        args = self._experiment, params, self._config, key_of_use(SEED, name), step
        with compiling_for(jax.default_backend()):  # the averages are on one device
            found = functools.reduce(operator.or_, [evaluate(*args) for evaluate in self._evaluators[name]])
        if name == "grid":
            for title, figure in found.figures.items():
                logger.image(step, title if len(found.figures) > 1 else "", figure.image)
            return {}
        values = {f"val/{metric}": float(value) for metric, value in found.metrics.items()}
        if not self._explained:
            self._explained = True
            for metric, definition in found.definitions.items():
                logger.say(f"val/{metric}: {definition}")
        logger.say(f"step {step}: {', '.join(f'{metric} {value:.4g}' for metric, value in values.items() if metric in self.watched)}")
        return values

    def _local(self, ema: Any) -> Any:
        """The averages whole on the first device of each process."""
        if any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(ema)):
            ema = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self._mesh, PartitionSpec()))(ema)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), ema)
