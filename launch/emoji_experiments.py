"""DiffDis' claim on real pairs: generation and alignment together against each alone and a CLIP, on emoji, three seeds each.

    python launch/emoji_experiments.py --data data --out runs/emoji_experiments          # everything, or what is missing of it
    python launch/emoji_experiments.py --data data --out runs/emoji_experiments --table  # the tables of what is done so far

The folder that --data names holds emoji64.tar and minilm/ (configs/joint/README.md has the commands that make them).

    weight   on validation data, one seed: both, with three weights of the alignment loss, and three weights of guidance
    tasks    on test data: two towers (CLIP), generation alone, alignment alone, and both with what was chosen by `weight`
    rate     on test data: alignment alone and both at half the learning rate
    noise    on test data: alignment alone without noise (a query of zeros: no diffusion)

The arms of configs/diffdis/README.md's comparison on digit scenes, here with real pictures and MiniLM's vectors of their captions; only
the two towers learn the text encoder, too. All are of equal steps, batch, width and depth, and of one optimizer with the rate of that
comparison. No caption is predicted from a picture, which would be alignment by another name. The results are in configs/diffdis/README.md.

The networks are small and briefly trained: compare them with each other, not with the configs' own metrics.
"""

import dataclasses
import functools
import pathlib

import experiments
import jax
import numpy as np
from diffdis_experiments import without_noise

from mmdiff import config as configs
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import example_keys, in_batches, sample_batched
from mmdiff.projects.emoji.emoji import emoji_source, emoji_tokenizer, evenly
from mmdiff.projects.emoji.emoji_classifiers import ToneClassifier
from mmdiff.training import optim

CONFIGS = pathlib.Path(__file__).parents[1] / "configs/joint"
COUNT = 100  # pictures that are sampled
DRAWS = 4  # of the noise in the held-out loss
TRAIN = {
    "train.steps": "500", "train.global_batch": "32", "train.learning_rate": "1e-2", "train.warmup_steps": "50", "train.ema": "0.99",
    "train.weight_decay": "0.1", "model.width": "64", "model.depth": "2"}
SMALL = {
    **TRAIN, "model.stem": "0", "model.shared": "1", "text_weight": "0.0", "times.joint": "0.0", "times.image_given_text": "0.9",
    "times.text_given_image": "0.0", "times.text_given_noisy": "0.0", "times.image_alone": "0.1", "times.text_alone": "0.0",
    "sample.steps": "6"}
WEIGHTS, GUIDANCE = ("0.02", "0.2", "1.0"), (2.0, 4.0, 6.0)
RATE = "5e-3"  # half of that of all others
WEIGHT, GUIDED = "0.2", 6.0  # chosen on validation data
TASKS = {
    "two towers": ("towers", TRAIN), "generation alone": ("generate", {**SMALL, "tasks": "generate"}),
    "alignment alone": ("align", {**SMALL, "tasks": "align"}), "both": ("both", {**SMALL, "query.weight": WEIGHT})}


def settings():
    """-> (part, name of the setting, what it is run as, overrides)."""
    for weight in WEIGHTS:
        yield "weight", f"both at {weight}", "choose", {**SMALL, "query.weight": weight}
    for name, (kind, overrides) in TASKS.items():
        yield "tasks", name, kind, overrides
        if kind in ("align", "both"):
            yield "rate", f"{name} at {RATE}", kind, {**overrides, "train.learning_rate": RATE}
    yield "noise", "alignment alone, without noise", "without noise", {**SMALL, "tasks": "align"}


@functools.cache
def text_vectors(folder):
    """What makes the captions' vectors, one for all runs of a process: it keeps those that it made."""
    config, module = configs.load(str(CONFIGS / "emoji_diffdis.py"), data_of(folder))
    return module.sentence_vectors(config, emoji_tokenizer(config.data.dir))


def data_of(folder):
    return [("data.dir", f"{folder}/emoji64.tar"), ("text_encoder.path", f"{folder}/minilm")]


def built(name, folder, overrides):
    config, module = configs.load(str(CONFIGS / f"{name}.py"), [*overrides.items(), *data_of(folder)[: 1 if name == "emoji_towers" else 2]])
    module.sentence_vectors = lambda *_: text_vectors(folder)
    return config, module.build(config)


def generation_metrics(experiment, loss, params, config, key, guidance):
    """How well held-out pictures are denoised, and whether those sampled for held-out captions have the tone that these say."""
    held, tone_of = emoji_source(experiment.split, config.data.dir), ToneClassifier(emoji_source("train", config.data.dir))
    every, loss = np.arange(len(held)), jax.jit(loss)
    batch = experiment.test_data().take(every) | {"index": every.astype(np.uint32)}
    metrics = {"image_loss": np.mean([loss(params, batch, jax.random.fold_in(key, draw))[0] for draw in range(DRAWS)])}
    rows = evenly(np.array([row for row, tones in enumerate(held.tones) if len(tones) == 1]), COUNT)
    given, tones = {"text": held.take(rows)["text"]}, np.array([held.tones[row][0] for row in rows])
    for weight in guidance:
        made = sample_batched(experiment, params, key, given, len(rows), batch=50, steps=config.sample.steps, guidance=weight)["image"]
        metrics["sampled_tone" + f"_at_{weight:g}" * (len(guidance) > 1)] = accuracy(tone_of(np.clip(made, -1, 1)), tones)
    return metrics


def run(seed, data, overrides, folder):
    """One training and what it is good for: (metrics, seconds)."""
    overrides = {**overrides, "seed": str(seed)}
    config, experiment = built("emoji_towers" if data == "towers" else "emoji_diffdis", folder, overrides)
    experiment = experiment.on_validation() if data == "choose" else experiment
    aligned, key, metrics = experiment.evaluators[0], jax.random.key(1000 + seed), {}
    if data == "towers":
        experiment = dataclasses.replace(experiment, optimizer=optim.muon(config.train))
    elif data == "without noise":
        experiment, vectors = without_noise(experiment, config, aligned.image_vectors.func)
        aligned = dataclasses.replace(aligned, image_vectors=lambda params, key, images: in_batches(
            vectors, params, example_keys(key, len(images)), images, 250))
    params, seconds = experiments.train(experiment, config)
    if data != "generate":
        metrics |= aligned(experiment, params, config, key, config.train.steps).metrics
    if data in ("generate", "both", "choose"):
        _, alone = built("emoji_diffdis", folder, {**overrides, "tasks": "generate"})
        guidance = GUIDANCE if data == "choose" else (GUIDED,)
        metrics |= generation_metrics(experiment, alone.loss, params, config, key, guidance)
    return metrics, seconds


if __name__ == "__main__":
    every = list(settings())
    bases = {"tasks": "both", "rate": f"both at {RATE}"}
    experiments.main(__doc__, every, run, bases, real=sorted({part for part, *_ in every}), seeds={"weight": (0,)})
