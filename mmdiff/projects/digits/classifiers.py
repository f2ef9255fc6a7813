"""The independent classifier: a support vector machine on raw pixels, which never sees the diffusion model."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.frechet import flatten

# Chosen once, by stratified 5-fold cross-validation on the 1,297 digits that training and validation have together (C in 1, 3, 10, 30;
# gamma in 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, pixels in [-1, 1]): 0.9923 at this point. Frozen for real and generated digits alike.
C, GAMMA = 1.0, 0.05


def svm(images: np.ndarray, labels: np.ndarray) -> Any:
    """scikit-learn's SVC (RBF kernel, one against one) trained on the pixels of images [n, ...] in [-1, 1]; deterministic."""
    from sklearn.svm import SVC

    return SVC(C=C, gamma=GAMMA, kernel="rbf").fit(flatten(images), np.asarray(labels))


def predict(classifier: Any, images: np.ndarray) -> np.ndarray:
    """The classifier's labels [n] for images [n, ...]."""
    return classifier.predict(flatten(images))


def agreement(classifier: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose own label the classifier gives them."""
    return accuracy(predict(classifier, images), labels)


def classification_accuracy_score(
    images: np.ndarray, labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray
) -> float:
    """Accuracy on real test images of a classifier trained on generated ones only (Ravuri and Vinyals 2019, arXiv:1905.10887).

    It falls both when samples do not match their labels and when they lack the variety of the data. Classes that were never
    generated count as errors; samples of one class only score the share of that class.
    """
    if len(np.unique(labels)) < 2:
        return accuracy(np.full(len(test_labels), labels[0]), test_labels)
    return agreement(svm(images, labels), test_images, test_labels)
