"""What does aggregation bring, and what does it cost the images? MT-Diffusion and its parts on the digits, three seeds each.

    python launch/mtdiffusion_experiments.py --out runs/mtdiffusion_experiments          # everything, or what is missing of it
    python launch/mtdiffusion_experiments.py --out runs/mtdiffusion_experiments --table  # the tables of what is done so far

    encoder     digits_label: the label's encoder, which is the network's belief about the class, the class's mean image, or none (w = 0)
    label       digits_label: DDPM (A0), a head without aggregation (A1), aggregation without a head (A2), both (A3), against a Joint
                with independent times; the other head, modality drop, the weights kappa and lambda
    masked      digits_masked: the plain conditional model (A4) and the full model (A5)
    transition  digits_transition: the plain conditional models of both directions, and the full model

Cost: 54 trainings. One takes 40 to 90 seconds on a quiet core, as many again for samples and metrics: some 50 minutes on two cores.
Measured in parts, on cores shared with other work.

All networks of a part are equal, and so is what they are trained for; they and the trainings are small: compare the settings with each
other, not with the configs' own metrics.
"""

import dataclasses
import functools
import pathlib

import experiments
import jax

from mmdiff import config as configs
from mmdiff import losses, sampling, times
from mmdiff.data.sources import load_all
from mmdiff.evals.accuracy import accuracy, denoising_losses
from mmdiff.evals.evaluator import example_keys, in_batches, predict_batched, sample_batched
from mmdiff.evals.frechet import frechet_ratio
from mmdiff.processes import Joint, absorbing
from mmdiff.projects.digits import classifiers, conditional

CONFIGS = pathlib.Path(__file__).parents[1] / "configs/mtdiffusion"
SMALL = {
    "model.width": "64", "model.depth": "2", "train.steps": "800", "train.learning_rate": "6e-3", "train.weight_decay": "0.3",
    "train.warmup_steps": "50", "train.ema": "0.99", "sample.steps": "10"}  # fmt: skip


def shares(**times):
    return {f"times.{name}": str(value) for name, value in times.items()}


LABEL = {"sample.guidance": "1.0", "sample.settle": "0.5"}
ENCODERS = {"none": {"kappa": "0.0"}, "mean image": {"encoder": "mean"}, "network": {}}
LABELS = {
    "DDPM": {"kappa": "0.0", "task": "generate"},
    "head alone": {"kappa": "0.0"},
    "aggregation alone": {"label_weight": "0.0", **shares(hidden=0.3, known=0.3, absent=0.4, clean=0)},
    "aggregation and head": {},
    "joint with independent times": {"kappa": "0.0"},
    "no modality drop": shares(hidden=0.5, known=0.5, absent=0, clean=0),
    "head on the output": {"model.head": "output"},
    "kappa 0.25": {"kappa": "0.25"},
    "lambda 0.01": {"label_weight": "0.01"},
    "lambda 1": {"label_weight": "1.0"},
}
# What a setting is run as: without a head that tells labels, with another process, with other estimates of labels in sampling.
DATA = {
    "DDPM": "no head", "aggregation alone": "no head", "joint with independent times": "joint", "aggregation and head": "estimates",
}  # fmt: skip
PLAIN = {"kappa": "0.0", "head_weight": "0.0"}
VARIANTS = {
    "masked": {
        "plain conditional": {**PLAIN, **shares(known=0.8, hidden=0, absent=0.2)},
        "aggregation and head": shares(known=0.7, hidden=0.1, absent=0.2),
    },
    "transition": {
        "plain from the other to the image": {**PLAIN, **shares(known=0.9, hidden=0, absent=0.1, clean=0)},
        "plain from the image to the other": {"kappa": "0.0", **shares(known=0, hidden=0, absent=0, clean=1)},
        "aggregation and head": {},
    },
}
SIZES = {"masked": {"eval.draws": "4"}, "transition": {"train.steps": "2000"}}  # scenes take longer to learn than digits
METRICS = {
    "masked": (
        "hidden_error/5", "hidden_error/20", "perceptual/5", "perceptual/20", "seen_error/5", "frechet_ratio", "frechet_ratio_absent"),
    "transition": None,  # all
}


def settings():
    """-> (part, name of the setting, data, overrides), each to be run with every seed."""
    for name, overrides in ENCODERS.items():
        yield "encoder", name, "label", {**SMALL, **LABEL, **overrides}
    for name, overrides in LABELS.items():
        data = DATA.get(name, "label")
        yield "label", name, data, {**SMALL, **LABEL, **overrides}
    for part, each in VARIANTS.items():
        for name, overrides in each.items():
            yield part, name, part, {**SMALL, **SIZES[part], **overrides}


