"""What an image model makes of representations: images sampled for one, with one and without, and representations predicted from images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from mmdiff.data.sources import load_all
from mmdiff.evals import plots
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, predict_batched, sample_batched, states
from mmdiff.evals.frechet import frechet_ratio
from mmdiff.projects.digits import classifiers

NAME = "representation"


@dataclasses.dataclass(frozen=True)
class ImageRepresentation:
    """Metrics and figures of a joint model of images and the features of a fixed extractor.

    As many images as there are training images, for each setting: `given`, the training images' own representations, with the guidance
    of `config.sample`; `given_unguided`, without it; `joint`, sampled together with a representation; `absent`, without any. Of each:

    * `frechet_ratio_...`, to the held-out images;
    * `cosine_...`: of the representation (given or sampled) and the features of the image sampled;
    * `class_agreement_...`: an SVM sees the class of the image that the given representation is of.

    `cosine_predicted`: of the representation that the network predicts from a held-out image in one call, and its features.

    Attributes:
      features: images [n, H, W, C] -> [n, D].
      batch: examples in a call of the network or the sampler.
    """

    features: Callable[[np.ndarray], np.ndarray]
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        train, test = load_all(experiment.train_data()), load_all(experiment.test_data())
        modality = experiment.modalities["image"]
        keys = jax.random.split(key, 6)
        classifier = classifiers.svm(train["image"], train["label"])
        real, count = {NAME: train[NAME]}, len(train["image"])
        settings = {
            "given": (real, guidance, ()), "given_unguided": (real, 1.0, ()), "joint": ({}, 1.0, ()), "absent": ({}, 1.0, (NAME,)),
        }  # fmt: skip
        clock, metrics, shown = Clock(), {}, {}
        for (name, (given, scale, absent)), own in zip(settings.items(), keys):
            clock.start(name, f"sampling {count} images, representation {name.replace('_', ' ')}")
            options = {"batch": self.batch, "steps": steps, "guidance": scale, "absent": absent}
            sampled = sample_batched(experiment, params, own, given, count, **options)
            shown[name] = images = modality.quantize(sampled["image"])
            metrics[f"frechet_ratio_{name}"] = frechet_ratio(images, test["image"], train["image"])
            if not absent:
                metrics[f"cosine_{name}"] = float(cosine(sampled[NAME], self.features(images)).mean())
            if given:
                metrics[f"class_agreement_{name}"] = accuracy(classifiers.predict(classifier, images), train["label"])
        clock.start("predicted", f"predicting the representations of {len(test['image'])} images")
        predicted = predict_batched(experiment, params, keys[4], {"image": test["image"]}, NAME, self.batch)
        metrics["cosine_predicted"] = float(cosine(predicted, test[NAME]).mean())
        metrics["cosine_same_class"], metrics["cosine_any"] = pairs(test[NAME], test["label"])
        clock.start("chain", "keeping the states of ten images")
        chain = states(experiment, params, keys[5], {NAME: test[NAME]}, "image", steps=steps, guidance=guidance)
        clock.stop()
        show, sampler = modality.show, f"{steps} steps, guidance {guidance:g}"
        rows = np.concatenate([train["image"][:10], *(shown[name][:10] for name in settings)])
        return EvalResult(
            metrics=metrics,
            definitions=self._definitions(count, len(test["image"])),
            figures={
                "Representation to image": Figure(
                    plots.grid(show(rows), 10, rows=list("abcde")),
                    f"a: the real images whose representations are given to b ({sampler}) and c (without guidance); d: sampled with "
                    "a representation; e: without any."),
                "From noise to image": Figure(
                    plots.grid(show(chain), 10),
                    f"States of ten trajectories with held-out representations, from noise, above, to the image; {sampler}."),
            },
            settings={
                "sample_steps": steps, "guidance": guidance, "samples": count, "test_images": len(test["image"]),
                "evaluation_seconds": clock.seconds},
        )  # fmt: skip

    def _definitions(self, count, test):
        ways = {
            "given": "the training images' representations given, with guidance", "given_unguided": "the same without guidance",
            "joint": "image and representation sampled together", "absent": "sampled without a representation",
        }  # fmt: skip
        definitions = {}
        for name, words in ways.items():
            definitions[f"frechet_ratio_{name}"] = (
                f"squared Fréchet distance (raw pixels) of {count} images to {test} held-out ones, over the training images'; {words}")
            definitions[f"cosine_{name}"] = f"mean cosine of the representation and the features of the image sampled; {words}"
            definitions[f"class_agreement_{name}"] = f"an SVM sees the class of the image that the representation is of; {words}"
        return definitions | {
            "cosine_predicted": "mean cosine of the representation predicted from a held-out image in one network call and its features",
            "cosine_same_class": "the same of the features of two held-out images of one class",
            "cosine_any": "the same of any two",
        }


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rows of a and b, [n]."""
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)


def pairs(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The mean cosine of two different examples of one class, and of any two."""
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    table, other = unit @ unit.T, ~np.eye(len(unit), dtype=bool)
    return float(table[(labels[:, None] == labels) & other].mean()), float(table[other].mean())
