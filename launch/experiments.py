"""What the experiments share: many small trainings side by side, a line of results for each, and tables of means with errors.

Every line of OUT/runs.jsonl is one training with its metrics; those that are there are not repeated. Small trainings use one core best:
as many run side by side as there are cores (--workers).
"""

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np

from mmdiff.data.loader import batches
from mmdiff.errors import UserError
from mmdiff.keys import key_of
from mmdiff.training.sharding import abstract_state, lower_step, make_mesh
from mmdiff.training.step import init_state, step_of

SEEDS = (0, 1, 2)
Setting = tuple[str, str, str, Mapping[str, str]]  # part, name, data, what the config overrides


def train(experiment: Any, config: Any) -> tuple[Any, float]:
    """The averaged weights, and the seconds that they took."""
    mesh = make_mesh({}, jax.devices()[:1])
    data = batches(experiment.train_data(), config.seed, config.train.global_batch)
    first = next(data)
    state = abstract_state(experiment.init, experiment.optimizer, mesh, experiment.rules, experiment.loss)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)
    step = lower_step(step_of(experiment, config.train), state, shapes, mesh).compile()
    state = jax.jit(lambda key: init_state(experiment.init, experiment.optimizer, key, experiment.loss))(key_of(config.seed))
    start = time.monotonic()
    for _ in range(config.train.steps):
        state, _ = step(state, first)
        first = next(data)
    return jax.block_until_ready(state.ema), time.monotonic() - start


def cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


def _settle(free, workers, out):
    """One worker: a core of its own, and compiled programs that the seeds share."""
    number = free.get()
    if hasattr(os, "sched_setaffinity") and workers > 1:
        os.sched_setaffinity(0, {cores()[number % len(cores())]})
    jax.config.update("jax_compilation_cache_dir", os.path.join(out, "compiled"))


def _run(run, seed, part, setting, data, overrides):
    try:
        metrics, seconds = run(seed, data, overrides)
    except UserError as error:
        raise UserError(str(error)) from None  # not every kind of it can be sent from one process to another
    metrics = {name: round(float(value), 5) for name, value in metrics.items()}
    return {"part": part, "setting": setting, "seed": seed, "overrides": overrides, "metrics": metrics, "train_seconds": round(seconds, 1)}


def cells(values: np.ndarray) -> str:
    """Mean and standard error of the rows of `values` [n, metrics], as cells of a table."""
    error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.full(values.shape[1], np.nan)
    return " | ".join(f"{mean:.4f} ± {e:.4f}" for mean, e in zip(values.mean(0), error))


def differences(rows: Sequence[Mapping], name: str, base: str, names: Sequence[str]) -> np.ndarray:
    """What a setting changes: its metrics minus those of `base`, for every seed and every rest "..., T=20" of the name: [n, metrics]."""
    found = {(row["setting"], row["seed"]): np.array([row["metrics"].get(each, np.nan) for each in names]) for row in rows}
    pairs = [(setting, (setting[0].replace(name, base, 1), setting[1])) for setting in found if setting[0].split(",")[0] == name]
    return np.array([found[one] - found[other] for one, other in pairs if other in found])


def _read(line: str) -> dict[str, Any]:
    """A row of runs.jsonl; earlier versions called its metrics figures."""
    row = json.loads(line)
    return {"metrics": row.pop("figures", None), **row}


