"""What is measured of pairs of images and labels that were sampled together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmdiff.data.sources import load_all
from mmdiff.evals.frechet import frechet_ratio
from mmdiff.projects.digits import classifiers


def judge(experiment: Any) -> tuple[int, Callable[[Mapping[str, np.ndarray]], dict[str, tuple[float, str]]]]:
    """The judge of `JointCalls` for digits; as many samples as there are training images.

    * `joint_agreement`: the share of samples to which an SVM trained on the real training images gives the label sampled with them;
    * `joint_frechet_ratio`: as `conditional.measure` computes it.
    """
    train, held = load_all(experiment.train_data()), load_all(experiment.test_data())
    count, quantize = len(train["image"]), experiment.modalities["image"].quantize
    classifier = classifiers.svm(train["image"], train["label"])

    def judged(pairs):
        images = quantize(pairs["image"])
        return {
            "joint_agreement": (
                classifiers.agreement(classifier, images, pairs["label"]),
                f"share of {count} joint samples with the label that an SVM gives their image"),
            "joint_frechet_ratio": (
                frechet_ratio(images, held["image"], train["image"]),
                f"squared Fréchet distance (raw pixels) of {count} joint samples to the held-out images, over that of the training images")}

    return count, judged
