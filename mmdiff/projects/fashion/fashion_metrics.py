"""What is measured of a model of Fashion-MNIST: the labels that it reads, and one set of class-balanced samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from mmdiff import hosts
from mmdiff.data.modalities import Images
from mmdiff.data.sources import load_all
from mmdiff.encoders.published_networks import Encoder
from mmdiff.evals import image_classifier, plots
from mmdiff.evals.accuracy import accuracy, confusion
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, best, predict_batched, sample_batched
from mmdiff.evals.sample_metrics import DEFAULT, NETWORKS, Collected, collect, compare, convention, open_network
from mmdiff.projects.fashion.fashion import NAMES, SIZE, central, fashion_source

CLASSES = len(NAMES)


@dataclasses.dataclass(frozen=True)
class FashionMetrics:
    """The metrics and figures of a model that samples clothes of a class.

    * `label_accuracy`, of a model that learns the label: its most likely label of every held-out image, by one network call.
    * lite0-FD, -precision, -recall, ... of the samples against all held-out images; `_real` of as many training images in their place.
    * `conditional_agreement`: the share of samples to which the independent classifier gives the label that they were sampled for.
    * `classification_accuracy_score`: the accuracy on held-out images of such a classifier that was trained on the samples alone.

    Images are compared as they are published, in 256 levels and without the margin; for the features they are enlarged to 64 x 64 pixels
    (`network`), not to the 224 of `mmdiff eval --samples`: other values, at a twelfth of the cost.

    Attributes:
      folder: of `fashion_source`, whose images are the real ones whatever the model samples.
      target, label: the names of the two modalities; the target shows grey images of 32 x 32 pixels.
      samples: how many, and how many training images they are compared with; sample i is of class i modulo 10.
      batch: examples in a call of the network or the sampler.
      classifier_steps: of the training of each classifier.
    """

    folder: str
    target: str = "image"
    label: str = "label"
    samples: int = 10_000
    batch: int = 250
    classifier_steps: int = image_classifier.STEPS

    better = MappingProxyType({"lite0-FD": "min", "conditional_agreement": "max"})  # what train.best may name

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        label_key, sample_key = jax.random.split(key)
        held_images, held = real(self.folder, experiment.split)
        train_images, train = real(self.folder, "train")
        clock, metrics, texts, figures = Clock(), {}, {}, {}

        if experiment.process.parts[self.label].learnt:
            clock.start("label_accuracy", f"the labels of {len(held)} images, one call each")
            images = load_all(experiment.test_data())[self.target]
            read = best("p(label | image)", predict_batched(experiment, params, label_key, {self.target: images}, self.label, self.batch))
            metrics["label_accuracy"] = accuracy(read, held)
            texts["label_accuracy"] = f"argmax of p(label | image), one network call; {len(held)} held-out images"
            table = plots.matrix(confusion(read, held, CLASSES), NAMES, "true label", "label predicted by the model")
            figures["Image to label"] = Figure(table, f"{len(held)} held-out images, one network call each.")

        asked = np.arange(self.samples, dtype=np.int32) % CLASSES
        clock.start("samples", f"sampling {self.samples} images by label, {steps} steps")
        options = {"batch": self.batch, "steps": steps, "guidance": guidance}
        sampled = sample_batched(experiment, params, sample_key, {self.label: asked}, self.samples, **options)[self.target]
        made = _grey(experiment.modalities[self.target].show(sampled))

        clock.start("classifiers", "training the independent classifier, and another one on the samples")
        independent = independent_classifier(self.folder, self.classifier_steps)
        seen = independent(made)
        metrics |= {
            "conditional_agreement": accuracy(seen, asked),
            "classifier_real_accuracy": accuracy(independent(held_images), held),
            "classification_accuracy_score": accuracy(
                image_classifier.trained(made, asked, CLASSES, self.classifier_steps)(held_images), held)}
        texts |= {
            "conditional_agreement": f"share of {self.samples} samples, as many of every class, to which the independent classifier gives "
            "the label that they were sampled for",
            "classifier_real_accuracy": f"the share of {len(held)} held-out images whose own label it gives them",
            "classification_accuracy_score": f"the same of a classifier trained on the {self.samples} samples alone"}

        clock.start("features", "features of samples, held-out and training images")
        encoder, fresh = network(), train_images[np.arange(self.samples) * len(train) // self.samples]
        of_made, of_held, of_fresh = (collect(encoder, _batches(images)) for images in (made, held_images, fresh))
        found, definitions, counts = compare(DEFAULT, of_made, of_held)
        limits, limit_texts, _ = compare(DEFAULT, of_fresh, of_held)
        clock.stop()
        for name in limits:
            if not name.endswith(("_bias", "_std")):
                found[f"{name}_real"] = limits[name]
                definitions[f"{name}_real"] = f"the same of {self.samples} training images in the place of samples: {limit_texts[name]}"
        sampler = f"{steps} steps, guidance {guidance:g}"
        for title, images, labels, text in (
                ("Label to image", made, asked, f"One class per row; {sampler}; the first of each class, none chosen."),
                ("Real images", held_images, held, "Held out, for comparison.")):
            ten = np.concatenate([np.flatnonzero(labels == c)[:10] for c in range(CLASSES)])
            figures[title] = Figure(plots.grid(images[ten], 10, rows=NAMES), text)
        table = plots.matrix(confusion(seen, asked, CLASSES), NAMES, "label given", "label seen by the classifier")
        figures["Label to image, as the classifier sees it"] = Figure(table, f"{self.samples} samples.")
        settings = {
            "sample_steps": steps, "guidance": guidance, "label_conditioned_samples": self.samples,
            "classifier": image_classifier.DESCRIPTION, "classifier_steps": self.classifier_steps,
            "images": "28 x 28 pixels of 256 levels", NETWORKS[DEFAULT].distance: {**convention(encoder), **counts},
            "evaluation_seconds": clock.seconds}
        return EvalResult({**metrics, **found}, {**texts, **definitions}, figures, settings)


@dataclasses.dataclass(frozen=True)
class FashionPairs:
    """The judge of `JointCalls` for pairs of clothes and labels that were sampled together.

    * `joint_agreement`: the share of samples to which the independent classifier gives the label sampled with them;
    * `joint_lite0-FD`: the distance of `FashionMetrics`, of their images to all held-out ones.
    """

    folder: str
    samples: int
    classifier_steps: int = image_classifier.STEPS
    target: str = "image"  # or "tokens", whatever shows the image

    def __call__(self, experiment):
        independent, encoder = independent_classifier(self.folder, self.classifier_steps), network()
        of_held = features_of_real(self.folder, experiment.split)

        def judged(pairs):
            images = _grey(experiment.modalities[self.target].show(pairs[self.target]))
            found, texts, _ = compare(DEFAULT, collect(encoder, _batches(images), keep=False), of_held)
            distance = NETWORKS[DEFAULT].distance
            share = f"share of {self.samples} joint samples with the label that the independent classifier gives their image"
            return {
                "joint_agreement": (accuracy(independent(images), pairs["label"]), share),
                f"joint_{distance}": (found[distance], texts[distance])}

        return self.samples, judged


def real(folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The real images of a split, uint8 [n, 28, 28, 1], and their labels [n]."""
    found = load_all(fashion_source(split, folder))
    return _grey(Images(SIZE, SIZE).show(found["image"])), found["label"]


