import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmdiff import schedules
from mmdiff.data.modalities import Images, Labels
from mmdiff.data.sources import load_all
from mmdiff.errors import UserError
from mmdiff.evals import plots, report
from mmdiff.evals.evaluator import EvalResult, Figure
from mmdiff.processes import Gaussian, Joint, absorbing, velocity
from mmdiff.projects.digits.conditional import labels_to_ask
from mmdiff.projects.digits.joint_image_label import JointImageLabel

METRICS = {
    "label_accuracy",
    "label_accuracy_diffusion_classifier",
    "conditional_agreement",
    "joint_agreement",
    "classification_accuracy_score",
    "svm_real_accuracy",
    "frechet_ratio",
}

MEASURED = types.SimpleNamespace(split="test")  # all that a report reads of the experiment


def config():
    return ml_collections.ConfigDict({"seed": 3, "sample": {"steps": 4, "guidance": 1.5}})


def experiment(train, test, wrong=0):
    """A model that draws real training digits, of class label + wrong, and knows every class by its mean.

    The parameters are the ten mean images, so that all of it is tested to come from the parameters that are handed in.
    """
    images, labels = load_all(train)["image"], load_all(train)["label"]
    order = np.argsort(labels, kind="stable")
    images, starts, counts = jnp.asarray(images[order]), jnp.searchsorted(labels[order], jnp.arange(10)), jnp.bincount(labels)

    def apply(means, x, t):
        distance = jnp.mean((x["image"][:, None] - means) ** 2, axis=(2, 3, 4))
        mean = means[jnp.minimum(x["label"], 9)]
        return {"image": (x["image"] - mean) / jnp.maximum(t["image"], 1e-3)[:, None, None, None], "label": -30 * distance}

    def sample(means, keys, given, *, steps, guidance, absent=(), history=False):
        assert (steps, guidance) == (4, 1.5)
        label = given["label"] if "label" in given else jax.vmap(lambda key: jax.random.randint(key, (), 0, 10))(keys)
        kind = (label + wrong) % 10
        at = jax.vmap(lambda key, count: jax.random.randint(jax.random.fold_in(key, 1), (), 0, count))(keys, counts[kind])
        # A little noise stands for what a sampler leaves between the levels of the data.
        noise = jax.vmap(lambda key: jax.random.uniform(key, (8, 8, 1), minval=-0.06, maxval=0.06))(keys)
        sampled = {"image": images[starts[kind] + at] + noise, "label": jnp.full_like(label, 10) if "label" in absent else label}
        return jax.tree.map(lambda array: jnp.stack([array] * (steps + 1)), sampled) if history else sampled

    made = types.SimpleNamespace(
        process=Joint(image=Gaussian(schedules.flow(), velocity), label=absorbing(10)),
        apply=apply,
        sample=sample,
        train_data=lambda: train,
        test_data=lambda: test,
        shape={"image": (8, 8, 1), "label": ()},
        modalities={"image": Images(8, 8, 1, levels=17), "label": Labels(10)},
    )
    means = jnp.stack([images[starts[c] : starts[c] + counts[c]].mean(0) for c in range(10)])
    return made, means


@pytest.fixture(scope="module")
def results(train, test):
    made, means = experiment(train, test)
    return JointImageLabel(draws=2)(made, means, config(), jax.random.key(0), 7)


def test_real_digits_get_full_marks(results):
    metrics = results.metrics
    assert set(metrics) == set(results.definitions) == METRICS
    assert 0.85 < metrics["label_accuracy"] < 0.93  # the nearest mean's: 0.896
    assert metrics["label_accuracy"] == pytest.approx(metrics["label_accuracy_diffusion_classifier"], abs=0.02)
    assert metrics["conditional_agreement"] > 0.99
    assert metrics["joint_agreement"] > 0.99
    assert metrics["svm_real_accuracy"] == pytest.approx(0.988, abs=0.004)
    assert 0.97 < metrics["classification_accuracy_score"] <= 0.992
    assert 1 < metrics["frechet_ratio"] < 1.4  # above 1: sampling with replacement leaves out a third of the digits


def test_counts_are_stated(results):
    settings = results.settings
    assert settings["label_conditioned_samples"] == 1097  # every class is asked for at least 100 times
    assert settings["conditional_agreement_samples"] == settings["joint_agreement_samples"] == 1000
    assert settings["frechet_samples"] == {"generated": 1097, "train": 1097, "test": 500}
    assert (settings["guidance"], settings["sample_steps"]) == (1.5, 4)
    json.dumps(settings)


