"""The training loop: `train(experiment, config, workdir)`, to be read from top to bottom."""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import logging
import math
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from clu.metrics import Average
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmdiff.data import loader
from mmdiff.errors import UserError
from mmdiff.experiment import Experiment
from mmdiff.training import checkpoints, distributed, sharding
from mmdiff.training.step import IN_FLIGHT, State, noise_scale_of, step_of

log = logging.getLogger(__name__)

OPTIONS = (  # what is read of config.train
    "steps", "global_batch", "microbatches", "log_every", "eval_every", "checkpoint_every", "keep", "best", "ema", "mesh",
    "prefetch", "tensorboard",
)  # fmt: skip
TIMING = ("images_per_second", "train_seconds")  # the keys of a metrics line that two equal runs may differ in


@distributed.together()
def train(experiment: Experiment, config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> State:
    """Trains to config.train.steps, from the newest checkpoint in `workdir` if there is one, and returns the final state.

    A run that was interrupted and continued gives, bit for bit, what it would have given uninterrupted: parameters, optimizer
    state, average, order of the data and metrics (on the same kind of machine; on another mesh they agree to rounding).

    It reads config.seed and, of config.train: steps, global_batch, microbatches, log_every, eval_every (0: never),
    checkpoint_every, keep (the last k checkpoints), best (a metric such as "val/loss" whose lowest checkpoint is kept too, or
    ""), ema, mesh, prefetch (batches prepared ahead) and tensorboard; if there, noise_scale and norm_groups (metrics, see `make_step`)
    and start (the workdir of a run of the same network, whose averaged weights this one begins with).

    It writes WORKDIR/config.json, beside.json, checkpoints/, metrics.jsonl (one line per log step: means over the steps since the one
    before, void steps left out, and `skipped`, their number so far; one line per evaluation: "val/..."), run.json and TensorBoard events.

    Raises:
      UserError: the config, the mesh or the workdir does not fit, or a checkpoint cannot be written.
      SystemExit: SIGTERM or SIGINT came; the state is saved, the status is 143 or 130 (128 + the signal), and the same command
        continues. A second signal stops at once.
    """
    options = config.train
    _check(options)
    mesh = sharding.make_mesh(dict(options.mesh))
    sharding.check_batch(options.global_batch, mesh, options.microbatches)
    changed = checkpoints.check_config(workdir, config)
    checkpoints.check_beside(workdir, experiment)

    # Everything the step needs to be compiled is known from shapes: no array exists yet.
    step_fn = step_of(experiment, options)
    abstract = sharding.abstract_state(experiment.init, experiment.optimizer, mesh, experiment.rules, experiment.loss)
    data = experiment.train_data()
    evaluate = make_evaluate(experiment, config, mesh) if options.eval_every else None
    part, parts = sharding.process_rows(mesh, options.global_batch)
    example = loader.batches(data, config.seed, 1, part * options.global_batch // parts)  # its own first row: no process reads others'
    shapes = {
        name: jax.ShapeDtypeStruct((options.global_batch, *array.shape[1:]), array.dtype)
        for name, array in next(example).items()
    }
    lowered = sharding.lower_step(step_fn, abstract, shapes, mesh)
    names = sorted(lowered.out_info[1])
    if options.best and options.best.removeprefix("val/") not in names:
        raise UserError(f"config.train.best is {options.best!r}, but the metrics are {', '.join(f'val/{n}' for n in names)}.")
    replicated = NamedSharding(mesh, PartitionSpec())
    empty = jax.jit(lambda: {name: Average.empty() for name in names}, out_shardings=replicated)()

    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(checkpoints.Checkpoints(workdir, keep=options.keep, best=options.best))
        start = saved.latest() or 0
        if start:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), empty)
            state, averages, meta = saved.restore(abstract, like)
        else:
            key = jax.random.key(config.seed)
            state = sharding.place_state(experiment.init, experiment.optimizer, key, mesh, experiment.rules, experiment.loss)
            if options.get("start"):  # fine-tuning
                weights, _ = checkpoints.weights(experiment, options.start, mesh=mesh)
                where = jax.tree.map(lambda x: x.sharding, (state.params, state.ema))
                cast = jax.tree.map(lambda new, old: new.astype(old.dtype), weights, state.params)
                params, ema = jax.jit(lambda *both: jax.tree.map(jnp.copy, both), out_shardings=where)(cast, weights)
                state = state.replace(params=params, ema=ema)
            averages, meta = empty, {"train_seconds": 0.0, "compile_seconds": 0.0}
        if start >= options.steps:
            if jax.process_index() == 0:
                print(f"nothing to do: {workdir} is trained for {start} of {options.steps} steps", file=sys.stderr)
            return state
        if jax.process_index() == 0:
            checkpoints.write_config(workdir, config)
            checkpoints.write_beside(workdir, experiment)
        journal = stack.enter_context(Journal(workdir, options, start, meta["train_seconds"]))
        for name in checkpoints.beside_others(options.start, experiment) if options.get("start") and not start else ():
            journal.say(f"the weights from {options.start} were trained beside other {name}: what they know of these does not fit")
        if start and changed:
            listed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items())
            journal.say(f"continuing with other values: {listed}")

        # Batches are read and placed in a thread; the first ones while the step compiles.
        batches = loader.batches(data, config.seed, options.global_batch, start, part, parts)
        placed = (sharding.place(checked(experiment, batch), mesh) for batch in batches)
        stream = stack.enter_context(loader.prefetch(placed, options.prefetch))

        size = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
        whence = f"continuing from step {start}" if start else "starting"
        journal.say(f"{size:,} parameters on {_device()}, mesh {dict(mesh.shape)}: {whence}, compiling")
        began = time.perf_counter()
        program = lowered.compile()
        meta["compile_seconds"] += time.perf_counter() - began
        journal.say(f"compiled in {time.perf_counter() - began:.1f} s")
        accumulate = make_accumulate()
        someone = make_someone(mesh)

        stop = stack.enter_context(Signals())
        in_flight = collections.deque()
        journal.start_clock()

        def finish(remaining: int) -> bool:
            """Waits until at most `remaining` steps are in flight; true if some process was asked to stop before one."""
            asked = False
            while len(in_flight) > remaining:
                done, sums, told = in_flight.popleft()
                jax.block_until_ready(sums)
                journal.finished(done, sums)
                asked |= bool(told)
            return asked

        for step in range(start + 1, options.steps + 1):
            state, metrics = program(state, next(stream))
            averages = accumulate(averages, metrics, state.stats)
            in_flight.append((step, averages, someone(stop.signal)))
            if step % options.log_every == 0:
                averages = empty

            # The host waits for old steps only, so new ones are always queued; it is what bounds the memory of batches in
            # flight, and by then the metrics of a log step are there: reading them stalls nothing.
            last = step == options.steps
            evaluating = options.eval_every and (step % options.eval_every == 0 or last)
            saving = step % options.checkpoint_every == 0 or last
            stopping = finish(0 if evaluating or saving else IN_FLIGHT)
            # Processes must stop after the same step: they go by the flags that all of them have seen. One process just stops.
            stopping |= jax.process_count() == 1 and stop.signal is not None
            if stopping:
                finish(0)

            values = {}
            if evaluating:
                with journal.pause():
                    values = evaluate(state.ema)
                    journal.write(step, values)
            if saving or stopping:
                # Lines up to this step are on disk by now: a checkpoint never knows more than metrics.jsonl.
                with journal.pause():
                    meta |= {"position": step * options.global_batch, "train_seconds": journal.seconds(), "metrics": values}
                    saved.save(state, averages, meta)
            if step % options.log_every == 0:
                saved.check()
            if stopping and not last:
                break

        saved.wait()
        journal.summary(step, meta)
        if stopping and not last:
            journal.say(f"{stop.name}: saved step {step}{stop.after()}; the same command continues")
            raise SystemExit(stop.status)
        return state