@functools.lru_cache(maxsize=2)
def features_of_real(folder: str, split: str) -> Collected:
    """The moments of the features of all real images of a split; evaluators of one process share them."""
    return collect(network(), _batches(real(folder, split)[0]), keep=False)


@functools.lru_cache(maxsize=1)
def independent_classifier(folder: str, steps: int) -> image_classifier.Classifier:
    """The classifier trained on the training images; evaluators of one process share it."""
    return image_classifier.trained(*real(folder, "train"), CLASSES, steps)


def evaluators_of(folder: str, options: Mapping[str, Any], **more) -> dict[str, tuple[FashionMetrics, ...]]:
    """The `evaluators` and `in_loop` of an experiment whose config has a section `eval`: samples, batch, classifier_steps, and in_loop with
    what is other there; `more` options of both."""
    of_both = {"folder": folder, **{name: value for name, value in options.items() if name != "in_loop"}, **more}
    return {"evaluators": (FashionMetrics(**of_both),), "in_loop": (FashionMetrics(**{**of_both, **options.get("in_loop", {})}),)}


def network() -> Encoder:
    """EfficientNet-Lite0 with images of 64 x 64 pixels, by Pillow's bilinear kernel on 8 bits."""
    encoder = open_network()
    preprocessing = dataclasses.replace(encoder.preprocessing, size=64, resize="square", kernel="bilinear", shortest=0)
    return dataclasses.replace(encoder, preprocessing=preprocessing)


def _grey(shown: np.ndarray) -> np.ndarray:
    """What a modality shows, without the margin: uint8 [n, 28, 28, 1]."""
    return central(shown)[..., :1]


def _batches(images: np.ndarray, at_once: int = 1000) -> Iterator[np.ndarray]:
    """This process's part of grey images, as the networks of features take them: uint8 [m, 28, 28, 3], some at a time."""
    mine = hosts.part(len(images))
    for start in range(mine.start, mine.stop, at_once):
        yield np.repeat(images[start : min(start + at_once, mine.stop)], 3, axis=-1)
