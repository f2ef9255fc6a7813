"""Checkpoints: the whole state of a run, written in the background, whole or not at all.

    WORKDIR/checkpoints/STEP/state      params, optimizer, key, counters, running sums of the metrics
    WORKDIR/checkpoints/STEP/ema        the averaged weights, on their own: all that inference opens
    WORKDIR/checkpoints/STEP/meta       JSON: step, position, train_seconds, metrics
    WORKDIR/checkpoints/STEP/manifest.json   size and checksum of every file: a damaged checkpoint is known before it is opened
    WORKDIR/damaged/STEP                checkpoints that were found damaged

WORKDIR is a folder that every process sees (a local disk for one machine, a network file system or a mounted bucket for more).
Orbax writes to a temporary folder and renames it once everything is there, so a crash leaves no half checkpoint; checksums guard
against what happens to files later.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mmdiff import former_names
from mmdiff.errors import UserError
from mmdiff.training import checkpoint_files, distributed, integrity, run_metadata
from mmdiff.training.step import State

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training run; a context manager. Every process makes one and calls the same methods.

    Args:
      workdir: the run's folder. Checkpoints in it that are damaged are moved aside, with a warning.
      keep: how many of the latest checkpoints are kept.
      best: the name of a metric; the checkpoint with its smallest value is kept as well ("": none), or with its largest if `mode` is "max".
      name: tells them from others that the same processes write at the same time.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int, best: str = "", mode: str = "min", name: str = ""):
        self.folder = run_metadata.checkpoint_folder(workdir)
        self._saving: int | None = None

        def open_folder() -> list[int]:
            with run_metadata.writing(workdir):
                self.folder.mkdir(parents=True, exist_ok=True)
                _set_aside(self.folder, checkpoint_files.intact(self.folder)[1])
            return run_metadata.steps(self.folder)

        steps = distributed.from_first(open_folder)
        # The newest is read whole before a value of it is used: each process reads its share, and all decide alike.
        while steps and (problem := distributed.first_of_all(_damage_in_part(self.folder / str(steps[-1])))):

            def give_up(newest=steps.pop(), problem=problem) -> None:
                with run_metadata.writing(workdir):
                    _set_aside(self.folder, {newest: problem})

            distributed.from_first(give_up)

        def value(metrics):
            found = former_names.metrics(metrics, known=[best]).get(best, math.nan)
            return found if math.isfinite(found) else math.inf if mode == "min" else -math.inf

        policies = [checkpoint_managers.LatestN(keep)]
        if best:
            policies += [
                checkpoint_managers.BestN(
                    get_metric_fn=value, reverse=mode == "min", n=1, keep_checkpoints_without_metrics=False
                )
            ]
        # Orbax logs the traceback of each of its threads that fails; the same error reaches us through wait().
        logging.getLogger("absl").addFilter(_without_orbax_errors)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=value if best else None,
                best_mode=mode,
                cleanup_tmp_directories=True,
                multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name or None),
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if distributed.lost(error):
            return  # a save in the background waits for a process that is gone
        try:
            self.wait()
        except UserError:
            if error is None:
                raise  # else the first error is the one to show
        finally:
            self._manager.close()
            if jax.process_index() == 0:
                _remove_drafts(self.folder)
                with contextlib.suppress(OSError):
                    self.folder.rmdir()  # of a run that could not begin: it has nothing in it

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: State, averages: Any, meta: Mapping[str, Any]) -> None:
        """Copies the state to the host and writes it in the background; first waits for the checkpoint before it.

        Args:
          state: what is saved, under the number of its step.
          averages: the running means of the metrics, by name.
          meta: JSON values; meta["metrics"] is what `best` looks at.

        Raises:
          UserError: this checkpoint or the one before it could not be written (the disk is full, ...).
        """
        self.wait()
        if not self.folder.is_dir():  # Orbax would make another one
            raise UserError(
                f"{self.folder} was moved or removed while the run trains: put it back, or name its new place, and run the command again.")
        tree, ema = _pack(state)
        state_item = ocp.args.StandardSave({"state": tree, "averages": averages})
        self._save(int(state.step), meta, state=state_item, ema=ocp.args.StandardSave(ema))

    def save_averages(self, ema: Any, meta: Mapping[str, Any], step: int = 0) -> None:
        """As `save`, of averaged weights alone: a run to sample from, to measure and to start others from, but not to continue."""
        self._save(step, meta, ema=ocp.args.StandardSave(ema))

    def _save(self, step: int, meta: Mapping[str, Any], **items: Any) -> None:
        with self._errors(step):
            self._saving = step
            args = ocp.args.Composite(**items, meta=ocp.args.JsonSave({**meta, "step": step}))
            self._manager.save(step, args=args, metrics=dict(meta["metrics"]) or None, force=True)

    def restore(self, state: State, averages: Mapping[str, Any]) -> tuple[State, dict[str, Any], dict[str, Any]]:
        """-> (state, averages, meta) of the newest checkpoint, onto the shapes and shardings of these abstract ones.

        How many devices wrote it does not matter: each device reads its own part. Averages may have former names there.

        Raises:
          UserError: it cannot be read, does not fit, or is of another step than its folder says.
        """
        step = self.latest()
        if not (self.folder / str(step) / "state").is_dir():
            raise UserError(
                f"{self.folder / str(step)} holds weights alone, of a conversion: train in another workdir, with "
                f"--config.train.start={self.folder.parent}.")
        tree, ema = _pack(state)
        stored = checkpoint_files.saved_arrays(self.folder / str(step), "state").get("averages", ())
        former = former_names.metrics({name: name for name in stored}, known=averages)
        tree = {"state": tree, "averages": {former.get(name, name): like for name, like in averages.items()}}
        checkpoint_files.check_fit(self.folder / str(step), state=tree, ema=ema)
        with checkpoint_files.unreadable(self.folder / str(step)):
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(tree),
                    ema=ocp.args.StandardRestore(ema),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        checkpoint_files.check_step(self.folder / str(step), int(found.state["state"]["step"]))
        averages = {name: found.state["averages"][former.get(name, name)] for name in averages}
        return _unpack(found.state["state"], found.ema), averages, found.meta

    def check(self) -> None:
        """Raises UserError if a save in the background has failed; does not wait for one in progress."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises UserError if it could not be written."""
        with self._errors(self._saving):
            self._manager.wait_until_finished()

    def _write_manifest(self) -> None:
        # Orbax calls this on process 0 when every process has written its part, just before the rename that makes it count.
        integrity.write_manifest(next(self.folder.glob(f"{self._saving}.*tmp*"), self.folder / str(self._saving)))

    @contextlib.contextmanager
    def _errors(self, step: int | None):
        try:
            yield
        except Exception as error:
            reason = _os_reason(error)
            if reason is None:
                raise
            good = max(checkpoint_files.intact(self.folder)[0], default=None)
            last = "there is no earlier one" if good is None else f"the last good one is of step {good}"
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({reason}): {last}; "
                "fix this and run the same command again."
            ) from error


