"""Which training of average velocities makes the best joint digits in two and four network calls? And how good are three seeds of it?

    python launch/fewstep_experiments.py --out runs/fewstep_experiments --parts settings  # to choose, on validation data
    python launch/fewstep_experiments.py --out runs/fewstep_experiments --parts whole     # to report
    python launch/fewstep_experiments.py --out runs/fewstep_experiments --table           # the tables of what is done so far

    settings  1,200 steps of configs/digits_fewstep.py with an adaptive weight of power 0.5, and the same with one value changed: the power,
              the share of examples with s = t, the guidance that is trained in; on validation data
    whole     the config as it is: on validation and, as `_test`, on test data

Both measure the agreement and the Fréchet ratio of joint samples, as the config's `eval` does but of two sets of samples, the ratios of two
and four calls over that of 25 Heun steps of the same weights (`over_heun`), and the label accuracy. A training of `settings` takes 4
minutes of one core, of `whole` 10. The results are in configs/README.md.
"""

import pathlib

import experiments
import jax
import numpy as np

from mmdiff import config as configs
from mmdiff.data.sources import load_all
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import best, predict_batched
from mmdiff.evals.joint_calls import JointCalls

CONFIG = pathlib.Path(__file__).parents[1] / "configs/digits_fewstep.py"
SHORT = {"train.steps": "1200"}
ADAPTIVE = {"span.power": "0.5", "image_weight": "0.5"}
SETS = 2  # of samples, each as many as there are training images
SETTINGS = {
    "power 0.5": ADAPTIVE,
    "power 0": {"span.power": "0.0", "image_weight": "1.0"},
    "power 1": {**ADAPTIVE, "span.power": "1.0"},
    "a quarter at s = t": {**ADAPTIVE, "span.equal": "0.25"},
    "guidance 1.15": {**ADAPTIVE, "span.guidance": "1.15"},
    "guidance 1.5": {**ADAPTIVE, "span.guidance": "1.5"},
}


def settings():
    """-> (part, name of the setting, what is measured, overrides), each to be run with every seed."""
    for name, overrides in SETTINGS.items():
        yield "settings", name, "validation", {**SHORT, **overrides}
    yield "whole", "the config", "both", {}


def measure(experiment, config, params):
    """The metrics of joint samples, by the samplers that the config compares, and of the labels of the images in `test_data`."""
    calls = next(each for each in experiment.evaluators if isinstance(each, JointCalls))
    sets = [calls(experiment, params, config, jax.random.key(seed), config.train.steps).metrics for seed in range(SETS)]
    found = {name: np.mean([each[name] for each in sets]) for name in sets[0]}
    for steps in (2, 4):
        ratio = found[f"joint_frechet_ratio_at_{steps}_calls"]
        found[f"over_heun_at_{steps}_calls"] = ratio / found["joint_frechet_ratio_by_25_heun_steps"]
    held = load_all(experiment.test_data())
    options = {"image": held["image"]}, "label", config.eval.batch
    read = best("p(label | image)", predict_batched(experiment, params, jax.random.key(0), *options))
    return {**found, "label_accuracy": accuracy(read, held["label"])}


def run(seed, data, overrides):
    """One training and how good its samples are: (metrics, seconds)."""
    config, module = configs.load(str(CONFIG), [*overrides.items(), ("seed", str(seed))])
    experiment = module.build(config)
    params, seconds = experiments.train(experiment, config)
    metrics = measure(experiment.on_validation(), config, params)
    if data == "both":
        metrics |= {f"{name}_test": value for name, value in measure(experiment, config, params).items()}
    return metrics, seconds


if __name__ == "__main__":
    experiments.main(__doc__, list(settings()), run, {"settings": "power 0.5"})