def table(rows: Sequence[Mapping], bases: Mapping[str, str]) -> None:
    """Prints mean and standard error over the seeds, as Markdown, and what each setting changes against its part's base."""
    for part in dict.fromkeys(row["part"] for row in rows):
        chosen = [row for row in rows if row["part"] == part]
        names = list(dict.fromkeys(name for row in chosen for name in row["metrics"]))
        print(f"\n| {part} | seeds | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
        for setting in dict.fromkeys(row["setting"] for row in chosen):
            values = np.array([[row["metrics"].get(name, np.nan) for name in names] for row in chosen if row["setting"] == setting])
            print(f"| {setting} | {len(values)} | {cells(values)} |")
        for name in dict.fromkeys(row["setting"].split(",")[0] for row in chosen):
            pairs = differences(chosen, name, bases[part], names) if part in bases and name != bases[part] else ()
            if len(pairs):
                print(f"| {name} minus {bases[part]}, in pairs | {len(pairs)} | {cells(pairs)} |")


def main(
    description: str, settings: Sequence[Setting], run: Callable, bases: Mapping[str, str],
    real: Sequence[str] = (), seeds: Mapping[str, Sequence[int]] = {}, follow: Callable | None = None,
) -> list[dict[str, Any]]:
    """The command; returns its rows.

    Args:
      description: of the command.
      settings: everything that is to be run, with each of `SEEDS`.
      run: `(seed, data, overrides) -> (metrics, seconds of training)`, a function of a module; with `real`, it also takes `folder=`.
      bases: part -> the name of the setting that its others are compared with in pairs.
      real: the parts that need real data, whose folder or file the option --data names; without it the others are run.
      seeds: part -> its seeds, where they are not `SEEDS`: one is enough to choose by.
      follow: `rows of the settings -> settings` of more parts, which are then run with `SEEDS`: those that were chosen.
    """
    parts = tuple(dict.fromkeys(part for part, *_ in settings))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--parts", nargs="+", choices=parts, help="which parts (default: all whose data are there)")
    if real:
        parser.add_argument("--data", default="", metavar="PATH", help=f"the real data, for {', '.join(real)}")
    parser.add_argument("--workers", type=int, default=len(cores()), metavar="N", help="trainings at a time (default: one a core)")
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    args = parser.parse_args()
    missing = real if real and not (args.data or args.table) else ()
    chosen = args.parts or [part for part in parts if part not in missing] or parts
    for part in chosen:
        if part in missing:
            parser.error(f"{part} needs real data: name their folder or file by --data.")
    run = functools.partial(run, folder=args.data) if real else run
    order = dict.fromkeys(seed for part in chosen for seed in seeds.get(part, SEEDS))
    every = [
        (seed, *each) for seed in order for part in chosen if seed in seeds.get(part, SEEDS)  # a seed of all first
        for each in settings if each[0] == part]
    try:
        rows = complete(args, every, run)
        rows += complete(args, [(seed, *each) for seed in SEEDS for each in follow(rows)], run) if follow else []
    except UserError as error:
        parser.error(str(error))
    table(rows, bases)
    return rows


def complete(args: argparse.Namespace, every: Sequence[tuple], run: Callable) -> list[dict[str, Any]]:
    """The rows of `every` seed and setting, in their order; those that OUT/runs.jsonl lacks are run first, unless only tables are asked."""
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "runs.jsonl"
    rows = [_read(line) for line in log.read_text().splitlines()] if log.exists() else []
    wanted = {(seed, part, setting): overrides for seed, part, setting, _, overrides in every}
    rows = [row for row in rows if wanted.get((row["seed"], row["part"], row["setting"])) == row["overrides"]]  # not of other values
    done = {(row["seed"], row["part"], row["setting"]) for row in rows}
    todo = [] if args.table else [each for each in every if each[:3] not in done]
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for number in range(args.workers):
        free.put(number)
    pool, mistakes = ProcessPoolExecutor(args.workers, context, _settle, (free, args.workers, str(args.out))), []
    try:
        jobs = [pool.submit(_run, run, *each) for each in todo]
        for number, job in enumerate(as_completed(jobs), 1):
            try:
                row = job.result()
            except (UserError, CancelledError) as error:  # what is running ends and is kept
                mistakes.append(error)
                for other in jobs:
                    other.cancel()
                continue
            rows.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{number}/{len(todo)} {row['part']}: {row['setting']}, seed {row['seed']}: {row['metrics']}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    if mistakes:
        raise mistakes[0]
    order = list(wanted)
    return sorted(rows, key=lambda row: order.index((row["seed"], row["part"], row["setting"])))
