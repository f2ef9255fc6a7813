"""Does the contrast of CDCD help on tokens of real images, more than guidance does? Its weights are chosen on validation data.

    python launch/cdcd_tokens_experiments.py --data data --out runs/cdcd_tokens          # everything, or what is missing of it
    python launch/cdcd_tokens_experiments.py --data data --out runs/cdcd_tokens --table  # the tables of what is done so far

The folder that --data names holds emoji64.tar and, in fashion-mnist/, the four files of clothes; with one of them alone choose its part,
--parts emoji-weights. The token caches are those of configs/cdcd/emoji_text.py and configs/fashion/vq_class.py, by the commands at their
heads. These two configs are trained here in small, T = 80, and each data set has two parts:

    emoji-weights, fashion-weights  vanilla, Step-Intra and Sample-Inter at multiples of the released weights, one seed, on validation data
    emoji, fashion                  vanilla, each contrast at the weight with the smallest lite0-FD of 40 calls there, and both contrasts at
                                    these weights, three seeds, on test data

Every network is sampled without guidance in 40 and in 10 calls, and with guidance in 10. Measured are, of clothes, `agreement`, the share
of the samples to which a classifier of real images gives their class; of emoji `sampled_tone` and `sampled_category` (`CaptionedEmoji`); of
both `lite0-FD`, the distance of the samples to all real images of the split, of emoji to the pictures that have the captions; and
`nats_per_token`, the bound of ten steps on -log p(tokens given the class or the caption). What ends in `_reconstructed` and `_real` is of
the tokenizer's reconstructions and of real images in the place of samples. The last tables have every network without guidance against
vanilla with it. The results are in configs/fashion/README.md and configs/cdcd/README.md.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping

import experiments
import jax
import numpy as np

from mmdiff import config as configs
from mmdiff.data.sources import Subset, load_all
from mmdiff.evals.evaluator import Clock, sample_batched
from mmdiff.evals.likelihood import held_out_bits
from mmdiff.evals.sample_metrics import DEFAULT, NETWORKS, collect, compare
from mmdiff.projects.emoji.captioned_emoji import CaptionedEmoji
from mmdiff.projects.fashion.fashion_metrics import CLASSES, FashionPairs, network

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SMALL = {
    "model.width": "64", "model.depth": "2", "train.global_batch": "16", "train.learning_rate": "6e-3", "train.warmup_steps": "50",
    "train.ema": "0.98", "train.weight_decay": "0.05", "loss.count": "2", "sample.top_p": "1.0"}  # fmt: skip
RELEASED = {"step-intra": ("loss.step_intra", 5e-5), "sample-inter": ("loss.sample_inter", 5e-6)}
SCALES = (1, 300, 1000)  # of the released weights
SAMPLERS = ((40, 1.0), (10, 1.0), (10, 1.5), (10, 2.0))  # calls, guidance
DISTANCE = NETWORKS[DEFAULT].distance
CHOSEN_BY = f"{DISTANCE}_at_40_calls"
SAMPLES, HELD_OUT, CLASSIFIER_STEPS, BATCH = 500, 500, 300, 100


def clothes(experiment, folder):
    """What is measured of clothes sampled for labels, as many of every class: (`(sample, key) -> metrics`, the limits)."""
    _, judged = FashionPairs(folder, SAMPLES, CLASSIFIER_STEPS, target="tokens")(experiment)
    asked, real = {"label": np.arange(SAMPLES, dtype=np.int32) % CLASSES}, Subset(experiment.test_data(), SAMPLES)

    def found(pairs, suffix=""):
        return {name.removeprefix("joint_") + suffix: value for name, (value, _) in judged(pairs).items()}

    return lambda sample, key: found(sample(key, asked, SAMPLES)), found(load_all(real), "_reconstructed")


def emoji(experiment, file):
    """The same of emoji sampled for captions of held-out pairs and of training pictures."""
    captioned, encoder, clock = CaptionedEmoji(file, "tokens", SAMPLES // 2, CLASSIFIER_STEPS), network(), Clock()
    real = collect(encoder, [each.real for each in captioned.asked(experiment.split)], keep=False)

    def distance(pictures):
        return compare(DEFAULT, collect(encoder, pictures, keep=False), real)[0][DISTANCE]

    def measure(sample, key):
        pictures = captioned.sample(experiment, sample, jax.random.split(key), clock)
        return captioned.measure(experiment, pictures, clock).metrics | {DISTANCE: distance(pictures)}

    limits = captioned.limits(experiment).metrics
    return measure, limits | {f"{DISTANCE}_reconstructed": distance(captioned.reconstructed(experiment))}


@dataclasses.dataclass(frozen=True)
class Data:
    """What differs between the data sets.

    Attributes:
      config: the model's, in configs/.
      source: its data, in the folder that --data names.
      measured: `(experiment, source) -> ((sample, key) -> metrics, limits)`.
      training: what the config's trainings are shortened to.
    """

    config: str
    source: str
    measured: Callable
    training: Mapping[str, str]


DATA = {
    "emoji": Data("cdcd/emoji_text.py", "emoji64.tar", emoji, {"train.steps": "600", "text.width": "64"}),
    "fashion": Data("fashion/vq_class.py", "fashion-mnist", clothes, {"train.steps": "400"}),
}


def setting(part, name, split, **scales):
    """(part, name, (name of the data, split), overrides) of a loss with contrasts at multiples of their released weights."""
    called = " and ".join(f"{contrast} x{scale:g}" for contrast, scale in scales.items()) or "vanilla"
    weights = {key: f"{weight * scales.get(contrast, 0):g}" for contrast, (key, weight) in RELEASED.items()}
    return part, called, (name, split), {**SMALL, **DATA[name].training, **weights}


def weights():
    """The settings that are compared on validation data."""
    for name in DATA:
        for scales in ({}, *({contrast: scale} for contrast in RELEASED for scale in SCALES)):
            yield setting(f"{name}-weights", name, "validation", **scales)


def reported(rows):
    """The settings that are reported on test data, by the rows of `weights`; of a data set none while one of its rows is missing."""
    for name in DATA:
        distances = {row["setting"]: row["metrics"][CHOSEN_BY] for row in rows if row["part"] == f"{name}-weights"}
        if {called for part, called, *_ in weights() if part == f"{name}-weights"} <= set(distances):
            best = {contrast: min(SCALES, key=lambda scale: distances[f"{contrast} x{scale:g}"]) for contrast in RELEASED}
            for scales in ({}, *({contrast: scale} for contrast, scale in best.items()), best):
                yield setting(name, name, "test", **scales)


def run(seed, data, overrides, folder):
    """One training and what its samples are like: (metrics, seconds)."""
    name, split = data
    config, module = configs.load(
        str(CONFIGS / DATA[name].config), [*overrides.items(), ("seed", str(seed)), ("data.dir", f"{folder}/{DATA[name].source}")])
    experiment = module.build(config)
    experiment = experiment.on_validation() if split == "validation" else experiment
    measure, metrics = DATA[name].measured(experiment, config.data.dir)  # its data are opened before anything is paid for
    params, seconds = experiments.train(experiment, config)
    for calls, guidance in SAMPLERS:
        sample = functools.partial(sample_batched, experiment, params, batch=BATCH, steps=calls, guidance=guidance)
        suffix = f"_at_{calls}_calls" + f"_guidance_{guidance:g}" * (guidance != 1)
        metrics |= {f"{metric}{suffix}": value for metric, value in measure(sample, jax.random.key(1000 + seed)).items()}
    held = load_all(Subset(experiment.test_data(), HELD_OUT))
    bits = held_out_bits(experiment, params, jax.random.key(2000 + seed), held, "tokens", SAMPLERS[-1][0], BATCH)
    return {**metrics, "nats_per_token": bits.mean() * np.log(2)}, seconds


def against_guidance(rows):
    """(rows, bases) of tables that compare, in as many calls, every network without guidance with vanilla guided by each weight."""
    found, (calls, _) = [], SAMPLERS[-1]
    for row in rows:
        for guidance in (weight for _, weight in SAMPLERS if weight != 1):
            end = f"_at_{calls}_calls" + f"_guidance_{guidance:g}" * (row["setting"] == "vanilla")
            metrics = {name.removesuffix(end): value for name, value in row["metrics"].items() if name.endswith(end)}
            found.append({**row, "part": f"{row['part']}, vanilla alone with guidance {guidance:g}", "metrics": metrics})
    found.sort(key=lambda row: row["part"])
    return found, {row["part"]: "vanilla" for row in found}


if __name__ == "__main__":
    parts = [f"{name}-weights" for name in DATA]
    bases = dict.fromkeys([*parts, *DATA], "vanilla")
    rows = experiments.main(__doc__, list(weights()), run, bases, parts, dict.fromkeys(parts, (0,)), reported)
    experiments.table(*against_guidance([row for row in rows if row["part"] in DATA]))
