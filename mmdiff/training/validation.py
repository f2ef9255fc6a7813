"""The loss on held-out data while a run trains: every example counts once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmdiff.experiment import Experiment
from mmdiff.keys import key_of
from mmdiff.microbatches import compares_examples
from mmdiff.training import sharding
from mmdiff.training.step import IN_FLIGHT


class Validation:
    """`EMA params -> {"val/loss": ..., ...}`: means over all validation examples, with the same random numbers every time.

    They are taken in their own order in batches of the training size, whatever the mesh and the number of processes. The last batch is
    filled up with its last example; what the copies add is measured by a batch of that example alone and taken off again. This is exact
    for a loss (and metrics) that are means over the examples. Where a loss compares the examples of a batch, the last batch is filled
    up with the first examples instead, which can be compared with, and has the weight of the examples that were left.
    """

    def __init__(self, experiment: Experiment, config: ml_collections.ConfigDict, mesh: Mesh):
        self._source, self._size, self._mesh = experiment.validation_data(), config.train.global_batch, mesh

        def score(params, batch):
            value, metrics = experiment.loss(params, batch, key_of(config.seed))
            return {**metrics, "loss": value}

        self._score = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def names(self, params: Any, batch: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
        """The names of the metrics, from the shapes of the parameters and of a batch."""
        return sorted(f"val/{name}" for name in self._traced(params, batch).out_info)

    def __call__(self, params: Any) -> dict[str, float]:
        size, count = self._size, len(self._source)
        weighted = []  # (how many examples it stands for, metrics of a batch)
        for start in range(0, count - size + 1, size):
            weighted.append((size, self._metrics(params, start + np.arange(size))))
            if len(weighted) > IN_FLIGHT:  # as in `train`: it bounds the memory of batches in flight
                jax.block_until_ready(weighted[-1 - IN_FLIGHT])
        if left := count % size:
            positions = count - left + np.arange(size)
            if compares_examples(self._traced(params, self._batch(positions)).jaxpr):
                weighted.append((left, self._metrics(params, positions)))
            else:
                last = np.full(size, count - 1)
                weighted.append((size, self._metrics(params, np.minimum(positions, last))))
                weighted.append((left - size, self._metrics(params, last)))
        weighted = jax.device_get(weighted)
        return {
            f"val/{name}": float(sum(weight * np.float64(metrics[name]) for weight, metrics in weighted) / count)
            for name in weighted[0][1]
        }

    def _metrics(self, params: Any, positions: np.ndarray) -> Mapping[str, jax.Array]:
        with sharding.compiling_for_mesh(self._mesh):
            return self._score(params, self._batch(positions))

    def _batch(self, positions: np.ndarray) -> dict[str, jax.Array]:
        part, parts = sharding.process_shard(self._mesh, self._size)
        mine = positions[part * self._size // parts : (part + 1) * self._size // parts]
        return sharding.shard_batch({**self._source.take(mine % len(self._source)), "index": mine.astype(np.uint32)}, self._mesh)

    def _traced(self, params: Any, batch: Mapping[str, Any]) -> jax.stages.Traced:
        with sharding.compiling_for_mesh(self._mesh):
            return self._score.trace(params, batch)
