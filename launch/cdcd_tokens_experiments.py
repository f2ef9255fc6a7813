"""Does the contrast of CDCD help on tokens of real images, and does it save steps? Its weights are chosen on validation data.

    python -m mmdiff train --config configs/fashion/vq_tokenizer.py --workdir runs/fashion_tokenizer --config.data.dir=FOLDER
    python -m mmdiff cache --config configs/fashion/vq_tokenizer.py --workdir runs/fashion_tokenizer --out runs/fashion_tokens
    python launch/cdcd_tokens_experiments.py --data FOLDER --out runs/cdcd_tokens          # everything, or what is missing of it
    python launch/cdcd_tokens_experiments.py --data FOLDER --out runs/cdcd_tokens --table  # the tables of what is done so far

FOLDER is that of configs/fashion/vq_class.py, which is trained here in small, T = 80, and sampled without guidance in 10 and in 40 calls:

    fashion-weights  vanilla, Step-Intra and Sample-Inter at multiples of the released weights, one seed, on validation data
    fashion          vanilla, and each contrast at the weight with the smallest lite0-FD of 40 calls there, three seeds, on test data

Measured are `agreement`, the share of the samples to which a classifier of real images gives their class; `lite0-FD`, their distance to
all real images of the split; and `nats_per_token`, the bound of ten steps on -log p(tokens given the class). The results are in
configs/fashion/README.md.
"""

import pathlib

import experiments
import jax
import numpy as np

from mmdiff import config as configs
from mmdiff.evals.evaluator import sample_batched
from mmdiff.evals.likelihood import held_out_bits
from mmdiff.projects.fashion.fashion import fashion_source
from mmdiff.projects.fashion.fashion_metrics import CLASSES, FashionPairs

CONFIG = pathlib.Path(__file__).parents[1] / "configs/fashion/vq_class.py"
SMALL = {
    "model.width": "64", "model.depth": "2", "train.steps": "400", "train.global_batch": "16", "train.learning_rate": "6e-3",
    "train.warmup_steps": "50", "train.ema": "0.98", "loss.count": "2", "sample.guidance": "1.0"}  # fmt: skip
RELEASED = {"step-intra": ("loss.step_intra", 5e-5), "sample-inter": ("loss.sample_inter", 5e-6)}
SCALES = (1, 1000)  # of the released weights
CALLS = (10, 40)
SAMPLES, HELD_OUT, CLASSIFIER_STEPS, BATCH = 500, 500, 300, 250


def setting(part, split, **scales):
    """(part, name, data, overrides) of a loss with contrasts at multiples of their released weights."""
    name = " and ".join(f"{contrast} x{scale:g}" for contrast, scale in scales.items()) or "vanilla"
    weights = {key: f"{weight * scales.get(contrast, 0):g}" for contrast, (key, weight) in RELEASED.items()}
    return part, name, split, {**SMALL, **weights}


def weights():
    """The settings that are compared on validation data."""
    for scales in ({}, *({contrast: scale} for contrast in RELEASED for scale in SCALES)):
        yield setting("fashion-weights", "validation", **scales)


def reported(rows):
    """The settings that are reported on test data, by the rows of `weights`; none while one of these is missing."""
    distances = {row["setting"]: row["metrics"][f"lite0-FD_at_{max(CALLS)}_calls"] for row in rows}
    if {name for _, name, *_ in weights()} <= set(distances):
        best = {contrast: min(SCALES, key=lambda scale: distances[f"{contrast} x{scale:g}"]) for contrast in RELEASED}
        for scales in ({}, *({contrast: scale} for contrast, scale in best.items())):
            yield setting("fashion", "test", **scales)


def run(seed, split, overrides, folder):
    """One training and what its samples are like: (metrics, seconds)."""
    config, module = configs.load(str(CONFIG), [*overrides.items(), ("seed", str(seed)), ("data.dir", folder)])
    experiment = module.build(config)
    fashion_source(split, folder)  # before anything is paid for
    params, seconds = experiments.train(experiment, config)
    experiment = experiment.on_validation() if split == "validation" else experiment
    _, judged = FashionPairs(folder, SAMPLES, CLASSIFIER_STEPS, target="tokens")(experiment)
    asked, metrics = {"label": np.arange(SAMPLES, dtype=np.int32) % CLASSES}, {}
    for calls in CALLS:
        options = {"batch": BATCH, "steps": calls, "guidance": config.sample.guidance}
        found = judged(sample_batched(experiment, params, jax.random.key(1000 + seed), asked, SAMPLES, **options))
        metrics |= {f"{name.removeprefix('joint_')}_at_{calls}_calls": value for name, (value, _) in found.items()}
    held = experiment.test_data()
    held = held.take(np.arange(HELD_OUT) * len(held) // HELD_OUT)
    bits = held_out_bits(experiment, params, jax.random.key(2000 + seed), held, "tokens", min(CALLS), BATCH)
    return {**metrics, "nats_per_token": bits.mean() * np.log(2)}, seconds


if __name__ == "__main__":
    chosen = "fashion-weights"
    experiments.main(__doc__, list(weights()), run, {chosen: "vanilla", "fashion": "vanilla"}, [chosen], {chosen: (0,)}, reported)
