"""Evaluation on eight devices and in two processes: the values of one device."""

import json
import pathlib
import socket

import jax
import numpy as np
import pytest

from mmdiff.evals import evaluator, streaming

# The tiny model, measured in batches of three: by its samples, its predictions and the features of both, of a network of a few means.
CONFIG = f"""
import dataclasses, runpy, types

tiny = runpy.run_path({str(pathlib.Path(__file__).parents[1] / "tiny.py")!r})
get_config = tiny["get_config"]


def build(config):
    return dataclasses.replace(tiny["build"](config), evaluators=[measure])


def measure(experiment, params, config, key, step):
    import flax.linen as nn
    from mmdiff.encoders import preprocessing
    from mmdiff.evals import evaluator, sample_metrics, sampled_images

    class Means(nn.Module):
        def features(self, images):
            return {{"1280": images.mean(2)[:, :4, 0], "logits": 9 * images[:, 0, :, 0]}}

    resize = preprocessing.Preprocessing(8, "square", divisor=127.5, mean=1.0)
    encoder = types.SimpleNamespace(kind="efficientnet_lite0", net=Means(), params={{}}, preprocessing=resize, fingerprint="")
    data = experiment.test_data().take(range(40))
    labels = {{"label": data["label"]}}
    sampled = evaluator.sample_batched(experiment, params, key, labels, 40, batch=3, steps=2, guidance=1.5)["image"]
    predicted = evaluator.predict_batched(experiment, params, key, {{"image": data["image"]}}, "label", 3)
    shown = (sampled_images._shown(experiment.modalities["image"], images) for images in (sampled, data["image"]))
    metrics, definitions, _ = sample_metrics.compare(encoder.kind, *(sample_metrics.collect(encoder, images) for images in shown))
    own = {{"predicted": float(predicted[::7, 3].sum()), "sampled": float(abs(sampled[::7]).sum())}}
    return evaluator.EvalResult({{**metrics, **own}}, definitions)
"""


def test_eight_devices_give_the_bits_of_one(monkeypatch):
    weights = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)

    def noised(params, keys, given):
        noise = jax.vmap(lambda key: jax.random.normal(key, (16,)))(keys)
        return {"out": (given + noise) @ params, "sign": (given > 0).any(-1)}

    keys, given = evaluator.example_keys(jax.random.key(0), 41), np.random.default_rng(1).normal(size=(41, 16)).astype(np.float32)
    used, call = [], streaming.Spread.__call__
    monkeypatch.setattr(streaming.Spread, "__call__", lambda self, *given: used.append(len(given[0])) or call(self, *given))
    found = evaluator.in_batches(noised, weights, keys, given, 3)
    assert used[0] == 8
    monkeypatch.setattr(jax, "local_devices", lambda devices=jax.devices()[:1]: devices)
    for name, alone in evaluator.in_batches(noised, weights, keys, given, 3).items():
        np.testing.assert_array_equal(found[name], alone)
    np.testing.assert_allclose(found["out"], noised(weights, keys, given)["out"], rtol=1e-4, atol=1e-4)


def test_two_processes_measure_what_one_does(server, tmp_path):
    (tmp_path / "measured.py").write_text(CONFIG)
    run = ["--config", str(tmp_path / "measured.py"), "--workdir", str(tmp_path / "run")]
    job = {"workdir": str(tmp_path / "jobs"), "constants": {"HEARTBEAT_SECONDS": 600}}
    for command in ("train", "eval"):
        [answer] = server.run({**job, "argv": [command, *run]})
        assert answer["status"] == 0, answer
    report = tmp_path / "run/report.json"
    wanted = json.loads(report.read_text())
    report.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", "2", "--process"]
    jobs = [{**job, "name": i, "devices": 2, "argv": ["eval", *run, "--reuse", *where, str(i)]} for i in range(2)]
    answers = server.run(*jobs)  # nothing to reuse yet
    assert [answer["status"] for answer in answers] == [0, 0], answers
    found = json.loads(report.read_text())
    assert {"lite0-FD", "lite0-IS", "lite0-precision", "lite0-KID", "predicted", "sampled"} <= found.keys()
    for name, value in wanted.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-9), name
    assert wanted["device"]["count"] == 1 and found["device"]["count"] == 4
    assert "\nlite0-FD" not in (tmp_path / "jobs.error1.log").read_text()  # the first speaks for both
