"""Snapshots of the averages that a run tracks, and the average of any width that they make after training (see `power_ema`).

    WORKDIR/snapshots/checkpoints/STEP/ema      {width: averaged weights}, float32
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from mmdiff import files, remote
from mmdiff.checks import short
from mmdiff.errors import UserError
from mmdiff.training import averaged_weights, checkpoint_files, distributed, power_ema, run_metadata
from mmdiff.training.checkpoints import Checkpoints
from mmdiff.training.step import State

log = logging.getLogger(__name__)


class Snapshots:
    """The snapshots of a run as it trains; a context manager. Those after step `start` are removed: they come again."""

    def __init__(self, workdir: str | os.PathLike, config: ml_collections.ConfigDict, start: int):
        train, self._stack, self._kept, self._known = config.train, contextlib.ExitStack(), None, start
        self._every, self._last = train.get("ema_every", 0) or train.checkpoint_every, train.steps
        if not train.get("ema_widths", ()):
            return
        folder = pathlib.Path(workdir) / run_metadata.SNAPSHOTS
        there = run_metadata.checkpoint_folder(folder)

        def tidy() -> None:
            for step in run_metadata.steps(there):
                if step > start:
                    shutil.rmtree(there / str(step))

        distributed.from_first(tidy)
        self._kept = self._stack.enter_context(Checkpoints(folder, keep=10**9, name=run_metadata.SNAPSHOTS))
        if start and not distributed.from_first(lambda: start in run_metadata.steps(there)):
            self._known = start - 1  # it was killed between its checkpoint and this

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def due(self, step: int) -> bool:
        """Whether one is taken after this step, of which there is none."""
        return self._kept is not None and step > self._known and (step % self._every == 0 or step == self._last)

    def save(self, state: State) -> None:
        """Writes the averages of a state, in the background."""
        self._kept.wait()
        taken = int(state.step) - int(state.stats["skipped"])
        self._kept.save_averages(state.stats["averages"], {"metrics": {}, "taken": taken}, int(state.step))


def fetch(source: str | os.PathLike) -> None:
    """Brings the snapshots of a run at an address up to date in its copy, which is opened without them; nothing of one on this machine."""
    if remote.is_remote(source):
        with contextlib.suppress(files.Missing):
            files.expand(f"{str(source).rstrip('/')}/{run_metadata.SNAPSHOTS}")


def restore(
    experiment: Any, config: ml_collections.ConfigDict, workdir: str | os.PathLike, width: float, at: int | None, mesh: Mesh | None
) -> tuple[Any, int]:
    """-> (the average of a width, its step) from a run's snapshots up to step `at`, by default all. One snapshot is held at a time.

    Raises:
      UserError: a width that is none, no snapshots, none of this step or before a step was taken, one that is damaged, other frozen
        networks.
    """
    power_ema.exponent(width)
    run_metadata.check_dependencies(workdir, experiment)
    folder = run_metadata.checkpoint_folder(pathlib.Path(workdir) / run_metadata.SNAPSHOTS)
    steps, damages = checkpoint_files.intact(folder)
    for damaged, problem in damages.items():
        log.warning("snapshot %s is damaged (%s): it is left out.", folder / str(damaged), problem)
    if not steps:
        raise UserError(f"{workdir} has no snapshots of averages: train with --config.train.ema_widths='(0.05, 0.1)'.")
    at = steps[-1] if at is None else at
    if at not in steps:
        there = ", ".join(map(str, steps[-5:]))
        raise UserError(f"{workdir} has no {'whole ' if at in damages else ''}snapshot of step {short(at)}: the last are of {there}.")
    # By the number of steps taken: those between two of the same number were skipped, and changed nothing.
    found = {checkpoint_files.meta_of(folder / str(step))["taken"]: step for step in steps if step <= at}
    found.pop(0, None)
    if not found:
        raise UserError(f"{workdir} has taken no step up to {at}, all were skipped: there is nothing to average.")
    taken, steps = list(found), list(found.values())
    widths = sorted(checkpoint_files.saved_arrays(folder / str(at), "ema"))
    shares = power_ema.combination(np.repeat(taken, len(widths)), [float(each) for each in widths] * len(taken), width, taken[-1])
    shares = shares.reshape(len(taken), len(widths))
    like = averaged_weights.averages_of(experiment, mesh)
    like = {each: like for each in widths}
    add = jax.jit(lambda total, averages, by: jax.tree.map(
        lambda total, *each: total + sum(share * x for share, x in zip(by, each)), total, *(averages[name] for name in widths)))
    total = None
    for step, by in zip(steps, shares):
        if problem := averaged_weights.damage_of_averages(folder / str(step)):
            raise UserError(f"the snapshot {folder / str(step)} is damaged ({problem}): move it away, and others take its place.")
        checkpoint_files.check_fit(folder / str(step), ema=like)
        with checkpoint_files.unreadable(folder / str(step)), ocp.StandardCheckpointer() as reader:
            averages = reader.restore(folder / str(step) / "ema", like)
        total = jax.tree.map(jnp.zeros_like, averages[widths[0]]) if total is None else total
        total = add(total, averages, jnp.asarray(by, jnp.float32))
    return total, int(at)
