import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmdiff import schedules
from mmdiff.data.modalities import Images, Labels
from mmdiff.errors import UserError
from mmdiff.evals import image_classifier
from mmdiff.processes import Gaussian, Joint, absorbing, velocity
from mmdiff.projects.fashion.fashion import fashion_source
from mmdiff.projects.fashion.fashion_metrics import FashionMetrics
from tests.small_sets import clothes, fashion_mnist

CONFIG = ml_collections.ConfigDict({"sample": {"steps": 4, "guidance": 1.5}})


def experiment(folder, split="test"):
    """A model that samples training images, for odd labels those of the class before, and reads a label from the height of the bar."""
    source = fashion_source("train", folder)
    found = source.take(np.arange(len(source)))
    of_class = jnp.stack([found["image"][found["label"] == c][:20] for c in range(10)])

    def apply(params, x, t):
        rows = x["image"].mean((2, 3))
        bars = jnp.stack([rows[:, 2 + 2 * c : 8 + 2 * c].mean(1) for c in range(10)], 1)
        return {"image": x["image"], "label": 30 * bars}

    def sample(params, keys, given, *, steps, guidance, absent=(), history=False):
        assert (steps, guidance, absent) == (4, 1.5, ())
        which = jax.vmap(lambda key: jax.random.randint(key, (), 0, 20))(keys)
        return {"image": of_class[given["label"] // 2 * 2, which], "label": given["label"]}

    return types.SimpleNamespace(
        process=Joint(image=Gaussian(schedules.flow(), velocity), label=absorbing(10)), apply=apply, sample=sample, split=split,
        modalities={"image": Images(32, 32), "label": Labels(10)}, shape={"image": (32, 32, 1), "label": ()},
        test_data=lambda: fashion_source(split, folder))


@pytest.mark.slow  # it compiles the network of features and trains two classifiers
def test_what_is_measured_of_a_model(tmp_path):
    """For every second label it samples images of the class before."""
    metrics = FashionMetrics(str(fashion_mnist(tmp_path)), samples=40, batch=20, classifier_steps=60)
    result = metrics(experiment(metrics.folder), {}, CONFIG, jax.random.key(0), 0)
    found = result.metrics
    assert found["label_accuracy"] == 1 and found["classifier_real_accuracy"] >= 0.95
    assert found["conditional_agreement"] == pytest.approx(0.5, abs=0.03) and found["classification_accuracy_score"] < 0.8
    assert 0 < found["lite0-FD_real"] < found["lite0-FD"] and found["lite0-recall"] < found["lite0-recall_real"]
    assert set(result.definitions) == set(found) and len(result.figures) == 4
    counts = result.settings["lite0-FD"]
    assert counts["samples"] == counts["reference_images"] == 40 and counts["network"] == "efficientnet_lite0"


def test_a_classifier_is_a_function_of_its_examples(monkeypatch):
    images, labels = clothes(60)
    one, other = (image_classifier.trained(images[..., None], labels, steps=3) for _ in range(2))
    np.testing.assert_array_equal(one(images[..., None]), other(images[..., None]))
    monkeypatch.setattr(image_classifier, "RATE", np.nan)
    with pytest.raises(UserError, match="logits: 60 of 60 examples, the first of them 0, hold values that are not finite"):
        image_classifier.trained(images[..., None], labels, steps=1)(images[..., None])
