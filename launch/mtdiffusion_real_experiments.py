"""Does aggregation help on real pairs? MT-Diffusion's parts on Fashion-MNIST's images with labels, and with a network's features.

    python launch/mtdiffusion_real_experiments.py --out runs/mtdiffusion_real --data FOLDER          # everything, or what is missing of it
    python launch/mtdiffusion_real_experiments.py --out runs/mtdiffusion_real --data FOLDER --table  # the tables of what is done so far

FOLDER holds Fashion-MNIST's four files (mmdiff/projects/fashion/fashion.py). Features need `pip install 'mmdiff[features]'`.

    label_choice     labels, seed 0, on validation images: kappa of the aggregation, and lambda, the weight of the label in a Joint
    label            labels, three seeds, on test images: the image given the label alone (DDPM), a head without aggregation, both, and a
                     Joint with independent times, each with what was chosen
    features_choice  features, seed 0, on validation images: kappa of the aggregation, and the weight of the features in a Joint
    features         features, three seeds, on test images: the image alone, aggregation and a head, and a Joint

What is chosen has the least sum of ranks in the two metrics of samples of both together, lite0-FD and agreement (or cosine). Features are
64 principal components of EfficientNet-Lite0's, in the place of CLIP's vectors. All networks have one width and depth, and all trainings
equally many images; all are small and briefly trained: compare them with each other. Half an hour of one core. The results are in
configs/mtdiffusion/README.md.
"""

import dataclasses
import functools

import experiments
import jax
import numpy as np
from mtdiffusion_experiments import CONFIGS, as_joint, independent, shares

from mmdiff import config as configs
from mmdiff import losses, nets, sampling, schedules
from mmdiff.data.modalities import Images
from mmdiff.data.sources import Subset, load_all
from mmdiff.data.stored_images import ByteImages
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import predict_batched, sample_batched
from mmdiff.evals.frechet import moments, squared_distance
from mmdiff.evals.sample_metrics import collect
from mmdiff.processes import Gaussian, Joint, velocity
from mmdiff.projects.digits.representation import NAME, cosine
from mmdiff.projects.fashion import fashion_metrics
from mmdiff.projects.fashion.fashion import NAMES, SIZE, central, fashion_source
from mmdiff.training import optim

IMAGES, BATCH = Images(SIZE, SIZE), 250
SAMPLES, CLASSIFIER_STEPS = 500, 400  # of every metric, of the training of the independent classifier
COMPONENTS, REPRESENTED = 64, 20_000  # of the features; training images that have them, evenly spread
RMS = 0.87  # of the images
SMALL = {
    "model.width": "64", "model.depth": "2", "model.heads": "2", "model.patch": "4", "train.steps": "500", "train.global_batch": "64",
    "train.learning_rate": "2e-2", "train.weight_decay": "0.1", "train.warmup_steps": "50", "train.ema": "0.99", "sample.steps": "10",
    "sample.guidance": "1.0",
}  # fmt: skip
LABEL = {**SMALL, "sample.settle": "0.5"}
ALONE = {"kappa": "0.0", "head_weight": "0.0", **shares(known=0, hidden=0, absent=1, clean=0)}
KAPPAS = ("0.25", "0.5", "1.0")
LABELS = ("label", "joint", "given")  # the kinds of what digits_label.py builds; the others are of digits_representation.py


def settings():
    """-> (part, name of the setting, "KIND SPLIT", overrides)."""
    for kappa in KAPPAS:
        yield "label_choice", f"aggregation and head, kappa {kappa}", "label validation", {**LABEL, "kappa": kappa}
    for kappa in KAPPAS[::2]:
        yield "features_choice", f"aggregation and head, kappa {kappa}", "features validation", {**SMALL, "kappa": kappa}
    for weight in ("0.1", "0.4"):
        yield "label_choice", f"joint, weight {weight}", "joint validation", {**LABEL, "kappa": "0.0", "label_weight": weight}
    for weight in ("0.1", "1.0"):
        yield "features_choice", f"joint, weight {weight}", "vectors validation", {**SMALL, "head_weight": weight}
    yield "label", "image given the label alone", "given test", {**LABEL, "kappa": "0.0", "task": "generate"}
    yield "label", "head alone", "label test", {**LABEL, "kappa": "0.0"}
    yield "label", "aggregation and head", "label test", {**LABEL, "kappa": "1.0"}
    yield "label", "joint with independent times", "joint test", {**LABEL, "kappa": "0.0", "label_weight": "0.1"}
    yield "features", "image alone", "alone test", {**SMALL, **ALONE}
    yield "features", "aggregation and head", "features test", {**SMALL, "kappa": "0.25"}
    yield "features", "joint with independent times", "vectors test", {**SMALL, "head_weight": "0.1"}


def grey(images):
    """What is shown of sampled images, without the margin: uint8 [n, 28, 28, 1]."""
    return central(IMAGES.show(images))[..., :1]


@functools.lru_cache(maxsize=1)
def network():
    return fashion_metrics.network()


def outputs(images):
    """EfficientNet-Lite0's 1280 features of grey images, uint8 [n, 28, 28, 1]."""
    parts = (images[start : start + 1000] for start in range(0, len(images), 1000))
    return collect(network(), (np.repeat(part, 3, axis=-1) for part in parts)).features


