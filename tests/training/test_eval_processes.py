"""Evaluation on eight devices and in two processes, of runs and of samples in files: the values of one device."""

import json
import pathlib
import socket

import jax
import numpy as np
import pytest
import tiny_encoders

from mmdiff.encoders.dinov2 import DINOv2
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


def two_processes(server, job, argv):
    """Runs a command in two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        argv = [*argv, "--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", "2", "--process"]
    answers = server.run(*({**job, "name": i, "devices": 2, "argv": [*argv, str(i)]} for i in range(2)))
    assert [answer["status"] for answer in answers] == [0, 0], answers


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
    two_processes(server, job, ["eval", *run, "--reuse"])  # nothing to reuse yet
    found = json.loads(report.read_text())
    assert {"lite0-FD", "lite0-IS", "lite0-precision", "lite0-KID", "predicted", "sampled"} <= found.keys()
    for name, value in wanted.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-9), name
    assert wanted["device"]["count"] == 1 and found["device"]["count"] == 4
    assert "\nlite0-FD" not in (tmp_path / "jobs.error1.log").read_text()  # the first speaks for both


@pytest.mark.parametrize("stored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_measure_files_of_samples_as_one_does(server, tmp_path, stored):
    tiny_encoders.publish(tmp_path / "dinov2", DINOv2(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    stream = np.random.default_rng(0)
    for name, brightest in (("samples", 200), ("real", 256)):
        np.savez(tmp_path / f"{name}.npz", arr_0=stream.integers(0, brightest, (21, 16, 16, 3), np.uint8))  # process 0 has 10, process 1 11
    command = ["eval", "--samples", str(tmp_path / "samples.npz"), "--network", "dinov2", "--weights", str(tmp_path / "dinov2")]
    command += ["--write-statistics"] if stored else ["--reference", str(tmp_path / "real.npz"), "--paired", "--json"]
    job = {"workdir": str(tmp_path / "jobs"), "constants": {"HEARTBEAT_SECONDS": 600}}
    alone, together = tmp_path / "alone.npz", tmp_path / "together.npz"
    [answer] = server.run({**job, "argv": [*command, str(alone)]})
    assert answer["status"] == 0, answer
    two_processes(server, job, [*command, str(together)])
    assert "PSNR" not in (tmp_path / "jobs.error1.log").read_text()  # the first speaks for both
    if stored:
        with np.load(alone) as alone, np.load(together) as together:
            for name in ("mu", "sigma"):
                np.testing.assert_allclose(together[name], alone[name], rtol=1e-6, atol=1e-7)  # features are float32, and batches differ
        return
    alone, together = json.loads(alone.read_text()), json.loads(together.read_text())
    assert together["convention"]["samples"] == 21 and {"PSNR", "SSIM", "DINOv2-precision"} < together["metrics"].keys()
    assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-6, abs=1e-9)
