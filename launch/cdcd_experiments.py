"""Does the contrast of CDCD help? Compares losses, numbers of steps and weights on data whose law is known, and on the digits.

    python launch/cdcd_experiments.py --out runs/cdcd_experiments          # everything
    python launch/cdcd_experiments.py --out runs/cdcd_experiments --table  # the tables of what is done so far

Every line of OUT/runs.jsonl is one training with its figures; those that are there are not repeated. Small trainings use one core best:
as many run side by side as there are cores (--workers). Three parts, three seeds each:

    markov   markov_class: vanilla, Step-Intra, Sample-Inter and both, for chains of T = 20 to 120 steps, as many network calls
    weight   markov_class, T = 80: the weight of the contrast up to a thousand times the released one, and the bounded forms
    digits   digits_class: as markov, on the digits

Cost: the part markov, 72 trainings, took 40 minutes on two cores shared with other work. The other parts have not been run to their end,
and the digits' training has not been tuned; with all of them expect some two hours.

The networks and trainings are small: compare the losses with each other, not with the configs' own figures.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import pathlib
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import jax
import numpy as np

from mmdiff import config as configs
from mmdiff.data.loader import batches
from mmdiff.data.sources import ArraySource
from mmdiff.training.sharding import abstract_state, lower_step, make_mesh
from mmdiff.training.step import init_state, step_of

CONFIGS = pathlib.Path(__file__).parents[1] / "configs/cdcd"
SEEDS = (0, 1, 2)
SAMPLES = 500
LOSSES = {
    "vanilla": {"loss.step_intra": "0.0", "loss.sample_inter": "0.0"},
    "step-intra": {"loss.step_intra": "5e-5", "loss.sample_inter": "0.0"},
    "sample-inter": {"loss.step_intra": "0.0", "loss.sample_inter": "5e-6"},
    "both": {"loss.step_intra": "5e-5", "loss.sample_inter": "5e-6"},
}
MARKOV = {"model.width": "48", "model.depth": "2", "train.steps": "1000", "train.global_batch": "64", "train.learning_rate": "6e-3"}
DIGITS = {"model.width": "64", "model.depth": "2", "train.steps": "600", "train.global_batch": "64", "train.learning_rate": "2e-3"}
SETS = {
    "markov": ("markov_class", MARKOV, ("correspondence", "nll", "bigram_distance", "order_gain")),
    "digits": ("digits_class", DIGITS, ("conditional_agreement", "classification_accuracy_score", "frechet_ratio")),
}
PARTS = ("markov", "weight", "digits")


def settings():
    """-> (part, name of the setting, data, overrides), each to be run with every seed."""
    for data, (_, small, _) in SETS.items():
        for steps in (20, 40, 60, 80, 100, 120):
            for name, loss in LOSSES.items():
                yield data, f"{name}, T={steps}", data, {**small, **loss, "chain.steps": str(steps), "sample.steps": str(steps)}
    for scale in (10.0, 100.0, 1000.0):
        for name, key, weight in (("step-intra", "loss.step_intra", 5e-5), ("sample-inter", "loss.sample_inter", 5e-6)):
            yield "weight", f"{name}, linear, x{scale:g}", "markov", {**MARKOV, **LOSSES["vanilla"], key: str(weight * scale)}
    # Temperatures that make scores of whole sequences of 32 tokens: a step's KL times T = 80 per token, and a cross-entropy per token.
    for form in ("weighted", "infonce"):
        for weight in ("0.001", "0.01"):
            for name, key, temperature in (("step-intra", "loss.step_intra", 80 / 32), ("sample-inter", "loss.sample_inter", 1 / 32)):
                overrides = {**MARKOV, **LOSSES["vanilla"], key: weight, "form": form, "temperature": str(temperature)}
                yield "weight", f"{name}, {form}, weight {weight}", "markov", overrides


def train(experiment, config):
    """The averaged weights, and the seconds that they took."""
    mesh = make_mesh({}, jax.devices()[:1])
    data = batches(experiment.train_data(), config.seed, config.train.global_batch)
    first = next(data)
    state = abstract_state(experiment.init, experiment.optimizer, mesh, experiment.rules, experiment.loss)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)
    step = lower_step(step_of(experiment, config.train), state, shapes, mesh).compile()
    state = jax.jit(lambda key: init_state(experiment.init, experiment.optimizer, key, experiment.loss))(jax.random.key(config.seed))
    start = time.monotonic()
    for _ in range(config.train.steps):
        state, _ = step(state, first)
        first = next(data)
    return jax.block_until_ready(state.ema), time.monotonic() - start


def run(seed, part, setting, data, overrides):
    """One training and what its samples are like: a line of OUT/runs.jsonl."""
    name, _, figures = SETS[data]
    config, module = configs.load(str(CONFIGS / f"{name}.py"), [*overrides.items(), ("seed", str(seed))])
    experiment = module.build(config)
    params, seconds = train(experiment, config)
    # As many samples as the sources that the evaluator is shown have examples; the bound on the likelihood would take longer than all else.
    few = [ArraySource(source.take(np.arange(SAMPLES))) for source in (experiment.train_data(), experiment.eval_data())]
    experiment = dataclasses.replace(experiment, train_data=lambda: few[0], eval_data=lambda: few[1])
    found = experiment.evaluators[0].samples(
        experiment, params, jax.random.key(1000 + seed), config.sample.steps, config.sample.guidance)
    figures = {name: round(float(found.figures[name]), 5) for name in figures}
    row = {"part": part, "setting": setting, "seed": seed, "overrides": overrides}
    return {**row, "figures": figures, "train_seconds": round(seconds, 1)}


def cores():
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


def settle(free, workers, out):
    """One worker: a core of its own, and compiled programs that the seeds share."""
    number = free.get()
    if hasattr(os, "sched_setaffinity") and workers > 1:
        os.sched_setaffinity(0, {cores()[number % len(cores())]})
    jax.config.update("jax_compilation_cache_dir", os.path.join(out, "compiled"))


def cells(values):
    """Mean and standard error of the rows of `values` [n, figures]."""
    error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.full(values.shape[1], np.nan)
    return " | ".join(f"{mean:.4f} ± {e:.4f}" for mean, e in zip(values.mean(0), error))


def differences(rows, name, names):
    """What a loss changes: its figures minus those of vanilla, for every seed and T that both have, [n, figures]."""
    found = {(row["setting"], row["seed"]): np.array([row["figures"][each] for each in names]) for row in rows}
    pairs = [(setting, (setting[0].replace(name, "vanilla", 1), setting[1])) for setting in found if setting[0].split(",")[0] == name]
    return np.array([found[one] - found[other] for one, other in pairs if other in found])


def table(rows):
    """Mean and standard error over the seeds, as Markdown; for the four losses also the differences of pairs."""
    for part in dict.fromkeys(row["part"] for row in rows):
        chosen = [row for row in rows if row["part"] == part]
        names = list(chosen[0]["figures"])
        print(f"\n| {part} | seeds | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
        for setting in dict.fromkeys(row["setting"] for row in chosen):
            values = np.array([[row["figures"][name] for name in names] for row in chosen if row["setting"] == setting])
            print(f"| {setting} | {len(values)} | {cells(values)} |")
        for name in list(LOSSES)[1:]:
            pairs = differences(chosen, name, names)
            if len(pairs):
                print(f"| {name} minus vanilla, same seed and T | {len(pairs)} | {cells(pairs)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="which parts (default: all three)")
    parser.add_argument("--workers", type=int, default=len(cores()), metavar="N", help="trainings at a time (default: one a core)")
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "runs.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    every = [(seed, *each) for part in args.parts for seed in SEEDS for each in settings() if each[0] == part]
    wanted = {(seed, part, setting): overrides for seed, part, setting, _, overrides in every}
    rows = [row for row in rows if wanted.get((row["seed"], row["part"], row["setting"])) == row["overrides"]]  # not of other values
    done = {(row["seed"], row["part"], row["setting"]) for row in rows}
    todo = [] if args.table else [each for each in every if each[:3] not in done]
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for number in range(args.workers):
        free.put(number)
    pool = ProcessPoolExecutor(args.workers, context, settle, (free, args.workers, str(args.out)))
    try:
        jobs = [pool.submit(run, *each) for each in todo]
        for number, job in enumerate(as_completed(jobs), 1):
            row = job.result()
            rows.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{number}/{len(todo)} {row['part']}: {row['setting']}, seed {row['seed']}: {row['figures']}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    table(rows)


if __name__ == "__main__":
    main()