def test_pictures(results):
    images = {"Label to image", "Real images", "Joint samples", "Unconditional images", "Misclassified images", "From noise to image"}
    plots = {"Image to label", "Label to image, as the SVM sees it"}
    assert set(results.figures) == images | plots
    for title, picture in results.figures.items():
        assert picture.caption
        assert picture.image.startswith("<svg") if title in plots else min(picture.image.size) > 100


def test_wrong_digits_are_found_out(train, test):
    made, means = experiment(train, test, wrong=1)
    metrics = JointImageLabel(draws=1, joint=100)(made, means, config(), jax.random.key(0), 7).metrics
    for name in ("conditional_agreement", "joint_agreement", "classification_accuracy_score"):
        assert metrics[name] < 0.05
    assert metrics["frechet_ratio"] < 1.4  # the images alone are right


def test_rare_classes_are_topped_up():
    asked = labels_to_ask(np.array([0, 0, 2, 0, 0]), classes=3, per_class=3)
    np.testing.assert_array_equal(asked, [0, 0, 2, 0, 0, 1, 1, 1, 2, 2])


def write_metrics(workdir):
    values = {"loss/label": 0.5, "note": "x", "grad_norm": 0.1, "skipped": 0}
    lines = [json.dumps({"step": step, "loss/image": 1 / step, **values}) for step in range(10, 510, 10)]
    lines += [json.dumps({"step": 500, "loss/image": 7.0}), "[1]", '{"step": 600, "loss/im']
    (workdir / "metrics.jsonl").write_text("\n".join(lines))


def test_report(results, tmp_path):
    write_metrics(tmp_path)
    cost = {"train_seconds": 321.5, "images_per_second": 2000.0, "steps": 500}
    drawing = Figure(plots.matrix(np.eye(2, dtype=int), "ab", "x", "y"), "c & d")
    odd = EvalResult(metrics={"odd": float("nan")}, figures={"a <b>": drawing})
    json_path, html_path = report.write(tmp_path, MEASURED, config(), [results, odd], 500, cost)
    found = json.loads(json_path.read_text())
    assert METRICS < set(found)
    assert found["frechet_ratio"] == results.metrics["frechet_ratio"] and found["odd"] is None
    assert (found["train_seconds"], found["images_per_second"], found["steps"], found["step"], found["seed"]) == (321.5, 2000, 500, 500, 3)
    assert found["config"]["sample"]["guidance"] == 1.5
    assert found["versions"]["jax"] == jax.__version__ and found["device"]["platform"] == jax.default_backend()
    page = html_path.read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "the page must open offline"
    assert "a &lt;b&gt;" in page and "c &amp; d" in page
    assert "skipped" not in page, "a chart of nothing but zeros"
    for text in ("Label to image", "data:image/png;base64,", "grad norm", "loss/image", "322 s of training"):
        assert text in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "report.json"]


def test_report_without_a_run(tmp_path):
    json_path, html_path = report.write(tmp_path, MEASURED, config(), [EvalResult({"a": 1.0})], 0)
    found = json.loads(json_path.read_text())
    assert found["a"] == 1 and found["train_seconds"] is None and found["steps"] is None
    with pytest.raises(UserError, match="cannot write the report"):
        report.write(tmp_path / "gone", MEASURED, config(), [EvalResult({"a": 1.0})], 0)


def test_metrics_survive_a_killed_run(tmp_path):
    write_metrics(tmp_path)
    curves = report.read_metrics(tmp_path / "metrics.jsonl")
    assert set(curves) == {"loss/image", "loss/label", "grad_norm", "skipped"}
    steps, values = curves["loss/image"]
    assert steps == list(range(10, 510, 10)) and values[-1] == 7  # the later line of a step that was repeated counts
    assert report.read_metrics(tmp_path / "none") == {}
    (tmp_path / "metrics.jsonl").write_text("[" * 10_000 + '\n{"step": 1, "a": %s}\n{"step": 2, "a": 3}\n' % ("9" * 400))
    assert report.read_metrics(tmp_path / "metrics.jsonl") == {"a": ([2.0], [3.0])}  # and a damaged file costs no report


ODD = [([1, 2], [3, 3]), ([5], [0.1]), (range(5000), np.linspace(1, 1e-5, 5000)), ([1, 2, 3], [-1, np.nan, 4]), ([1], [np.nan])]


@pytest.mark.parametrize("curve", ODD)
def test_charts_of_odd_curves(curve):
    chart = plots.lines({"loss": curve})
    assert "nan" not in chart and chart.count("<svg") == np.isfinite(np.asarray(curve[1])).any()


def test_findings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EvalResult({}).metrics = {}