def _damage_in_part(checkpoint: pathlib.Path) -> str | None:
    return integrity.damage(checkpoint, lambda name: True, jax.process_index(), jax.process_count())


def _remove_drafts(folder: pathlib.Path) -> None:
    """Of a save that failed: a full disk has no room for them. Some of its threads may still write, so for a while it tries again."""
    for _ in range(50):
        drafts = list(folder.glob("*.*tmp*"))
        if not drafts:
            return
        for draft in drafts:
            shutil.rmtree(draft, ignore_errors=True)
        time.sleep(0.1)


def _set_aside(folder: pathlib.Path, damages: Mapping[int, str]) -> None:
    """Moves damaged checkpoints out of the way, and says so."""
    for step, problem in damages.items():
        before = max((s for s in run_metadata.steps(folder) if s < step and s not in damages), default=None)
        instead = "there is none before it" if before is None else f"continuing from {folder / str(before)}"
        aside = folder.parent / "damaged" / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (folder / str(step)).rename(aside)
        log.warning(
            "checkpoint %s is damaged (%s): it is not opened but moved to %s; %s.", folder / str(step), problem, aside, instead
        )


def _pack(state: State) -> tuple[dict[str, Any], Any]:
    """A state, real or abstract, as (everything but the average, the average), with the key as plain integers."""
    key = state.key
    if isinstance(key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, key)
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)
    else:
        data = jax.random.key_data(key)
    return {"step": state.step, "params": state.params, "opt": state.opt, "key": data, "stats": state.stats}, state.ema


def _unpack(tree: Mapping[str, Any], ema: Any) -> State:
    return State(**{**tree, "key": jax.random.wrap_key_data(tree["key"])}, ema=ema)


def _os_reason(error: BaseException | None) -> str | None:
    """What the operating system said, if that is what `error` is about; tensorstore puts it in the text of a ValueError."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            return os.strerror(int(code[1]))
        error = error.__cause__ or error.__context__
    return None


def _without_orbax_errors(record: logging.LogRecord) -> bool:
    unmeasured = "tracked_metric" in str(record.msg)  # a checkpoint at a step where `best` is not measured is none of its mistakes
    return not ("orbax" in record.pathname and (record.levelno >= logging.ERROR or unmeasured))