@functools.lru_cache(maxsize=1)
def components(folder):
    """-> a function from outputs [n, 1280] to features [n, 64] of root mean square 1, and the training images that have them."""
    source = Subset(fashion_source("train", folder), REPRESENTED)
    images = load_all(source)["image"]
    found = outputs(grey(images))
    mean, covariance = moments(found)
    axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :COMPONENTS]

    def features(outputs):
        projected = (outputs - mean) @ axes
        return (projected / np.sqrt((projected**2).mean(1, keepdims=True))).astype(np.float32)

    return features, images, found


@functools.lru_cache(maxsize=6)
def represented(split, folder):
    """A source of images and their features."""
    features, images, found = components(folder)
    if split != "train":
        images, found = load_all(fashion_source(split, folder))["image"], of_real(split, folder)
    return ByteImages({"image": IMAGES.show(images)[..., :1], NAME: features(found)})


@functools.lru_cache(maxsize=2)
def of_real(split, folder):
    return outputs(fashion_metrics.real(folder, split)[0])


@functools.lru_cache(maxsize=2)
def real_moments(split, folder):
    return moments(of_real(split, folder))


def as_vectors(experiment, config):
    """The experiment with a `Joint` of two Gaussians, image and vector, each with a time of its own that its network sees."""
    process = Joint(image=experiment.process.chain, **{NAME: Gaussian(schedules.flow(), velocity)})
    patches = nets.Patches(SIZE, SIZE, 1, config.model.patch)
    net = nets.MMDiT(
        {"image": patches, NAME: nets.Vectors(COMPONENTS)}, shared=True, **nets.options(config.model, without="patch"))
    terms = losses.of_parts(process, image=1.0, **{NAME: config.head_weight})
    return dataclasses.replace(
        experiment, process=process, net=net, init=None, apply=None, sample=None, sampler={"heun": True},
        loss=losses.diffusion(process, net.apply, independent(NAME, config.times), terms))


def build(kind, folder, overrides):
    """-> (config, experiment)"""
    name = "label" if kind in LABELS else "representation"
    config, module = configs.load(str(CONFIGS / f"digits_{name}.py"), list(overrides.items()))
    if kind not in LABELS:
        experiment = module.build(config, IMAGES, RMS, COMPONENTS, functools.partial(represented, folder=folder))
        experiment = as_vectors(experiment, config) if kind == "vectors" else experiment
    else:
        experiment = module.build(config, IMAGES, NAMES, functools.partial(fashion_source, folder=folder))
    if kind == "joint":
        joint = as_joint(experiment, config)  # whose labels settle as those of the others
        sample = sampling.make_sampler(joint.process, joint.apply, joint.shape, **experiment.sampler)
        experiment = dataclasses.replace(joint, sample=sample)
    return config, dataclasses.replace(experiment, optimizer=optim.muon(config.train))  # learns more in as many steps than AdamW


def measure(experiment, params, steps, key, kind, split, folder):
    """What is sampled: given a label or features, without them, and together with them; and what is predicted of real images."""
    other, metrics, keys = "label" if kind in LABELS else NAME, {}, iter(jax.random.split(key, 4))
    held = load_all(experiment.test_data() if split == "test" else experiment.validation_data())
    classes = fashion_metrics.real(folder, split)[1]
    rows = np.concatenate([np.flatnonzero(classes == c)[: SAMPLES // len(NAMES)] for c in range(len(NAMES))])
    for way in {"given": ("given",), "alone": ("absent",)}.get(kind, ("given", "absent", "together")):
        sampled = sample_batched(
            experiment, params, next(keys), {other: held[other][rows]} if way == "given" else {}, len(rows), batch=BATCH, steps=steps,
            guidance=1.0, absent=(other,) if way == "absent" else ())
        images = grey(sampled["image"])
        found = outputs(images)
        metrics[f"lite0-FD, {way}"] = squared_distance(*moments(found), *real_moments(split, folder))
        if way == "given" or way == "together" and other == "label":
            seen = fashion_metrics.independent_classifier(folder, CLASSIFIER_STEPS)(images)
            metrics[f"agreement, {way}"] = accuracy(seen, classes[rows] if way == "given" else sampled["label"])
        if way != "absent" and other == NAME:
            metrics[f"cosine, {way}"] = cosine(sampled[NAME], components(folder)[0](found)).mean()
    if kind not in ("given", "alone"):
        read = predict_batched(experiment, params, next(keys), {"image": held["image"]}, other, BATCH)
        metrics |= {"label accuracy": accuracy(read.argmax(-1), classes)} if other == "label" else {
            "cosine, predicted": cosine(read, held[NAME]).mean()}
    return metrics


def run(seed, data, overrides, folder):
    """One training and what it is good for: (metrics, seconds)."""
    kind, split = data.split()
    config, experiment = build(kind, folder, {**overrides, "seed": str(seed)})
    params, seconds = experiments.train(experiment, config)
    return measure(experiment, params, config.sample.steps, jax.random.key(1000 + seed), kind, split, folder), seconds


if __name__ == "__main__":
    parts = tuple(dict.fromkeys(part for part, *_ in settings()))
    seeds = {part: (0,) for part in parts if part.endswith("_choice")}
    experiments.main(__doc__, list(settings()), run, {"label": "head alone", "features": "image alone"}, parts, seeds)