def checked(experiment: Experiment, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The batch, unless its data would be silently taken for something else (a class id out of range): then UserError."""
    try:
        experiment.process.check(batch)
    except ValueError as error:
        raise UserError(f"the training data does not fit the process: {error}") from error
    return batch


def make_accumulate() -> Callable:
    """`(averages, metrics, stats) -> averages`: running means on the device, without the steps that were void."""

    def accumulate(averages, metrics, stats):
        counted = (metrics["skipped"] == 0)[None]
        averages = {name: mean.merge(Average.from_model_output(metrics[name], counted)) for name, mean in averages.items()}
        skipped = stats["skipped"].astype(jnp.float32)
        return averages | {"skipped": Average(total=skipped, count=jnp.ones((), jnp.int32))}

    return jax.jit(accumulate)


def make_evaluate(experiment: Experiment, config: ml_collections.ConfigDict, mesh: Mesh) -> Callable[[Any], dict[str, float]]:
    """`EMA params -> {"val/loss": ..., ...}`: the loss on all held-out data, with the same random numbers every time.

    The data is taken in its own order in batches of the training size; the last one is filled up from the beginning.
    """
    size, source = config.train.global_batch, experiment.eval_data()
    part, parts = sharding.process_rows(mesh, size)

    def score(params, batch):
        value, metrics = experiment.loss(params, batch, jax.random.key(config.seed))
        return {**metrics, "loss": value}

    score = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def evaluate(params):
        results = []
        for start in range(0, len(source), size):
            positions = start + np.arange(part * size // parts, (part + 1) * size // parts)
            batch = {**source.take(positions % len(source)), "index": positions.astype(np.uint32)}
            with sharding.target_of(mesh):
                results.append(score(params, sharding.place(batch, mesh)))
        results = jax.device_get(results)
        return {f"val/{name}": float(np.mean([result[name] for result in results])) for name in results[0]}

    return evaluate


def make_someone(mesh: Mesh) -> Callable[[int | None], Any]:
    """`signal -> whether any process has one`: on the device, so that it is read with the step that it belongs to."""
    if jax.process_count() == 1:
        return lambda signal: signal is not None
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def someone(signal):
        mine = np.full(jax.local_device_count(), signal is not None, np.int32)
        return largest(jax.make_array_from_process_local_data(spread, mine))

    return someone


class Signals:
    """A context in which SIGTERM and the first Ctrl-C are noted, not obeyed.

    Attributes:
      signal: the signal that came; None until then.
    """

    def __init__(self):
        self.signal: int | None = None
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal, self._came = number, time.perf_counter()
        self.__exit__()  # the next one is obeyed

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal else "another process was stopped"

    def after(self) -> str:
        """How long ago that was, which a scheduler's grace period must allow for."""
        return f" {time.perf_counter() - self._came:.1f} s after it came" if self.signal else ""

    @property
    def status(self) -> int:
        return 128 + (self.signal or signal.SIGTERM)


class Journal:
    """What a run tells: metrics.jsonl, TensorBoard events, run.json and the progress on stderr; a context manager.

    Only process 0 writes. On a terminal the progress is one line that renews itself; elsewhere it is a line per log step.

    Args:
      workdir: the run's folder.
      options: config.train.
      start: the step that the run continues from: later lines, of a run that went further than its last checkpoint, are dropped.
      seconds: the training time up to there.
    """

    def __init__(self, workdir: str | os.PathLike, options: ml_collections.ConfigDict, start: int, seconds: float):
        self._workdir, self._options, self._start, self._before = pathlib.Path(workdir), options, start, seconds
        self._writes = jax.process_index() == 0
        self._terminal = sys.stderr.isatty()
        self._events, self._file, self._loss = None, None, math.nan
        self._began = self._printed = self._logged = time.perf_counter()
        self._logged_step, self._paused = start, 0.0

    def __enter__(self) -> Journal:
        if self._writes:
            with self._writing("metrics.jsonl") as path:
                checkpoints.write_whole(path, "".join(_lines_until(path, self._start)))
                self._file = path.open("a")
            if self._options.tensorboard:
                self._events = Events(self._workdir, self._start)
        return self

    def __exit__(self, *_) -> None:
        if self._writes:
            with contextlib.suppress(OSError):  # of a full disk, which has been reported
                self._file.close()
            if self._events:
                self._events.close()

    def start_clock(self) -> None:
        """Training time runs from here."""
        self._began = self._printed = self._logged = time.perf_counter()

    def seconds(self) -> float:
        """Training time so far, that of earlier runs included; compilation is not."""
        return self._before + time.perf_counter() - self._began

    @contextlib.contextmanager
    def pause(self):
        """Time that does not count for images_per_second (it does count as training time)."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def finished(self, step: int, sums: Mapping[str, Average]) -> None:
        """The device has finished `step`, with these means so far."""
        logs = step % self._options.log_every == 0 or step == self._options.steps
        if logs and self._writes:
            now = time.perf_counter()
            rate = (step - self._logged_step) * self._options.global_batch / (now - self._logged - self._paused)
            self._logged, self._logged_step, self._paused = now, step, 0.0
            with np.errstate(invalid="ignore"):  # 0 / 0 if every step was void
                values = {name: float(mean.compute()) for name, mean in jax.device_get(dict(sums)).items()}
            values["skipped"] = int(values["skipped"])
            if "noise_scale/trace" in values:
                values["noise_scale"] = noise_scale_of(values)  # of the means: a mean of ratios would be biased
            self._loss = values["loss"]
            self.write(step, {**values, "images_per_second": rate, "train_seconds": self.seconds()})
        if logs or self._terminal and time.perf_counter() - self._printed > 0.5:
            self._progress(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, on disk when this returns; what is not finite is null."""
        if not self._writes:
            return
        line = {name: value if math.isfinite(value) else None for name, value in sorted(values.items())}
        with self._writing("metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **line}) + "\n")
            self._file.flush()
        if self._events:
            self._events.write(step, values)

    def summary(self, step: int, meta: Mapping[str, Any]) -> None:
        """Writes run.json: what the run cost, up to the checkpoint with this meta."""
        values = {
            "steps": step,
            "finished": step == self._options.steps,
            **checkpoints.cost(meta),
            "compile_seconds": meta["compile_seconds"],
            "global_batch": self._options.global_batch,
            "device": _device(),
        }
        if self._writes:
            with self._writing("run.json") as path:
                checkpoints.write_whole(path, json.dumps(values, indent=2) + "\n")

    def say(self, text: str) -> None:
        """A line on stderr."""
        if self._writes:
            print(f"\r\x1b[K{text}" if self._terminal else text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _writing(self, name: str):
        path = self._workdir / name
        try:
            yield path
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror or error}): mend this and run the same command again; "
                "it goes on from the last checkpoint."
            ) from error

    def _progress(self, step: int) -> None:
        self._printed = time.perf_counter()
        per_step = (self._printed - self._began) / (step - self._start)
        left = datetime.timedelta(seconds=round(per_step * (self._options.steps - step)))
        loss = f"  loss {self._loss:.4f}" if math.isfinite(self._loss) else ""
        text = f"step {step}/{self._options.steps}{loss}  {self._options.global_batch / per_step:.4g} images/s  ETA {left}"
        if not self._terminal or step == self._options.steps:
            self.say(text)
        elif self._writes:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


