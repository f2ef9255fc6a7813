"""What a run writes about itself while it trains: metrics.jsonl, grids, TensorBoard events, run.json and the progress on stderr."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import logging
import math
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from clu.metrics import Average

from mmdiff import console, files
from mmdiff.errors import UserError
from mmdiff.training import checkpoint_files, run_metadata, weights_and_biases
from mmdiff.training.step import noise_scale_of

log = logging.getLogger(__name__)

TIMING = ("images_per_second", "train_seconds")  # the keys of a metrics line that two equal runs may differ in


class MetricsLogger:
    """Writes metrics.jsonl, TensorBoard events, run.json and the progress on stderr; a context manager.

    Only process 0 writes. On a terminal and in a notebook the progress is a bar; elsewhere it is a line per log step.

    Args:
      workdir: the run's folder.
      options: config.train.
      start: the step that the run continues from: later lines, of a run that went further than its last checkpoint, are dropped.
      seconds: the training time up to there.
    """

    def __init__(self, workdir: str | os.PathLike, options: ml_collections.ConfigDict, start: int, seconds: float):
        self._workdir, self._options, self._start, self._before = pathlib.Path(workdir), options, start, seconds
        self._writes = jax.process_index() == 0
        self._bar = None
        self._events, self._wandb, self._file, self._loss, self._skipped = None, None, None, math.nan, 0
        self._began = self._printed = self._logged = time.perf_counter()
        self._logged_step, self._paused, self._all_paused = start, 0.0, 0.0

    def __enter__(self) -> MetricsLogger:
        if self._writes:
            with self._writing("metrics.jsonl") as path:
                files.write_whole(path, "".join(_lines_until(path, self._start)))
                self._file = path.open("a")
            if self._options.tensorboard:
                self._events = Events(self._workdir, self._start)
            if project := self._options.get("wandb", ""):
                self._wandb = weights_and_biases.WandbRun(self._workdir, project, run_metadata.read_config(self._workdir))
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.close()
        if self._writes:
            with contextlib.suppress(OSError):  # of a full disk, which has been reported
                self._file.close()
            for curves in self._curves:
                curves.close()

    @property
    def _curves(self) -> list[Events | weights_and_biases.WandbRun]:
        return [curves for curves in (self._events, self._wandb) if curves]

    def start_clock(self) -> None:
        """Training time runs from here."""
        self._began = self._printed = self._logged = time.perf_counter()
        if self._writes:
            self._bar = console.Bar(self._options.steps, start=self._start)

    def seconds(self) -> float:
        """Training time so far, that of earlier runs included; compilation is not."""
        return self._before + time.perf_counter() - self._began

    @contextlib.contextmanager
    def pause(self):
        """Time that does not count for images_per_second (it does count as training time)."""
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        self._paused, self._all_paused = self._paused + took, self._all_paused + took

    def pace(self, step: int) -> float:
        """Seconds of a step, on average over those since the start, without pauses; 0 before the first."""
        taken = step - self._start
        return (time.perf_counter() - self._began - self._all_paused) / taken if taken else 0.0

    def finished(self, step: int, sums: Mapping[str, Average]) -> None:
        """The device has finished `step`, with these means so far."""
        logs = step % self._options.log_every == 0 or step == self._options.steps
        if logs and self._writes:
            now = time.perf_counter()
            rate = (step - self._logged_step) * self._options.global_batch / (now - self._logged - self._paused)
            self._logged, self._logged_step, self._paused = now, step, 0.0
            with np.errstate(invalid="ignore"):  # 0 / 0 if every step was skipped
                values = {name: float(mean.compute()) for name, mean in jax.device_get(dict(sums)).items()}
            values["skipped"] = int(values["skipped"])
            if "noise_scale/trace" in values:
                values["noise_scale"] = noise_scale_of(values)  # of the means: a mean of ratios would be biased
            self._loss, self._skipped = values["loss"], values["skipped"]
            self.write(step, {**values, "images_per_second": rate, "train_seconds": self.seconds()})
        if logs or self._bar and self._bar.shown and time.perf_counter() - self._printed > 0.5:
            self._progress(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, on disk when this returns; what is not finite is null."""
        if not self._writes:
            return
        line = {name: value if math.isfinite(value) else None for name, value in sorted(values.items())}
        with self._writing("metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **line}) + "\n")
            self._file.flush()
        for curves in self._curves:
            curves.write(step, values)

    def image(self, step: int, name: str, image: Any) -> None:
        """A Pillow image: WORKDIR/grids/STEP.png, or STEP_NAME.png, on disk when this returns."""
        if not self._writes:
            return
        try:
            folder = self._workdir / "grids"
            folder.mkdir(exist_ok=True)
            files.write_whole(folder / f"{step:08d}{name and f'_{name}'}.png", _png(image))
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror or error}).") from error
        for curves in self._curves:
            curves.image(step, f"grid/{name}" if name else "grid", image)

    def summary(self, step: int, meta: Mapping[str, Any]) -> None:
        """Writes run.json: what the run cost, up to the checkpoint with this meta."""
        values = {
            "steps": step,
            "finished": step == self._options.steps,
            **checkpoint_files.cost(meta),
            "compile_seconds": meta["compile_seconds"],
            "global_batch": self._options.global_batch,
            "device": device(),
        }
        if self._writes:
            with self._writing("run.json") as path:
                files.write_whole(path, json.dumps(values, indent=2) + "\n")

    def say(self, text: str) -> None:
        """A line on stderr."""
        if self._writes:
            (self._bar or console).say(text)

    @contextlib.contextmanager
    def _writing(self, name: str):
        path = self._workdir / name
        try:
            yield path
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror or error}): fix this and run the same command again; "
                "it continues from the last checkpoint."
            ) from error

    def _progress(self, step: int) -> None:
        self._printed = time.perf_counter()
        per_step = (self._printed - self._began) / (step - self._start)
        left = datetime.timedelta(seconds=round(per_step * (self._options.steps - step)))
        loss = f"  loss {self._loss:.4f}" if math.isfinite(self._loss) else ""
        skipped = f"  {self._skipped} skipped" if self._skipped else ""
        rate = f"{self._options.global_batch / per_step:.4g} images/s"
        if self._bar and self._bar.shown:
            self._bar.update(step, f"{loss}{skipped}  {rate}".strip())
        else:
            self.say(f"step {step}/{self._options.steps}{loss}{skipped}  {rate}  ETA {left}")


