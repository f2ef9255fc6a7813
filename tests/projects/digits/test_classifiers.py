import numpy as np
import pytest

from mmdiff.data.sources import load_all
from mmdiff.projects.digits import classifiers


def test_the_classifier_is_as_good_as_stated(train, test):
    train, test = load_all(train), load_all(test)
    judge = classifiers.svm(train["image"], train["label"])
    assert classifiers.agreement(judge, test["image"], test["label"]) == pytest.approx(0.988, abs=0.004)
    score = classifiers.classification_accuracy_score(train["image"], train["label"], test["image"], test["label"])
    assert score == pytest.approx(0.988, abs=0.004)  # for samples that are the training data


def test_classification_accuracy_score_sees_mismatch_and_collapse(train, test):
    train, test = load_all(train), load_all(test)
    real = test["image"], test["label"]
    wrong = classifiers.classification_accuracy_score(train["image"], (train["label"] + 1) % 10, *real)
    assert wrong < 0.05
    first = np.array([np.flatnonzero(train["label"] == c)[0] for c in range(10)])
    collapsed = classifiers.classification_accuracy_score(train["image"][first[train["label"]]], train["label"], *real)
    assert collapsed < 0.85
    only_threes = classifiers.classification_accuracy_score(train["image"][:5], np.full(5, 3), *real)
    assert only_threes == np.mean(test["label"] == 3)