class Events:
    """TensorBoard events, without tensorflow, whose import takes longer than compiling a small model.

    The first event makes TensorBoard forget what the run told of later steps before, if it went further than its last checkpoint.

    Args:
      workdir: where the event file is made.
      start: the step that the run continues from.
    """

    def __init__(self, workdir: pathlib.Path, start: int):
        self._records = None
        with self._comfort():
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
            with self._comfort():
                scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
                self._add(step=step, summary=self._summary(value=scalars))

    def close(self) -> None:
        if self._records:
            self._records.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()

    @contextlib.contextmanager
    def _comfort(self):
        try:
            yield
        except (ImportError, OSError) as error:  # curves are a comfort: a run does not die of them
            self._records = None
            log.warning("no TensorBoard events are written: %s: %s", type(error).__name__, error)


def _lines_until(path: pathlib.Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to `step`; a last line that a crash cut off is dropped."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.is_file() and step else []:
        with contextlib.suppress(ValueError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    return kept


def _check(options: ml_collections.ConfigDict) -> None:
    missing = [name for name in OPTIONS if name not in options]
    if missing:
        raise UserError(f"the config lacks {', '.join(f'config.train.{name}' for name in missing)}: add them to its file.")
    for name in ("steps", "log_every", "checkpoint_every", "keep", "microbatches"):
        if options[name] < 1:
            raise UserError(f"config.train.{name} must be 1 or more, not {options[name]}.")
    for name in ("eval_every", "prefetch"):
        if options[name] < 0:
            raise UserError(f"config.train.{name} must be 0 or more, not {options[name]}.")
    if not 0 <= options.ema < 1:
        raise UserError(f"config.train.ema must be at least 0 and below 1, not {options.ema}.")
    if options.best and (not options.eval_every or options.checkpoint_every % options.eval_every):
        raise UserError(
            f"config.train.best={options.best!r} needs an evaluation at every checkpoint: let config.train.eval_every "
            f"({options.eval_every}) divide config.train.checkpoint_every ({options.checkpoint_every})."
        )


def _device() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
