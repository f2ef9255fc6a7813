"""Checkpoints: the whole state of a run, written in the background, whole or not at all.

    WORKDIR/config.json                 the run's config
    WORKDIR/beside.json                 fingerprints of the frozen networks that it is trained beside, if there are any
    WORKDIR/checkpoints/STEP/state      params, optimizer, key, counters, running sums of the metrics
    WORKDIR/checkpoints/STEP/ema        the averaged weights, on their own: all that inference opens
    WORKDIR/checkpoints/STEP/meta       JSON: position, train_seconds, metrics
    WORKDIR/checkpoints/STEP/manifest.json   the size of every file, so that a damaged checkpoint is known before it is opened
    WORKDIR/damaged/STEP                checkpoints that were found damaged

WORKDIR is a folder that every process sees (a local disk for one machine, a network file system or a mounted bucket for more).
Orbax writes to a temporary folder and renames it once everything is there, so a crash leaves no half checkpoint; sizes guard
against what happens to files later.
"""

from __future__ import annotations

import contextlib
import json
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
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from mmdiff import config as configs
from mmdiff.errors import UserError
from mmdiff.training import distributed, sharding
from mmdiff.training.step import State

log = logging.getLogger(__name__)

# What may change when a run continues: how long, where and how often, but not what is computed. A section stands for its keys.
# (The mesh and micro-batches change results by rounding only.)
MAY_DIFFER = (
    "train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep", "train.best",
    "train.prefetch", "train.tensorboard", "train.mesh", "train.microbatches", "sample", "eval",
)  # fmt: skip
MAY_DIFFER_IN_USE = (*MAY_DIFFER, "train", "seed")  # when the weights are only used

MANIFEST = "manifest.json"
LATE = "_CHECKPOINT_METADATA"  # Orbax adds the time to this JSON file after the manifest is written


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """The values of WORKDIR/config.json; {} if there is no such file. Raises UserError if it is not JSON."""
    return _read_json(pathlib.Path(workdir) / "config.json")


def check_config(
    workdir: str | os.PathLike, config: ml_collections.ConfigDict, may_differ=MAY_DIFFER
) -> dict[str, tuple[Any, Any]]:
    """-> {key: (there, here)}: what differs from the run in `workdir`, and may.

    Keys in `may_differ` (full keys or sections) may. Without a checkpoint there is nothing to protect: {}.

    Raises:
      UserError: `workdir` holds checkpoints of another config; it names each other key that differs, with both values.
    """
    if not _steps(_folder(workdir)) or not (stored := read_config(workdir)):
        return {}
    differs = configs.difference(stored, json.loads(configs.to_json(config)))
    may = {key for key in differs if any(key == name or key.startswith(f"{name}.") for name in may_differ)}
    if set(differs) - may:
        listed = ", ".join(f"{key} (there {old!r}, here {new!r})" for key, (old, new) in differs.items() if key not in may)
        raise UserError(f"{workdir} holds a run of another config: {listed}; use that config or another workdir.")
    return {key: values for key, values in differs.items() if key in may}


def write_config(workdir: str | os.PathLike, config: ml_collections.ConfigDict) -> None:
    """Writes WORKDIR/config.json, creating the folder. Raises UserError if that is not possible."""
    path = pathlib.Path(workdir) / "config.json"
    with _writing(workdir):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, configs.to_json(config))


def check_beside(workdir: str | os.PathLike, experiment: Any) -> None:
    """Raises UserError if the run in `workdir` was trained beside other frozen networks than those at hand (`Experiment.beside`)."""
    for name, (there, here) in beside_others(workdir, experiment).items():
        raise UserError(
            f"{workdir} was trained beside {name} of fingerprint {there[:12]}, and at hand is {here[:12]}: bring the former back, or train "
            "anew in another workdir.")


