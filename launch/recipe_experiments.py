"""Which fields of the network's recipe help on the digits? Each against the default by validation loss and samples, three seeds.

    python launch/recipe_experiments.py --out runs/recipe [--parts small whole trained] [--workers N]

The model of configs/digits_joint.py with one field of `DiffusionTransformer` changed, or with those of LightningDiT and JiT together:

    small    half as wide and half as deep, 400 steps in place of 3,200, all else as there
    whole    the network as it is, 500 steps
    trained  the config as it is, all its steps: the default and rotary positions

Measured of the averaged weights, on validation data:

    loss, image, label     the training's loss and its two terms, mean over `DRAWS` times and noises of each of the 200 images, which
                           are the same for all settings of a seed
    label accuracy         argmax p(label | image), one call
    agreement, ratio       1,097 joint samples by the config's sampler: does an SVM see the label; Fréchet ratio
    parameters, seconds    of the network, and of the training

Found: configs/README.md; a run takes 20 seconds of a shared core, one of `whole` 45, of `trained` 7 minutes.
"""

import pathlib

import experiments
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config as configs
from mmdiff.data.sources import load_all
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import predict_batched
from mmdiff.evals.joint_calls import JointCalls
from mmdiff.projects.digits.digit_pairs import judge

CONFIG = pathlib.Path(__file__).parents[1] / "configs/digits_joint.py"
DRAWS = 16
PARTS = {
    "small": {"model.width": "48", "model.depth": "2", "train.steps": "400"},
    "whole": {"train.steps": "500"},
    "trained": {},
}
BASE = "default"
FIELDS = {
    BASE: {},
    'norm="rms"': {"norm": "rms"},
    'mlp="swiglu"': {"mlp": "swiglu"},
    "rope=True": {"rope": True},
    "qk_norm=True": {"qk_norm": True},
    "shared_adaln=True": {"shared_adaln": True},
    "shift=False": {"shift": False},
    "rms swiglu rope qk_norm": {"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True},
}
TRAINED = (BASE, "rope=True")


def run(seed, data, overrides):
    """One training: (metrics, seconds)."""
    config, module = configs.load(str(CONFIG), [*overrides["config"].items(), ("seed", str(seed))])
    with config.unlocked():
        config.model.update(overrides["model"])
    experiment = module.build(config)
    params, seconds = experiments.train(experiment, config)
    held_out, loss = load_all(experiment.validation_data()), jax.jit(experiment.loss)
    batch = {**held_out, "index": jnp.arange(len(held_out["label"]), dtype=jnp.uint32)}
    draws = [loss(params, batch, jax.random.fold_in(jax.random.key(seed), draw)) for draw in range(DRAWS)]
    terms = [{"loss": value, **metrics} for value, metrics in jax.device_get(draws)]
    key = jax.random.key(1000 + seed)
    predicted = predict_batched(experiment, params, key, {"image": held_out["image"]}, "label", 200)
    calls = JointCalls({"": (experiment.sampler, int(config.sample.steps))}, judge)
    samples = calls(experiment.on_validation(), params, config, key, config.train.steps).metrics
    names = {"loss": "loss", "image": "loss/image", "label": "loss/label"}
    metrics = {
        **{name: np.mean([each[full] for each in terms]) for name, full in names.items()},
        "label accuracy": accuracy(predicted.argmax(-1), held_out["label"]),
        "agreement": samples["joint_agreement_"], "ratio": samples["joint_frechet_ratio_"],
        "parameters": sum(x.size for x in jax.tree.leaves(params)), "seconds": seconds}
    return metrics, seconds


def settings():
    """-> (part, name, data, overrides)."""
    for part, config in PARTS.items():
        for name, fields in FIELDS.items():
            if part == "trained" and name not in TRAINED:
                continue
            yield part, name, "digits_joint", {"config": config, "model": fields}


if __name__ == "__main__":
    experiments.main(__doc__, list(settings()), run, dict.fromkeys(PARTS, BASE))
