"""What is measured of label-conditioned images, however they were sampled: by an independent classifier and the Fréchet ratio."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmdiff.evals import plots
from mmdiff.evals.accuracy import accuracy, confusion
from mmdiff.evals.evaluator import EvalResult, Figure
from mmdiff.evals.frechet import frechet_ratio
from mmdiff.projects.digits import classifiers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged(EvalResult):
    """What `measure` found.

    Attributes:
      classifier: the SVM trained on the real training images.
      rows: which samples count for `conditional_agreement`, equally many of every class.
      labels: the classifier's labels of these.
    """

    classifier: Any
    rows: np.ndarray
    labels: np.ndarray


def labels_to_ask(labels: np.ndarray, classes: int, per_class: int) -> np.ndarray:
    """The labels to condition on, int32: those of the training set, then what is missing to `per_class` of each class."""
    missing = np.maximum(0, per_class - np.bincount(labels, minlength=classes))
    return np.concatenate([labels, np.repeat(np.arange(classes), missing)]).astype(np.int32)


def measure(
    sampled: np.ndarray,
    asked: np.ndarray,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: int,
    per_class: int,
) -> Judged:
    """Metrics of images `sampled` [n, H, W, C] for the labels `asked` [n], which are `labels_to_ask` of the training set's.

    * `classification_accuracy_score` and `frechet_ratio`: as many samples as there are training images, with their labels;
    * `conditional_agreement`: the first `per_class` of every class;
    * `svm_real_accuracy`: the ceiling of the score.

    Args:
      train, test: real images in [-1, 1] and their labels.
    """
    (images, labels), (test_images, test_labels) = train, test
    count = len(images)
    rows = np.concatenate([np.flatnonzero(asked == c)[:per_class] for c in range(classes)])
    classifier = classifiers.svm(images, labels)
    predicted = classifiers.predict(classifier, sampled[rows])
    score = classifiers.classification_accuracy_score(sampled[:count], asked[:count], test_images, test_labels)
    return Judged(
        metrics={
            "conditional_agreement": accuracy(predicted, asked[rows]),
            "classification_accuracy_score": score,
            "svm_real_accuracy": classifiers.agreement(classifier, test_images, test_labels),
            "frechet_ratio": frechet_ratio(sampled[:count], test_images, images),
        },
        definitions={
            "conditional_agreement": f"share of {len(rows)} label-conditioned samples, {per_class} of each class, to which "
            "an SVM trained on the real training images gives that label",
            "classification_accuracy_score": f"accuracy on the {len(test_images)} held-out images of such an SVM trained on {count} "
            "generated images only (label-conditioned, the training set's class frequencies)",
            "svm_real_accuracy": f"the same for the {count} real training images: the ceiling of the score above",
            "frechet_ratio": f"squared Fréchet distance (raw pixels, float64) of those {count} generated images to the "
            f"{len(test_images)} held-out ones, over that of the {count} training images to them: 1 is the limit",
        },
        settings={
            "label_conditioned_samples": len(asked),
            "conditional_agreement_samples": len(rows),
            "classification_accuracy_score_samples": count,
            "classifier": f"scikit-learn SVC(C={classifiers.C}, gamma={classifiers.GAMMA}), RBF kernel, pixels in [-1, 1]",
            "frechet_features": "raw pixels",
            "frechet_samples": {"generated": count, "train": count, "test": len(test_images)},
        },
        classifier=classifier,
        rows=rows,
        labels=predicted,
    )


def figures(
    sampled: np.ndarray, asked: np.ndarray, real: np.ndarray, labels: np.ndarray, names: Sequence[str], found: Judged, sampler: str
) -> dict[str, Figure]:
    """Ten samples of every class, as many real images (both uint8), and what the classifier makes of the samples."""
    classes = len(names)
    ten = [np.concatenate([np.flatnonzero(x == c)[:10] for c in range(classes)]) for x in (asked, labels)]
    return {
        "Label to image": Figure(
            plots.grid(sampled[ten[0]], 10, rows=names), f"One class per row; {sampler}; the first of each class, none chosen."
        ),
        "Real images": Figure(plots.grid(real[ten[1]], 10, rows=names), "Held out, for comparison."),
        "Label to image, as the SVM sees it": Figure(
            plots.matrix(confusion(found.labels, asked[found.rows], classes), names, "label given", "label seen by the SVM"),
            f"{len(found.rows)} label-conditioned samples.",
        ),
    }
