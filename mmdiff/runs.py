"""A run, opened: its config, its experiment and the weights of one of its checkpoints, to sample and measure with.

    run = open_run("digits_joint", "runs/digits_joint")
    samples = run.sample(16, given={"label": "7"})  # {"image": [16, 8, 8, 1], "label": [16]}
    metrics = run.evaluate()                        # report.json and report.html in the workdir

The commands `sample`, `eval` and `cache`, notebooks and programs open runs here and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import numbers
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import ml_collections

from mmdiff import checks, files, former_names, remote, suggest
from mmdiff import config as configs
from mmdiff.errors import UserError

if TYPE_CHECKING:  # jax is imported when a run is opened, after its config has been checked
    import numpy as np

    from mmdiff.experiment import Experiment

LARGEST_BATCH = 256  # samples of one call of the network
LARGEST_GRID = 400  # images
IN_USE = (  # the keys and sections of a config that may be set when a run is opened
    "sample", "eval", "seed", "data.dir", "data.towers", "encoder.path", "encoder.codes", "text_encoder.path",
    "text_encoder.tokenizer", "text_encoder.reduce", "tokenizer.path", "vector_encoder.path",
    "feature_encoder.path", "train.mesh")


def open_run(
    config: str | os.PathLike, workdir: str | os.PathLike, overrides: Mapping[str, Any] | Sequence[tuple[str, str]] = (), *,
    step: int | str | None = None,
) -> Run:
    """Opens a run; its weights are read when they are first needed. Nothing of the run is changed.

    >>> run = open_run("digits_joint", "runs/digits", {"sample.guidance": 1.3})  # doctest: +SKIP
    >>> run.sample(4, given={"label": "7"})["image"].shape  # doctest: +SKIP
    (4, 8, 8, 1)

    Args:
      config: a shipped config by name, or the path of a file.
      workdir: the folder of the run, or its address, of which a copy is opened. The values of the config are those that it has stored,
        under their names of today.
      overrides: dotted keys and values, of `IN_USE` alone: they do not change what the weights mean.
      step: which checkpoint: a step, "best" (by config.train.best), or None for the newest that is whole.

    Raises:
      UserError: no such config or run, a key that cannot be set here, or a config that cannot be built.
    """
    if step not in (None, "best") and not checks.is_whole(step, 0):
        raise UserError(f"step is the number of a checkpoint or 'best', not {checks.short(step)}.")
    items = overrides.items() if isinstance(overrides, Mapping) else overrides
    overrides = [(key, value if isinstance(value, str) else str(value)) for key, value in items]
    values, module = configs.load(os.fspath(config), overrides)
    source = workdir
    if remote.is_remote(workdir) and "config.json" in files.names(files.target(workdir)):  # nothing else is copied
        workdir = files.expand(workdir, without=files.ASIDE)
    if not os.path.isdir(workdir):
        command = f"mmdiff train --config {config} --workdir {workdir}"
        raise UserError(f"there is no run in {workdir}: train it first, with {command}.")
    from mmdiff.training import run_metadata

    _take_stored(values, overrides, workdir)
    run_metadata.check_config(workdir, values, in_use=True)  # before a build that may fail for a value of another config
    with configs.blaming(values, module, overrides):
        built = configs.build(values, module)
        experiment = run_metadata.with_class_names(built, workdir)
    return Run(os.fspath(config), values, experiment, pathlib.Path(workdir), module, tuple(overrides), step, built.modalities, source)


def _take_stored(config: ml_collections.ConfigDict, overrides: Sequence[tuple[str, str]], workdir: str | os.PathLike) -> None:
    """Gives a config the values of the run, but for the overrides. Raises UserError if these or the stored ones are impossible."""
    from mmdiff.training import run_metadata

    here = configs.flatten(config)
    asked = {key: here[key] for key, _ in overrides}
    stored = former_names.keys(configs.flatten(run_metadata.read_config(workdir)), here)
    for key, (old, new) in configs.difference({key: stored.get(key) for key in asked} if stored else asked, asked).items():
        if not any(key == name or key.startswith(f"{name}.") for name in IN_USE):
            free = ", ".join(f"config.{name}" for name in IN_USE)
            raise UserError(f"config.{key} is {old!r} in the run in {workdir}, not {new!r}: only {free} can be set here.")
    for key, value in stored.items():
        old = here.get(key)
        if (key == "seed" or key.startswith("sample.")) and old is not None and not configs.is_like(value, old):
            there = f"{workdir}/config.json"
            raise UserError(f"config.{key} is {checks.short(value)} in {there}, where {old!r} was possible: restore that file.")
    configs.put(config, stored)
    configs.put(config, asked)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is open; made by `open_run`.

    Attributes:
      name: the config, as it was asked for.
      config: all its values.
      experiment: what the config builds; its classes have the names that the run's data gave them.
      workdir: its folder.
      params, step: the averaged (EMA) weights of the checkpoint, and its step.
    """

    name: str
    config: ml_collections.ConfigDict
    experiment: Experiment
    workdir: pathlib.Path
    _module: ModuleType
    _overrides: tuple[tuple[str, str], ...]
    _asked: int | str | None
    _modalities: Mapping[str, Any]  # as the config builds them
    _source: str | os.PathLike  # the folder, or its address

    @functools.cached_property
    def _weights(self) -> tuple[Any, int]:
        from mmdiff.training import averaged_weights

        return averaged_weights.restore_for_inference(self.experiment, self.config, self.workdir, step=self._asked, mesh=self._mesh)

    @functools.cached_property
    def _mesh(self) -> Any:
        """The mesh that the weights are spread over, if overrides of config.train.mesh ask for one; else each device holds all of them.

        Raises:
          UserError: a mesh that does not fit the devices, or several processes.
        """
        if not any(key.startswith("train.mesh.") for key, _ in self._overrides):
            return None
        import jax

        from mmdiff.training import sharding

        if jax.process_count() > 1:
            raise UserError("weights are spread over the devices of one process only: leave --config.train.mesh or --distributed out.")
        mesh = sharding.make_mesh(dict(self.config.train.mesh))
        return mesh if mesh.size > 1 else None

    def _compiling(self) -> contextlib.AbstractContextManager[None]:
        """A context: networks that are traced inside are for the mesh, or for each device on its own."""
        import jax

        from mmdiff.nets.target import compiling_for
        from mmdiff.training import sharding

        return compiling_for(jax.default_backend()) if self._mesh is None else sharding.compiling_for_mesh(self._mesh)

    @property
    def params(self) -> Any:
        return self._weights[0]

    @property
    def step(self) -> int:
        return self._weights[1]

    def ema(self, width: float, at: int | None = None) -> Run:
        """This run with an average of another width (see `training.power_ema`), at step `at` of its snapshots, by default the last."""
        from mmdiff.training import post_hoc_ema

        post_hoc_ema.fetch(self._source)
        config = ml_collections.ConfigDict({**self.config.to_dict(), "train": {**self.config.train.to_dict(), "ema": f"width {width:g}"}})
        run = dataclasses.replace(self, config=config)  # whose reports say so
        run.__dict__["_weights"] = post_hoc_ema.restore(self.experiment, self.config, self.workdir, width, at, self._mesh)
        return run

    def sample(
        self, number: int | None = None, *, given: Mapping[str, Any] | None = None, absent: Sequence[str] = (),
        steps: int | None = None, guidance: float | None = None, seed: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Samples of all modalities that are not absent, {name: [number, ...]}; pixels have values that are possible in the data.

        Sample i depends on the seed and on i only, not on `number`. Samples of an earlier call can be given to the next.

        Args:
          number: how many; by default as many as are given, or 16.
          given: held at t = 0. Text is what a person writes, "7" or "seven.png"; an array [n, ...] is the values, one for each sample,
            or a single one [1, ...] for all.
          absent: held at t = 1: they say nothing about the others, and are not in the answer.
          steps, guidance, seed: by default config.sample.steps, config.sample.guidance and config.seed.

        Raises:
          UserError: an unknown modality, one that is set twice, values that do not fit, or nothing left to sample.
        """
        given, number = self.parse(number, given, absent)
        size = -(-number // -(-number // LARGEST_BATCH))  # equal batches
        from mmdiff import console
        from mmdiff.evals import streaming

        found = self.stream(number, given=given, absent=absent, steps=steps, guidance=guidance, seed=seed, batch=size)
        turns = console.progress(range(streaming.count_of(number, size)), "batch")
        parts = [samples for _, (_, samples) in zip(turns, found)]
        return {name: streaming.joined([part[name] for part in parts]) for name in parts[0]}

    def stream(
        self, number: int, *, given: Mapping[str, Any] | None = None, absent: Sequence[str] = (), steps: int | None = None,
        guidance: float | None = None, seed: int | None = None, batch: int = LARGEST_BATCH, only: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The samples of `sample` -> (k, those of batch k) of one batch after another, on all devices of this process, in bounded memory.

        Batch k holds the samples k batch .. (k + 1) batch - 1, the last one fewer. The bits of sample i depend on the seed, i and `batch`
        (where they stand in a matrix product), and neither on the number of devices nor on that of processes.

        Args:
          number, given, absent, steps, guidance, seed: as in `sample`.
          batch: samples that a device computes at once.
          only: these batches; all by default.

        Raises:
          UserError: as `sample`.
        """
        given, number = self.parse(number, given, absent)
        steps, guidance, seed = self.settings(steps, guidance, seed)
        from mmdiff.evals import streaming
        from mmdiff.evals.evaluator import finite
        from mmdiff.keys import key_of_use

        absent = tuple(sorted(set(absent)))

        def sample(params, keys, given):
            with self._compiling():
                return self.experiment.sample(params, keys, given, absent=absent, steps=steps, guidance=guidance)

        for k, samples in streaming.stream(sample, self.params, key_of_use(seed, "sample"), given, number, batch, blocks=only):
            samples = {name: finite(name, array, k * batch) for name, array in samples.items()}
            yield k, self._quantized({name: array for name, array in samples.items() if name not in absent})

    def settings(self, steps: int | None = None, guidance: float | None = None, seed: int | None = None) -> tuple[int, float, int]:
        """(steps, guidance, seed) of the sampler; those that are None are the config's."""
        sampler = self.config.get("sample", {})
        steps = sampler.get("steps") if steps is None else steps
        if steps is None:
            raise UserError(f"{self.name} has no config.sample.steps: name --steps.")
        guidance = sampler.get("guidance", 1.0) if guidance is None else guidance
        if not isinstance(guidance, numbers.Real):
            raise UserError(f"the weight of guidance must be a number, not {checks.short(guidance)}.")
        return steps, float(guidance), self.config.seed if seed is None else seed

    def parse(
        self, number: int | None, given: Mapping[str, Any] | None, absent: Sequence[str] = (), lazily: bool = False,
    ) -> tuple[dict[str, np.ndarray], int]:
        """-> ({name: [number, ...]}, number) of what `sample` takes. One value is repeated; several (7,7,3 or a file) set the number.

        Sentences of a file that are encoded are `Sentences` if `lazily`, for `stream`: all of them may need more memory than there is.
        """
        import numpy as np

        from mmdiff.data import Sentences

        given, modalities, shape = dict(given or {}), self.experiment.modalities, self.experiment.shape
        for flag, name in [("--given", name) for name in given] + [("--absent", name) for name in absent]:
            if name not in shape:
                near = suggest.word(name, shape)
                meant = f", did you mean {near!r}?" if near else "."
                raise UserError(f"{flag} names an unknown modality {checks.short(name)}: this model has {', '.join(shape)}{meant}")
        for name, value in given.items():
            if isinstance(value, str) and not value.strip():
                raise UserError(f"--given {name} has no value: write --given {name}=VALUE, or leave it out by --absent {name}.")
            if name in absent:
                raise UserError(f"the modality {name} is set twice: use one --given or one --absent for it.")
        if set(shape) <= {*given, *absent}:
            raise UserError("no modality is left to sample: leave out one --given or --absent.")
        if number is not None and not checks.is_whole(number, 1):
            raise UserError(f"the number of samples must be an integer of 1 or more, not {checks.short(number)}.")

        def parsed_of(name, value):
            if isinstance(value, (str, os.PathLike)):
                read = getattr(modalities[name], "lazily", modalities[name].parse) if lazily else modalities[name].parse
                return read(os.fspath(value))
            if isinstance(value, Sentences):
                return value if len(value) > 1 else value[[0]]
            try:
                array = np.asarray(value)
            except ValueError:  # rows of different lengths
                array = np.empty((), object)
            if array.dtype.kind not in "biufV":
                raise UserError(f"{name} is given as {checks.short(value)}: give text, a file, or an array of numbers.")
            return modalities[name].check(array)

        parsed = {name: parsed_of(name, value) for name, value in given.items()}
        counts = {name: len(array) for name, array in parsed.items() if len(array) > 1}
        number = number or max(counts.values(), default=16)
        for name, count in counts.items():
            if count != number:
                raise UserError(f"--given {name} holds {count} examples, not {number}: leave --number out or use {count}.")
        return {
            name: array if isinstance(array, Sentences) else np.broadcast_to(array, (number, *array.shape[1:]))
            for name, array in parsed.items()}, number

    def _quantized(self, samples: Mapping[str, Any]) -> dict[str, np.ndarray]:
        import numpy as np

        return {name: getattr(self.experiment.modalities[name], "quantize", np.asarray)(array) for name, array in samples.items()}

    def show(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """Samples as a person sees them: {name: images [n, H, W, C] or texts}, without vectors, which are neither."""
        shown = {name: self.experiment.modalities[name].show(array) for name, array in samples.items()}
        return {name: value for name, value in shown.items() if value is not None}

    def write(self, samples: Mapping[str, np.ndarray], folder: str | os.PathLike) -> list[pathlib.Path]:
        """Writes samples.npz, a grid of the images (the first LARGEST_GRID), captioned with what is text, and sounds; -> the files.

        Raises:
          UserError: the folder cannot be written.
        """
        import numpy as np

        from mmdiff.evals.plots import grid

        shown, target, modalities = self.show(samples), files.target(folder), self.experiment.modalities
        stored = {name: getattr(modalities[name], "export", np.asarray)(array) for name, array in samples.items()}  # as --given reads them
        images = {name: value for name, value in shown.items() if isinstance(value, np.ndarray)}
        captions = [" ".join(map(str, row)) for row in zip(*(value for name, value in shown.items() if name not in images))]
        paths = [target / "samples.npz"]
        try:
            with files.folder_to_fill(target) as folder:
                np.savez(folder / "samples.npz", **stored)
                for name, array in images.items():
                    paths.append(target / ("samples.png" if len(images) == 1 else f"samples_{name}.png"))
                    seen = array[:LARGEST_GRID]
                    grid(seen, math.isqrt(len(seen) - 1) + 1, captions[:LARGEST_GRID] or None).save(folder / paths[-1].name)
                for name, array in samples.items():
                    if hasattr(modalities[name], "write"):
                        paths += [target / path.name for path in modalities[name].write(array, folder)]
        except OSError as error:
            raise UserError(f"cannot write {paths[-1]}: {error.strerror or error}.") from error
        return paths

    def evaluate(self, split: str = "test", *, reuse: bool = False) -> dict[str, Any]:
        """Runs the evaluators, writes the report (`report_paths`), and returns the values of its JSON file: metrics, notes, settings.

        All processes of a run call it together; process 0 writes.

        Whatever is chosen by these metrics is chosen on `split` "validation"; what is reported is measured on "test".

        Args:
          split: what to measure on.
          reuse: return the report that is there if it is of this checkpoint and config.

        Raises:
          UserError: the config measures nothing, or labels mean other classes than in training.
        """
        if split not in ("test", "validation"):
            raise UserError(f"split is 'test' or 'validation', not {checks.short(split)}.")
        check_measured(self.name, self.experiment)
        from mmdiff.evals import report
        from mmdiff.keys import key_of_use
        from mmdiff.training import checkpoint_files, distributed, run_metadata

        experiment = self.experiment.on_validation() if split == "validation" else self.experiment
        with configs.blaming(self.config, self._module, self._overrides):
            run_metadata.check_classes(self.workdir, dataclasses.replace(experiment, modalities=self._modalities))
        params, step = self._weights
        json_path, html_path = self.report_paths(split)
        if not distributed.from_first(lambda: reuse and report.is_of(json_path, step, self.config) and html_path.exists()):
            key = key_of_use(self.config.seed, "eval")
            with self._compiling():
                results = [evaluate(experiment, params, self.config, key, step) for evaluate in experiment.evaluators]
            meta = checkpoint_files.read_meta(self.workdir, step)  # of the checkpoint itself: run.json is only written when a run ends
            cost = {**checkpoint_files.cost(meta), "steps": step} if meta.get("train_seconds") else None  # 0 of converted weights
            distributed.from_first(lambda: bool(report.write(self.workdir, experiment, self.config, results, step, cost)))
        return former_names.metrics(json.loads(distributed.from_first(json_path.read_text)))

    def report_paths(self, split: str = "test") -> tuple[pathlib.Path, pathlib.Path]:
        """Where `evaluate` writes: report.json and report.html in the workdir, for validation report-validation.json and .html."""
        from mmdiff.evals import report

        return report.paths(self.workdir, split)

    def cache(self, folder: str | os.PathLike, splits: Sequence[str] = ()) -> bool:
        """Encodes the data of a tokenizer's run, or keeps the weights of towers, in a folder or at its address; false if all is there.

        Raises:
          UserError: the run is of no tokenizer, an unknown split, or a folder that holds something else or cannot be written.
        """
        from mmdiff.data.network_cache import CacheWriter
        from mmdiff.training import remote_runs

        if (writer := self.experiment.cache) is None:
            raise UserError(f"{self.name} trains no tokenizer and no towers, so there is nothing to cache: see cdcd/scenes_tokenizer.")
        if not isinstance(writer, CacheWriter):
            raise UserError(f"the data of {self.name} are encoded by published networks, and not by those of a run: leave --workdir out.")
        with remote_runs.filled_at(folder, writer.kind.meta) as here:
            return writer.write(here, self.params, {"config": json.loads(configs.to_json(self.config)), "step": self.step}, splits)


def check_measured(name: str, experiment: Experiment) -> None:
    """Raises UserError if a config has nothing to evaluate."""
    if not experiment.evaluators:
        raise UserError(
            f"{name} measures nothing as it is set: see its head, give its Experiment evaluators, or measure a set of its samples "
            "(mmdiff eval --samples).")
