"""The training loop: `train(experiment, config, workdir)`, to be read from top to bottom."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
from clu.metrics import Average
from jax.sharding import NamedSharding, PartitionSpec

from mmdiff import checks, console, files
from mmdiff.data import loader
from mmdiff.data.order import ORDER_VERSION
from mmdiff.errors import UserError
from mmdiff.experiment import Experiment, best_metric, watched
from mmdiff.keys import check_seed, key_of
from mmdiff.training import checkpoints, distributed, finetune, lock, power_ema, run_metadata, sharding, weights_and_biases
from mmdiff.training.in_loop import InLoop
from mmdiff.training.metrics_logger import MetricsLogger, device
from mmdiff.training.post_hoc_ema import Snapshots
from mmdiff.training.profiling import Profile
from mmdiff.training.signals import Signals, make_any_process_signalled
from mmdiff.training.skipped import SkippedSteps
from mmdiff.training.step import IN_FLIGHT, State, checked, step_of
from mmdiff.training.validation import Validation

OPTIONS = (  # what is read of config.train
    "steps", "global_batch", "microbatches", "log_every", "eval_every", "checkpoint_every", "keep", "best", "ema", "mesh",
    "prefetch", "tensorboard",
)  # fmt: skip


@distributed.exit_together()
def train(
    experiment: Experiment, config: ml_collections.ConfigDict, workdir: str | os.PathLike, profile: tuple[int | None, int] | None = None,
) -> State:
    """Trains to config.train.steps, from the newest checkpoint in `workdir` if there is one, and returns the final state.

    A run that was interrupted and continued gives, bit for bit, what it would have given uninterrupted: parameters, optimizer
    state, average, order of the data and metrics (on the same kind of machine; on another mesh they agree to rounding).

    It reads config.seed and, of config.train: steps, global_batch, microbatches, log_every, eval_every (0: never), checkpoint_every, keep
    (the last k checkpoints), best (a metric such as "val/loss" whose lowest checkpoint is kept too, or ""), ema, mesh, prefetch (batches
    prepared ahead) and tensorboard; if there, max_skipped (steps in a row that end the run, 100), noise_scale and norm_groups (metrics,
    see `make_step`), ema_widths and ema_every (averages that make others after training, and how often they are kept, 0: as checkpoints;
    see `power_ema`), sample_every, metrics_every and evaluation_share (what is sampled and measured while it trains, 0: never, and its
    share of the time, see `in_loop`), wandb (a project there), start (the workdir of a run whose averaged weights this one begins with,
    where they fit), start_strict (they must all fit) and other_data (a run may continue with other data than before).

    Args:
      experiment, config, workdir: of the run.
      profile: which steps to trace, (first, last) or (None, how many), see `Profile`.

    It writes WORKDIR/config.json, dependencies.json, checkpoints/, metrics.jsonl (one line per log step: means over the steps since the one
    before, without skipped steps and values that are not finite, and `skipped`, their number so far; one line per evaluation:
    "val/..."), grids/STEP.png, run.json, TensorBoard events and, with ema_widths, snapshots/.

    Raises:
      UserError: the config, the mesh or the workdir does not fit, a checkpoint or metrics.jsonl cannot be written, or max_skipped steps
        in a row were skipped; the last checkpoint is kept.
      SystemExit: SIGTERM, SIGINT or another of `signals.SAVING` came; the state is saved, the status is 143 or 130 (128 + the signal),
        and the same command continues. A second signal stops at once.
    """
    check(experiment, config)
    options = config.train
    mesh = sharding.make_mesh(dict(options.mesh))
    sharding.check_batch(options.global_batch, mesh, options.microbatches)

    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.held(workdir))
        changed = run_metadata.check_config(workdir, config)
        run_metadata.check_dependencies(workdir, experiment)

        # Everything the step needs to be compiled is known from shapes: no array exists yet.
        step_fn = step_of(experiment, options)
        widths = tuple(options.get("ema_widths", ()))
        abstract = sharding.abstract_state(experiment.init, experiment.optimizer, mesh, experiment.rules, experiment.loss, widths)
        data = experiment.train_data()
        here = run_metadata.describe_data(experiment, data)
        evaluate = Validation(experiment, config, mesh) if options.eval_every else None
        part, parts = sharding.process_shard(mesh, options.global_batch)
        example = loader.batches(data, config.seed, 1, part * options.global_batch // parts)  # its own first row: no process reads others'
        shapes = {
            name: jax.ShapeDtypeStruct((options.global_batch, *array.shape[1:]), array.dtype)
            for name, array in next(example).items()
        }
        sharding.check_memory(abstract, shapes, mesh)
        lowered = sharding.lower_step(step_fn, abstract, shapes, mesh)
        names = sorted(lowered.out_info[1])
        replicated = NamedSharding(mesh, PartitionSpec())
        empty = jax.jit(lambda: {name: Average.empty() for name in names}, out_shardings=replicated)()

        in_loop = InLoop(experiment, config, mesh)
        best, mode = best_metric(experiment, options.best)
        if best and best not in (found := [*(evaluate.names(abstract.ema, shapes) if evaluate else ()), *in_loop.watched]):
            raise UserError(f"config.train.best is {options.best!r}, but an evaluation gives {', '.join(found)}: choose one of these.")
        saved = stack.enter_context(checkpoints.Checkpoints(workdir, keep=options.keep, best=best, mode=mode))
        latest = saved.latest()
        start = latest or 0
        if latest is not None:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), empty)
            state, averages, meta = saved.restore(abstract, like)
            meta = {"order": 1, **meta}  # of before the order had versions
            moved = set(changed) & set(run_metadata.FOLDERS)
            noted = run_metadata.check_data(workdir, meta.get("data"), here, moved=moved, other=options.get("other_data", False))
        else:
            key = key_of(config.seed)
            state = sharding.init_sharded_state(
                experiment.init, experiment.optimizer, key, mesh, experiment.rules, experiment.loss, widths)
            noted = []
            if options.get("start"):  # fine-tuning
                strict = options.get("start_strict", False)
                folder = files.expand(options.start, without=files.ASIDE)
                weights, noted = finetune.start_from(folder, experiment, here, state.ema, mesh, strict)
                noted = [f"starting from the averaged weights of {options.start}", *noted]
                where = jax.tree.map(lambda x: x.sharding, (state.params, state.ema))
                cast = jax.tree.map(lambda new, old: new.astype(old.dtype), weights, state.params)
                params, ema = jax.jit(lambda *both: jax.tree.map(jnp.copy, both), out_shardings=where)(cast, weights)
                state = state.replace(params=params, ema=ema)
            averages, meta = empty, {"position": 0, "order": ORDER_VERSION, "train_seconds": 0.0, "compile_seconds": 0.0}
        snapshots = stack.enter_context(Snapshots(workdir, config, start))
        if snapshots.due(start):
            snapshots.save(state)
        if start >= options.steps:
            if jax.process_index() == 0:
                console.say(f"nothing to do: {workdir} is trained for {start} of {options.steps} steps")
            return state
        tracing = Profile(profile, workdir, start, options.steps, lambda text: logger.say(text))
        if jax.process_index() == 0:
            run_metadata.write_config(workdir, config)
            run_metadata.write_dependencies(workdir, experiment)
            run_metadata.write_data(workdir, here)
            run_metadata.write_source(workdir, options.get("start"))
        meta["data"] = here
        in_loop.restore(meta.get("in_loop", {}))
        logger = stack.enter_context(MetricsLogger(workdir, options, start, meta["train_seconds"]))
        for what in noted:
            logger.say(what)
        if start and changed:
            listed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items())
            logger.say(f"continuing with other values: {listed}")
            if "train.global_batch" in changed:
                logger.say("schedules (learning rate, warm-up, average) count steps, and a step has another number of examples now")

        # Batches are read and placed in a thread; the first ones while the step compiles.
        ahead = meta["position"] - start * options.global_batch  # of a run whose steps had another size before
        batches = loader.batches(data, config.seed, options.global_batch, start, part, parts, order=meta["order"], ahead=ahead)
        placed = (sharding.shard_batch(checked(experiment, batch), mesh) for batch in batches)
        stream = stack.enter_context(loader.prefetch(placed, options.prefetch))

        size = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
        whence = f"continuing from step {start}" if start else "starting"
        logger.say(f"{size:,} parameters on {device()}, mesh {dict(mesh.shape)}: {whence}, compiling")
        began = time.perf_counter()
        program = sharding.compile_lowered(lowered, mesh)
        meta["compile_seconds"] += time.perf_counter() - began
        logger.say(f"compiled in {time.perf_counter() - began:.1f} s")
        accumulate = make_accumulate()
        any_process_signalled = make_any_process_signalled(mesh)

        stack.enter_context(tracing)
        stop = stack.enter_context(Signals())
        in_flight = collections.deque()
        skipped = SkippedSteps(options, logger.say, saved.latest, ahead)
        logger.start_clock()
        if start and in_loop.due(start):  # it was stopped before
            with logger.pause():
                if values := in_loop(start, state.ema, logger):
                    logger.write(start, values)

        def finish(remaining: int) -> bool:
            """Waits until at most `remaining` steps are in flight; true if some process was asked to stop before one."""
            asked = False
            while len(in_flight) > remaining:
                done, sums, metrics, signalled = in_flight.popleft()
                jax.block_until_ready(sums)
                logger.finished(done, sums)
                skipped.finished(done, metrics, sums["skipped"].total)
                asked |= bool(signalled)
            return asked

        tracing.after(start)
        for step in range(start + 1, options.steps + 1):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = program(state, next(stream))
            averages = accumulate(averages, metrics, state.stats)
            in_flight.append((step, averages, metrics, any_process_signalled(stop.signal)))
            if step % options.log_every == 0:
                averages = empty

            # The host waits for old steps only, so new ones are always queued; it is what bounds the memory of batches in
            # flight, and by then the metrics of a log step are there: reading them stalls nothing.
            last = step == options.steps
            evaluating = options.eval_every and (step % options.eval_every == 0 or last)
            sampling = in_loop.due(step)
            saving = step % options.checkpoint_every == 0 or last
            stopping = finish(0 if evaluating or sampling or saving or snapshots.due(step) or tracing.at_edge(step) else IN_FLIGHT)
            # Processes must stop after the same step: they go by the flags that all of them have seen. One process just stops.
            stopping |= jax.process_count() == 1 and stop.signal is not None
            if stopping:
                finish(0)
            tracing.after(step)

            values = {}
            if evaluating or sampling:
                with logger.pause():
                    values = evaluate(state.ema) if evaluating else {}
                    if sampling and (last or not stopping):  # who asks to stop does not wait for it: it is made up for
                        values |= in_loop(step, state.ema, logger)
                    if values:
                        logger.write(step, values)
            if saving or stopping:
                # Lines up to this step are on disk by now: a checkpoint never knows more than metrics.jsonl.
                with logger.pause():
                    meta |= {"position": step * options.global_batch + ahead, "train_seconds": logger.seconds(), "metrics": values}
                    meta |= {"in_loop": in_loop.state()}
                    saved.save(state, averages, meta)
            if snapshots.due(step):
                with logger.pause():
                    snapshots.save(state)
            if step % options.log_every == 0:
                saved.check()
            if stopping and not last:
                break

        saved.wait()
        logger.summary(step, meta)
        if stopping and not last:
            logger.say(f"{stop.name}: saved step {step}{stop.after()}; the same command continues")
            raise SystemExit(stop.status)
        return state


def make_accumulate() -> Callable:
    """`(averages, metrics, stats) -> averages`: running means on the device, without skipped steps and values that are not finite."""

    def accumulate(averages, metrics, stats):
        def counted(value):
            return ((metrics["skipped"] == 0) & jnp.isfinite(value))[None]

        averages = {
            name: mean.merge(Average.from_model_output(metrics[name], counted(metrics[name]))) for name, mean in averages.items()
        }
        skipped = stats["skipped"].astype(jnp.float32)
        return averages | {"skipped": Average(total=skipped, count=jnp.ones((), jnp.int32))}

    return jax.jit(accumulate)


def check(experiment: Experiment, config: ml_collections.ConfigDict) -> None:
    """Raises UserError for values of config.train that cannot be trained with, and for a seed that is none."""
    check_seed(config.seed)
    options = config.train
    best, metrics = best_metric(experiment, options.get("best", ""))[0], watched(experiment.in_loop)
    missing = [name for name in OPTIONS if name not in options]
    if missing:
        raise UserError(f"the config lacks {', '.join(f'config.train.{name}' for name in missing)}: add them to its file.")
    checks.check({f"train.{name}": options[name] for name in OPTIONS if name != "mesh"})  # make_mesh checks that
    weights_and_biases.check(options.get("wandb", ""))
    for width in options.get("ema_widths", ()):
        power_ema.exponent(width)
    every, saved = options.get("metrics_every", 0), options.checkpoint_every
    if best in metrics and (not every or every % saved):
        raise UserError(
            f"config.train.best={options.best!r} needs a checkpoint where it is measured: let config.train.metrics_every ({every}) be a "
            f"multiple of config.train.checkpoint_every ({saved}).")
    if best and best not in metrics and (not options.eval_every or saved % options.eval_every):
        raise UserError(
            f"config.train.best={options.best!r} needs an evaluation at every checkpoint: let config.train.eval_every "
            f"({options.eval_every}) divide config.train.checkpoint_every ({options.checkpoint_every})."
        )