def beside_others(workdir: str | os.PathLike, experiment: Any) -> dict[str, tuple[str, str]]:
    """The frozen networks at hand that are not those of the run in `workdir`: name -> fingerprints (there, here)."""
    stored = _beside(workdir) if experiment.beside else {}
    found = {name: (stored[name], fingerprint()) for name, fingerprint in experiment.beside.items() if name in stored}
    return {name: (there, here) for name, (there, here) in found.items() if here and here != there}


def write_beside(workdir: str | os.PathLike, experiment: Any) -> None:
    """Writes WORKDIR/beside.json, where there is something to say. Raises UserError if that is not possible."""
    found = _beside(workdir) | {name: here for name, fingerprint in experiment.beside.items() if (here := fingerprint())}
    path = pathlib.Path(workdir) / "beside.json"
    if found or path.exists():
        with _writing(workdir):
            write_whole(path, json.dumps(found, indent=1) + "\n")


def read_meta(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself: position, train_seconds, metrics, ...; {} if there is none of this step."""
    checkpoint = _folder(workdir) / str(step)
    return _meta(checkpoint) if checkpoint.is_dir() else {}


def cost(meta: Mapping[str, Any]) -> dict[str, float]:
    """`train_seconds` up to a checkpoint, evaluations and saves included, and the `images_per_second` that this makes."""
    return {"train_seconds": meta["train_seconds"], "images_per_second": meta["position"] / meta["train_seconds"]}


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a small file so that it holds either the old text or the new one, whatever happens."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    draft.replace(path)


class Checkpoints:
    """The checkpoints of one training run; a context manager. Every process makes one and calls the same methods.

    Args:
      workdir: the run's folder. Checkpoints in it that are damaged are moved aside, with a warning.
      keep: how many of the latest checkpoints are kept.
      best: the name of a metric; the checkpoint with its smallest value is kept as well ("": none).
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int, best: str = ""):
        self.folder = _folder(workdir)
        self._saving: int | None = None
        if jax.process_index() == 0:
            with _writing(workdir):
                self.folder.mkdir(parents=True, exist_ok=True)
            _set_aside_damaged(self.folder)
        _barrier("mmdiff checkpoints")

        def value(metrics):
            return metrics[best] if math.isfinite(metrics.get(best, math.nan)) else math.inf

        policies = [checkpoint_managers.LatestN(keep)]
        if best:
            policies += [
                checkpoint_managers.BestN(
                    get_metric_fn=value, reverse=True, n=1, keep_checkpoints_without_metrics=False
                )
            ]
        # Orbax logs the traceback of each of its threads that fails; the same error reaches us through wait().
        logging.getLogger("absl").addFilter(_without_orbax_errors)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=value if best else None,
                best_mode="min",
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if distributed.lost(error):
            return  # what goes on in the background waits for a process that is gone
        try:
            self.wait()
        except UserError:
            if error is None:
                raise  # else the first error is the one to show
        finally:
            self._manager.close()
            if jax.process_index() == 0:
                _remove_drafts(self.folder)

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: State, averages: Any, meta: Mapping[str, Any]) -> None:
        """Copies the state to the host and writes it in the background; first waits for the checkpoint before it.

        Args:
          state: what is saved, under the number of its step.
          averages: a pytree of arrays that goes with it.
          meta: JSON values; meta["metrics"] is what `best` looks at.

        Raises:
          UserError: this checkpoint or the one before it could not be written (the disk is full, ...).
        """
        self.wait()
        step = int(state.step)
        tree, ema = _pack(state)
        with self._errors(step):
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave({"state": tree, "averages": averages}),
                    ema=ocp.args.StandardSave(ema),
                    meta=ocp.args.JsonSave(dict(meta)),
                ),
                metrics=dict(meta["metrics"]) or None,
                force=True,
            )

    def restore(self, state: State, averages: Any) -> tuple[State, Any, dict[str, Any]]:
        """-> (state, averages, meta) of the newest checkpoint, onto the shapes and shardings of these abstract ones.

        How many devices wrote it does not matter: each device reads its own part.
        """
        step = self.latest()
        tree, ema = _pack(state)
        tree = {"state": tree, "averages": averages}
        _check_fit(self.folder / str(step), state=tree, ema=ema)
        with _unreadable(self.folder / str(step)):
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(tree),
                    ema=ocp.args.StandardRestore(ema),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        return _unpack(found.state["state"], found.ema), found.state["averages"], found.meta

    def check(self) -> None:
        """Raises UserError if a save in the background has failed; does not wait for one that goes on."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises UserError if it could not be written."""
        with self._errors(self._saving):
            self._manager.wait_until_finished()

    def _write_manifest(self) -> None:
        # Orbax calls this on process 0 when every process has written its part, just before the rename that makes it count.
        folder = next(self.folder.glob(f"{self._saving}.*tmp*"), self.folder / str(self._saving))
        sizes = {}
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # a size says nothing about data that a power cut would lose
            sizes[str(file.relative_to(folder))] = file.stat().st_size
        write_whole(folder / MANIFEST, json.dumps(sizes, indent=1))

    @contextlib.contextmanager
    def _errors(self, step: int | None):
        try:
            yield
        except Exception as error:
            reason = _os_reason(error)
            if reason is None:
                raise
            good = max(_intact(self.folder), default=None)
            last = "there is no earlier one" if good is None else f"the last good one is of step {good}"
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({reason}): {last}; "
                "mend this and run the same command again."
            ) from error


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
      config: compared with the run's, except for the keys in MAY_DIFFER_IN_USE.
      workdir: the run's folder.
      step: which checkpoint; by default the newest that is whole, or "best" for the one with the smallest config.train.best.
      mesh: spreads the weights over a mesh by experiment.rules; by default they go to one device.

    Raises:
      UserError: no checkpoint, another config, other frozen networks beside it, or a checkpoint that does not fit the network.
    """
    check_config(workdir, config, MAY_DIFFER_IN_USE)
    check_beside(workdir, experiment)
    return weights(experiment, workdir, step=step, metric=config.train.best, mesh=mesh)


def weights(
    experiment: Any, workdir: str | os.PathLike, *, step: int | str | None = None, metric: str = "", mesh: Mesh | None = None
) -> tuple[Any, int]:
    """`restore_for_inference` from a run of any config whose network is that of the experiment; `metric` decides which is "best"."""
    folder = _folder(workdir)
    intact = _intact(folder)
    for damaged, problem in _damages(folder).items():
        log.warning("checkpoint %s is damaged (%s): it is not opened.", folder / str(damaged), problem)
    if not intact:
        raise UserError(f"there is no checkpoint in {workdir}: train first, or name the workdir of a run.")
    if step == "best":
        values = {step: _meta(folder / str(step))["metrics"].get(metric, math.nan) for step in intact}
        values = {step: value for step, value in values.items() if math.isfinite(value)}
        if not values:
            raise UserError(f"no checkpoint in {workdir} records the metric {metric!r} (config.train.best).")
        step = min(values, key=values.get)
    step = max(intact) if step is None else step
    if step not in intact:
        raise UserError(f"there is no checkpoint of step {step} in {workdir}: there are {', '.join(map(str, intact))}.")

    shapes = jax.eval_shape(experiment.init, jax.random.key(0))
    if mesh is None:
        # A committed device would forbid use with arrays elsewhere, but one process has one default device.
        target = jax.tree.map(lambda x: SingleDeviceSharding(jax.local_devices()[0]), shapes)
    else:
        target = sharding.shardings(shapes, experiment.rules, mesh)
    ema = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=where), shapes, target)
    _check_fit(folder / str(step), ema=ema)
    with _unreadable(folder / str(step)), ocp.StandardCheckpointer() as reader:
        params = reader.restore(folder / str(step) / "ema", ema)
    _check_finite(params, workdir, step, [other for other in intact if other != step])
    return params, step


def _check_finite(params: Any, workdir: str | os.PathLike, step: int, others: list[int]) -> None:
    """Raises UserError if weights are not finite: all that is made of them would be NaN, or a class that NaN is taken for."""
    finite = jax.device_get(jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(params))
    leaves = jax.tree_util.tree_leaves_with_path(finite)
    wrong = [jax.tree_util.keystr(path, simple=True, separator="/") for path, good in leaves if not good]
    if wrong:
        remedy = f"name another (--step {others[-1]})" if others else "train again with a smaller learning rate"
        raise UserError(
            f"the averaged weights of step {step} in {workdir} are not finite in {len(wrong)} arrays, such as {wrong[0]}: {remedy}.")


def _beside(workdir: str | os.PathLike) -> dict[str, str]:
    """What is noted of a run; a folder without checkpoints holds none, whatever an earlier attempt has left."""
    return _read_json(pathlib.Path(workdir) / "beside.json") if _steps(_folder(workdir)) else {}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore it, or use another workdir.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what a run writes (a {type(found).__name__}): restore it, or use another workdir.")
    return found


def _folder(workdir: str | os.PathLike) -> pathlib.Path:
    if "://" in str(workdir):
        raise UserError(f"the workdir {workdir} is not a folder: mount the bucket (gcsfuse, s3fs) and name the folder.")
    return pathlib.Path(workdir).resolve() / "checkpoints"


def _steps(folder: pathlib.Path) -> list[int]:
    """The steps of all committed checkpoints, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir())