class Events:
    """TensorBoard events, without tensorflow, whose import takes longer than compiling a small model.

    The first event makes TensorBoard forget what the run wrote of later steps before, if it went further than its last checkpoint.

    Args:
      workdir: where the event file is made.
      start: the step that the run continues from.
    """

    def __init__(self, workdir: pathlib.Path, start: int):
        self._records = None
        with self._optional():
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter

            self._event, self._summary = event_pb2.Event, summary_pb2.Summary
            # They are read in the order of their names: the time comes first.
            path = workdir / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
            self._records = RecordWriter(path.open("wb"))
            self._add(file_version="brain.Event:2")
            self._add(step=start + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._records:
            with self._optional():
                scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
                self._add(step=step, summary=self._summary(value=scalars))

    def image(self, step: int, name: str, image: Any) -> None:
        """A Pillow image."""
        if self._records:
            with self._optional():
                shown = self._summary.Image(width=image.width, height=image.height, colorspace=4, encoded_image_string=_png(image))
                self._add(step=step, summary=self._summary(value=[self._summary.Value(tag=name, image=shown)]))

    def close(self) -> None:
        if self._records:
            with self._optional():
                self._records.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()

    @contextlib.contextmanager
    def _optional(self):
        try:
            yield
        except (ImportError, OSError) as error:  # a run does not end for want of curves
            self._records = None
            log.warning("no TensorBoard events are written: %s: %s", type(error).__name__, error)


def _png(image: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _lines_until(path: pathlib.Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to `step`; a last line that a crash cut off is dropped."""
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() and step else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    return kept


def device() -> str:
    """How many devices of which kind."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
