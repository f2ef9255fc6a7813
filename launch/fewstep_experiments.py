"""Which training of average velocities makes the best joint digits in two and four network calls? And how good are three seeds of it?

    python launch/fewstep_experiments.py --out runs/fewstep_experiments --parts settings  # to choose, on validation data
    python launch/fewstep_experiments.py --out runs/fewstep_experiments --parts trained   # the same, trained to the end
    python launch/fewstep_experiments.py --out runs/fewstep_experiments --parts whole     # to report
    python launch/fewstep_experiments.py --out runs/fewstep_experiments --table           # the tables of what is done so far

    settings  1,200 steps of configs/digits_fewstep.py without rotary positions, with an adaptive weight of power 0.5, and the same with one
              value changed: the power, the share of examples with s = t, the guidance that is trained in; on validation data
    trained   the config as it is, without rotary positions, and for twice the steps; seed 0, on validation data
    whole     the config as it is: on validation and, as `_test`, on test data

All measure the agreement and the Fréchet ratio of joint samples, as the config's `eval` does but of two sets of samples (`whole`: four),
the ratios of two and four calls over that of 25 Heun steps of the same weights (`over_heun`), and the label accuracy. A training of
`settings` takes 4 minutes of one core, of `trained` 12 to 35, of `whole` 12. The results are in configs/README.md.
"""

import dataclasses
import pathlib

import experiments
import jax
import numpy as np

from mmdiff import config as configs
from mmdiff.data.sources import load_all
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import best, predict_batched
from mmdiff.evals.joint_calls import JointCalls
from mmdiff.projects.digits import digit_pairs

CONFIG = pathlib.Path(__file__).parents[1] / "configs/digits_fewstep.py"
SHORT = {"train.steps": "1200", "model.rope": "false"}
ADAPTIVE = {"span.power": "0.5", "image_weight": "0.5"}
MOST = 4  # sets of samples of one training, each as many as there are training images
SETTINGS = {
    "power 0.5": ADAPTIVE,
    "power 0": {"span.power": "0.0", "image_weight": "1.0"},
    "power 1": {**ADAPTIVE, "span.power": "1.0"},
    "a quarter at s = t": {**ADAPTIVE, "span.equal": "0.25"},
    "guidance 1.15": {**ADAPTIVE, "span.guidance": "1.15"},
    "guidance 1.5": {**ADAPTIVE, "span.guidance": "1.5"},
}
TRAINED = {"the config": {}, "no rotary positions": {"model.rope": "false"}, "6,400 steps": {"train.steps": "6400"}}


def settings():
    """-> (part, name of the setting, what is measured, overrides), each to be run with every seed."""
    for name, overrides in SETTINGS.items():
        yield "settings", name, "validation", {**SHORT, **overrides}
    for name, overrides in TRAINED.items():
        yield "trained", name, "validation", overrides
    yield "whole", "the config", "both", {}


def judge(experiment):
    """The judge of the config's joint samples, by validation and, as `_test`, by test data."""
    (count, chosen), (_, reported) = (digit_pairs.judge(each) for each in (experiment.on_validation(), experiment))
    return count, lambda pairs: {**chosen(pairs), **{f"{name}_test": found for name, found in reported(pairs).items()}}


def measure(experiment, config, params, seed, sets):
    """The metrics of joint samples, by the samplers that the config compares, means of several sets, and the label accuracy."""
    calls = next(each for each in experiment.evaluators if isinstance(each, JointCalls))
    calls = dataclasses.replace(calls, judge=judge)
    keys = [jax.random.key(MOST * seed + number) for number in range(sets)]
    found = [calls(experiment, params, config, key, config.train.steps).metrics for key in keys]
    metrics = {name: np.mean([each[name] for each in found]) for name in found[0]}
    for split, held in (("", experiment.validation_data()), ("_test", experiment.test_data())):
        heun = metrics[f"joint_frechet_ratio{split}_by_25_heun_steps"]
        metrics |= {f"over_heun{split}_at_{n}_calls": metrics[f"joint_frechet_ratio{split}_at_{n}_calls"] / heun for n in (2, 4)}
        held = load_all(held)
        options = {"image": held["image"]}, "label", config.eval.batch
        read = best("p(label | image)", predict_batched(experiment, params, jax.random.key(seed), *options))
        metrics[f"label_accuracy{split}"] = accuracy(read, held["label"])
    return metrics


def run(seed, data, overrides):
    """One training and how good its samples are: (metrics, seconds)."""
    config, module = configs.load(str(CONFIG), [*overrides.items(), ("seed", str(seed))])
    experiment = module.build(config)
    params, seconds = experiments.train(experiment, config)
    metrics = measure(experiment, config, params, seed, 2 if data == "validation" else MOST)
    return {name: value for name, value in metrics.items() if data == "both" or "_test" not in name}, seconds


if __name__ == "__main__":
    experiments.main(__doc__, list(settings()), run, {"settings": "power 0.5", "trained": "the config"}, seeds={"trained": (0,)})
