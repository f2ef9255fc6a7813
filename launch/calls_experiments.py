"""How few network calls do samples of a trained joint model need? Solvers against calls, for one run, on validation data.

    python -m mmdiff train --config configs/digits_joint.py --workdir runs/digits_joint
    python launch/calls_experiments.py --workdir runs/digits_joint --seeds 3

The weights, the noise of a seed, guidance and its interval are the same in every row; Heun of N steps makes 2N - 1 network calls, DDIM,
DPM-Solver++(2M) and UniPC make N. Measured, as `mmdiff eval --split validation` does:

    joint agreement, joint ratio      pairs sampled together: does an SVM see the label; Fréchet ratio to the validation images
    agreement, accuracy score, ratio  images of given labels: `conditional_agreement`, `classification_accuracy_score`, `frechet_ratio`

Found: configs/README.md.
"""

import argparse
import pathlib
import sys

import experiments
import jax
import solver_experiments

from mmdiff.data.sources import load_all
from mmdiff.evals.evaluator import sample_batched
from mmdiff.projects.digits import conditional, digit_pairs
from mmdiff.runs import open_run

CONFIG = pathlib.Path(__file__).parents[1] / "configs/digits_joint.py"
REFERENCE = "25 Heun steps"
ROWS = {REFERENCE: ("heun", 25), "12 Heun steps": ("heun", 12), "6 Heun steps": ("heun", 6)}
ROWS |= {f"{steps} steps of {name}": (name.lower(), steps) for name, steps in (
    ("UniPC", 15), ("UniPC", 10), ("UniPC", 6), ("2M", 10), ("DDIM", 10))}


def measure(run, seeds, rows, batch=250, per_class=100):
    """-> rows as `experiments.table` reads them."""
    train, validation = load_all(run.experiment.train_data()), load_all(run.experiment.validation_data())
    quantize, guidance = run.experiment.modalities["image"].quantize, float(run.config.sample.guidance)
    real, held_out = ((data["image"], data["label"]) for data in (train, validation))
    classes = run.experiment.modalities["label"].count
    asked = conditional.labels_to_ask(train["label"], classes, per_class)
    count, judged = digit_pairs.judge(run.experiment.on_validation())
    experiments_by = {solver: solver_experiments.by(run.experiment, solver) for solver, _ in rows.values()}
    found = []
    for seed in range(seeds):
        for name, (solver, steps) in rows.items():
            experiment = experiments_by[solver]

            def sample(kind, given, count):
                key = jax.random.fold_in(jax.random.key(seed), kind)
                options = {"batch": batch, "steps": steps, "guidance": guidance}
                return sample_batched(experiment, run.params, key, given, count, **options)

            pairs = judged(sample(0, {}, count))
            of_labels = quantize(sample(1, {"label": asked}, len(asked))["image"])
            given = conditional.measure(of_labels, asked, real, held_out, classes, per_class)
            metrics = {
                "calls": 2 * steps - 1 if solver == "heun" else steps,
                "joint agreement": pairs["joint_agreement"][0], "joint ratio": pairs["joint_frechet_ratio"][0],
                "agreement": given.metrics["conditional_agreement"],
                "accuracy score": given.metrics["classification_accuracy_score"],
                "ratio": given.metrics["frechet_ratio"],
            }
            found.append({"part": "sampler", "setting": name, "seed": seed, "metrics": metrics})
            print(f"seed {seed}, {name}: {({each: round(float(value), 4) for each, value in metrics.items()})}", file=sys.stderr)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, metavar="DIR", help="of the run")
    parser.add_argument("--config", default=CONFIG, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of the samples (default: 3)")
    args = parser.parse_args()
    run = open_run(args.config, args.workdir, {"sample.heun": True})
    experiments.table(measure(run, args.seeds, ROWS), {"sampler": REFERENCE})