def _damages(folder: pathlib.Path) -> dict[int, str]:
    """What is wrong with each damaged checkpoint, by step."""
    found = {step: _damage(folder / str(step)) for step in _steps(folder)}
    return {step: problem for step, problem in found.items() if problem}


def _intact(folder: pathlib.Path) -> list[int]:
    return [step for step in _steps(folder) if not _damage(folder / str(step))]


def _damage(checkpoint: pathlib.Path) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None if they are all there and whole."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is cut off"
    for name, size in sizes.items():
        try:
            if name == LATE:
                json.loads((checkpoint / name).read_text())
            elif (found := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {found} of its {size} bytes"
        except FileNotFoundError:
            return f"{name} is missing"
        except ValueError:
            return f"{name} is cut off"
    return None


def _remove_drafts(folder: pathlib.Path) -> None:
    """Of a save that failed: a full disk has no room for them. Some of its threads may still write, so for a while it tries again."""
    for _ in range(50):
        drafts = list(folder.glob("*.*tmp*"))
        if not drafts:
            return
        for draft in drafts:
            shutil.rmtree(draft, ignore_errors=True)
        time.sleep(0.1)


def _set_aside_damaged(folder: pathlib.Path) -> None:
    damages = _damages(folder)
    for step, problem in damages.items():
        before = max((s for s in _steps(folder) if s < step and s not in damages), default=None)
        instead = "there is none before it" if before is None else f"continuing from {folder / str(before)}"
        aside = folder.parent / "damaged" / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (folder / str(step)).rename(aside)
        log.warning(
            "checkpoint %s is damaged (%s): it is not opened but moved to %s; %s.", folder / str(step), problem, aside, instead
        )


def _meta(checkpoint: pathlib.Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(checkpoint / "meta")


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


def _check_fit(checkpoint: pathlib.Path, **items: Any) -> None:
    """Raises UserError unless the saved arrays have the names and shapes of these trees."""
    for item, tree in items.items():
        with _unreadable(checkpoint):
            saved = _shapes(ocp.StandardCheckpointHandler().metadata(checkpoint / item).tree)
        wanted = _shapes(tree)
        for name in [*wanted, *saved]:
            there, here = saved.get(name, "absent"), wanted.get(name, "absent")
            if there != here:
                raise UserError(
                    f"the checkpoint {checkpoint} is of another network, optimizer or loss: {item}/{name} is {there} there and "
                    f"{here} here; go back to the code and config that wrote it, or use another workdir."
                )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


@contextlib.contextmanager
def _writing(workdir: str | os.PathLike):
    try:
        yield
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written ({error.strerror or error}): choose another.") from error


@contextlib.contextmanager
def _unreadable(checkpoint: pathlib.Path):
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read ({reason}): if it is corrupt, move it away to go on from the one before."
        ) from error


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
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
