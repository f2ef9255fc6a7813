"""The averaged weights of a run's checkpoint, for use: sampling, evaluation, fine-tuning. Nothing else is opened, nothing changed."""

from __future__ import annotations

import logging
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from mmdiff import former_names
from mmdiff.errors import UserError
from mmdiff.experiment import best_metric
from mmdiff.training import checkpoint_files, distributed, integrity, run_metadata, sharding

log = logging.getLogger(__name__)


def restore_for_inference(
    experiment: Any,
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    *,
    step: int | str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Any, int]:
    """-> (EMA params, step) of a run; opens nothing else and changes nothing.

    Args:
      experiment: what the config builds; its `init` gives the shapes.
      config: compared with the run's, except for the keys in `run_metadata.MAY_DIFFER_IN_USE`.
      workdir: the run's folder.
      step: which checkpoint; by default the newest that is whole, or "best" for the best one by config.train.best.
      mesh: spreads the weights over a mesh by experiment.rules; by default they go to one device.

    Raises:
      UserError: no checkpoint, another config, other frozen networks, or a checkpoint that is damaged or does not fit the network.
    """
    run_metadata.check_config(workdir, config, in_use=True)
    run_metadata.check_dependencies(workdir, experiment)
    checkpoint, others = choose(workdir, step, *best_metric(experiment, config.train.best))
    ema = averages_of(experiment, mesh)
    checkpoint_files.check_fit(checkpoint, ema=ema)
    return restore_averages(checkpoint, ema, others), int(checkpoint.name)


def choose(
    workdir: str | os.PathLike, step: int | str | None = None, metric: str = "", mode: str = "min",
) -> tuple[pathlib.Path, list[int]]:
    """-> (a checkpoint of `step`, "best" by the "min" or "max" of `metric`, or the newest, whose averages are whole; the others' steps)."""
    folder = run_metadata.checkpoint_folder(workdir)
    intact, damages = checkpoint_files.intact(folder)
    newest = step is None
    if newest:
        while intact and (problem := damage_of_averages(folder / str(intact[-1]))):
            damages[intact.pop()] = problem
    for damaged, problem in damages.items():
        log.warning("checkpoint %s is damaged (%s): it is not opened.", folder / str(damaged), problem)
    if not intact:
        whole = " that is whole" if damages else ""
        raise UserError(f"there is no checkpoint in {workdir}{whole}: train first, or name the workdir of a run.")
    if step == "best":
        if not metric:
            raise UserError(f"config.train.best of the run in {workdir} names no metric, so no checkpoint is its best: name a step.")
        metric = next(iter(former_names.metrics({metric: None})))
        metas = {step: checkpoint_files.meta_of(folder / str(step)) for step in intact}
        values = {step: former_names.metrics(meta["metrics"]).get(metric, math.nan) for step, meta in metas.items()}
        values = {step: value for step, value in values.items() if math.isfinite(value)}
        if not values:
            raise UserError(f"no checkpoint in {workdir} records the metric {metric!r} (config.train.best).")
        step = (min if mode == "min" else max)(values, key=values.get)
    step = intact[-1] if newest else step
    there = ", ".join(str(other) for other in intact if other != step) or "none"
    if step not in [*intact, *damages]:
        raise UserError(f"there is no checkpoint of step {step} in {workdir}: there are {there}.")
    if problem := damages.get(step) or (None if newest else damage_of_averages(folder / str(step))):
        raise UserError(f"the checkpoint {folder / str(step)} is damaged ({problem}): choose another step (there are {there}).")
    if (folder / str(step) / "meta").exists():  # weights can be used without
        checkpoint_files.check_step(folder / str(step), checkpoint_files.meta_of(folder / str(step)).get("step"))
    return folder / str(step), [other for other in intact if other != step]


def averages_of(experiment: Any, mesh: Mesh | None) -> Any:
    """The averaged weights of an experiment, abstract: on one device, or spread over a mesh by experiment.rules."""
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))
    if mesh is None:
        # A committed device would forbid use with arrays elsewhere, but one process has one default device.
        target = jax.tree.map(lambda x: SingleDeviceSharding(jax.local_devices()[0]), shapes)
    else:
        target = sharding.shardings(shapes, experiment.rules, mesh)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=where), shapes, target)


def restore_averages(checkpoint: pathlib.Path, like: Any, others: list[int]) -> Any:
    """The averaged weights of a checkpoint, onto the shapes and shardings of these abstract ones, which must be its own.

    Raises:
      UserError: they cannot be read, or are not finite; it names the `others` of the run.
    """
    with checkpoint_files.unreadable(checkpoint), ocp.StandardCheckpointer() as reader:
        params = reader.restore(checkpoint / "ema", like)
    _check_finite(params, checkpoint.parents[1], int(checkpoint.name), others)
    return params


def _check_finite(params: Any, workdir: str | os.PathLike, step: int, others: list[int]) -> None:
    """Raises UserError if weights are not finite: all that is made of them would be NaN, or a class that NaN is taken for."""
    finite = jax.device_get(jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(params))
    leaves = jax.tree_util.tree_leaves_with_path(finite)
    wrong = [jax.tree_util.keystr(path, simple=True, separator="/") for path, good in leaves if not good]
    if wrong:
        remedy = f"name another (--step {others[-1]})" if others else "train again with a smaller learning rate"
        raise UserError(
            f"the averaged weights of step {step} in {workdir} are not finite in {len(wrong)} arrays, such as {wrong[0]}: {remedy}.")


def damage_of_averages(checkpoint: pathlib.Path) -> str | None:
    """What is wrong with what inference opens; the same in every process that opens it."""
    return distributed.first_of_all(integrity.damage(checkpoint, lambda name: name.startswith("ema/")))