def independent(other, shares):
    """The times of a `Joint`, in the place of `times.multitask`: where that is hidden, the other modality has a time of its own."""
    noisy, known, absent = times.uniform(), times.constant(0.0), times.constant(1.0)
    return times.mixture(
        (shares.hidden, times.joint(image=noisy, **{other: noisy})),
        (shares.known, times.joint(image=noisy, **{other: known})),
        (shares.absent, times.joint(image=noisy, **{other: absent})),
        (shares.clean, times.joint(image=known, **{other: absent})))


def as_joint(experiment, config):
    """The experiment with a `Joint` in the place of the `Aggregate`: the label has a time of its own, or a few are pinned."""
    process, noise_levels = Joint(image=experiment.process.chain, label=absorbing(10)), independent("label", config.times)
    return dataclasses.replace(
        experiment, process=process,
        loss=losses.diffusion(process, experiment.apply, noise_levels, losses.weighted(process, label=config.label_weight)),
        sample=sampling.make_sampler(process, experiment.apply, experiment.shape, drop=("label",), heun=True))


def labels(experiment, params, config, key, data):
    """What is measured of a model of images and labels."""
    train, test = load_all(experiment.train_data()), load_all(experiment.test_data())
    keys = jax.random.split(key, 5)
    quantize = experiment.modalities["image"].quantize
    sample = functools.partial(sample_batched, experiment, params, batch=250, steps=config.sample.steps, guidance=config.sample.guidance)
    asked = conditional.labels_to_ask(train["label"], 10, 100)
    sampled = quantize(sample(keys[0], {"label": asked}, len(asked))["image"])
    found = conditional.measure(sampled, asked, (train["image"], train["label"]), (test["image"], test["label"]), 10, 100)
    metrics = {name: value for name, value in found.metrics.items() if name != "svm_real_accuracy"}
    count = len(train["image"])
    unconditional = quantize(sample(keys[1], {}, count, absent=("label",))["image"])
    metrics["frechet_ratio_absent"] = frechet_ratio(unconditional, test["image"], train["image"])
    if data == "no head":  # names an image by its denoising losses alone

        def scores(params, keys, given):
            process, apply, shape = experiment.process, experiment.apply, experiment.shape
            return denoising_losses(process, apply, params, keys, given, "label", 10, shape, 16)

        errors = in_batches(scores, params, example_keys(keys[2], len(test["image"])), {"image": test["image"]}, 50)
        return {**metrics, "label_accuracy": accuracy(errors.argmin(-1), test["label"])}
    read = predict_batched(experiment, params, keys[2], {"image": test["image"]}, "label", 250).argmax(-1)
    metrics["label_accuracy"] = accuracy(read, test["label"])
    for name, own in {"": experiment, **(estimates(experiment) if data == "estimates" else {})}.items():
        joint = sample_batched(own, params, keys[3], {}, count, batch=250, steps=config.sample.steps, guidance=1.0)
        images = quantize(joint["image"])
        metrics[f"joint_agreement{name}"] = accuracy(classifiers.predict(found.classifier, images), joint["label"])
        metrics[f"frechet_ratio_joint{name}"] = frechet_ratio(images, test["image"], train["image"])
    return metrics


def estimates(experiment):
    """What may stand in for a label that is not known: the mean of E, E of a sample, E of the best class; all by the same plain steps."""
    process = experiment.process

    def by(*transforms):
        sampler = sampling.make_sampler(process, experiment.apply, experiment.shape, drop=("label",), transforms=transforms)
        return dataclasses.replace(experiment, sample=sampler)

    return {
        "_mean": by(),
        "_sampled": by(sampling.following(process, "label", sampling.sampled())),
        "_best": by(sampling.following(process, "label", sampling.top_p(0.0))),
    }


def run(seed, data, overrides):
    """One training and what it is good for: (metrics, seconds)."""
    name = data if data in VARIANTS else "label"
    config, module = configs.load(str(CONFIGS / f"digits_{name}.py"), [*overrides.items(), ("seed", str(seed))])
    experiment = module.build(config)
    experiment = as_joint(experiment, config) if data == "joint" else experiment
    params, seconds = experiments.train(experiment, config)
    key = jax.random.key(1000 + seed)
    if name == "label":
        return labels(experiment, params, config, key, data), seconds
    found = experiment.evaluators[0](experiment, params, config, key, config.train.steps).metrics
    return {name: found[name] for name in METRICS[data] or found}, seconds


if __name__ == "__main__":
    bases = {"encoder": "none", "label": "head alone", "masked": "plain conditional"}
    experiments.main(__doc__, list(settings()), run, bases)
