"""Does the contrast of CDCD help? Compares losses, numbers of steps and weights on data whose law is known, and on the digits.

    python launch/cdcd_experiments.py --out runs/cdcd_experiments          # everything, or what is missing of it
    python launch/cdcd_experiments.py --out runs/cdcd_experiments --table  # the tables of what is done so far

Three parts, three seeds each:

    markov   markov_class: vanilla, Step-Intra, Sample-Inter and both, for chains of T = 20 to 120 steps, as many network calls
    digits   digits_class: the same on the digits
    weight   markov_class, T = 80: the weight of the contrast up to a thousand times the released one, and the bounded forms

Cost, measured on cores shared with other work: markov, 72 trainings, 40 minutes on two cores; digits, 72, 95 minutes on one; weight, 24, 30
minutes on one. All of it takes some hour and a half on two quiet cores.

The networks and trainings are small: compare the losses with each other, not with the configs' own metrics.
"""

import dataclasses
import pathlib

import experiments
import jax
import numpy as np

from mmdiff import config as configs
from mmdiff.data.sources import ArraySource

CONFIGS = pathlib.Path(__file__).parents[1] / "configs/cdcd"
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


def settings():
    """-> (part, name of the setting, data, overrides), each to be run with every seed."""
    for data, (_, small, _) in SETS.items():
        for steps in (20, 40, 60, 80, 100, 120):
            for name, loss in LOSSES.items():
                yield data, f"{name}, T={steps}", data, {**small, **loss, "chain.steps": str(steps), "sample.steps": str(steps)}
    for scale in (100.0, 1000.0):
        for name, key, weight in (("step-intra", "loss.step_intra", 5e-5), ("sample-inter", "loss.sample_inter", 5e-6)):
            yield "weight", f"{name}, linear, x{scale:g}", "markov", {**MARKOV, **LOSSES["vanilla"], key: str(weight * scale)}
    # Temperatures that make scores of whole sequences of 32 tokens: a step's KL times T = 80 per token, and a cross-entropy per token.
    for form in ("weighted", "infonce"):
        for name, key, temperature in (("step-intra", "loss.step_intra", 80 / 32), ("sample-inter", "loss.sample_inter", 1 / 32)):
            overrides = {**MARKOV, **LOSSES["vanilla"], key: "0.01", "form": form, "temperature": str(temperature)}
            yield "weight", f"{name}, {form}, weight 0.01", "markov", overrides


def run(seed, data, overrides):
    """One training and what its samples are like: (metrics, seconds)."""
    name, _, metrics = SETS[data]
    config, module = configs.load(str(CONFIGS / f"{name}.py"), [*overrides.items(), ("seed", str(seed))])
    experiment = module.build(config)
    params, seconds = experiments.train(experiment, config)
    # As many samples as the sources that the evaluator is shown have examples; the bound on the likelihood would take longer than all else.
    few = [ArraySource(source.take(np.arange(SAMPLES))) for source in (experiment.train_data(), experiment.test_data())]
    experiment = dataclasses.replace(experiment, train_data=lambda: few[0], test_data=lambda: few[1])
    found = experiment.evaluators[0].samples(
        experiment, params, jax.random.key(1000 + seed), config.sample.steps, config.sample.guidance)
    return {name: found.metrics[name] for name in metrics}, seconds


if __name__ == "__main__":
    experiments.main(__doc__, list(settings()), run, {"markov": "vanilla", "digits": "vanilla"})
