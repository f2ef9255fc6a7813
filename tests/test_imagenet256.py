"""The ImageNet configs: what they build is what their headers say, and they train and sample in small."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import __main__ as cli
from mmdiff import config as configs
from mmdiff import former_names, nets, schedules
from mmdiff.data.latents import write_latents
from mmdiff.data.modalities import Labels, Latents
from mmdiff.errors import UserError
from mmdiff.nets.dit import SIZES
from mmdiff.processes import Gaussian, Noised, velocity

DIT, JOINT, SIT = (f"configs/imagenet256/{name}_xl2.py" for name in ("dit", "joint", "sit"))
MODALITIES = {"image": Latents(32, 32, 4), "label": Labels(1000)}


def build(path, **values):
    config, module = configs.load(path, [(name.replace("__", "."), str(value)) for name, value in values.items()])
    return module.build(config), config


@pytest.mark.parametrize("path, size", [(DIT, 674_834_720), (SIT, 674_834_720), (JOINT, 678_628_088)])
def test_the_size_is_the_published_one(path, size):
    """DiT-XL/2's checkpoint has 675,129,632 numbers, 294,912 of them the fixed positions."""
    experiment, config = build(path)
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == size
    assert {name: modality.shape for name, modality in experiment.modalities.items()} == experiment.shape
    assert config.train.global_batch == 256 and config.train.ema == 0.9999 and config.train.learning_rate == 1e-4


@pytest.mark.parametrize("path", [DIT, JOINT])
def test_data_at_the_door(path):
    experiment, _ = build(path)  # without data: the doors are passed later
    with pytest.raises(UserError, match="config.data.dir is empty"):
        experiment.train_data()
    experiment, _ = build(path, data__source="random")
    for source in (experiment.train_data(), experiment.test_data()):
        batch = source.take(np.arange(3))
        experiment.process.check(batch)
        assert {name: (array.shape[1:], array.dtype) for name, array in batch.items()} == {
            "image": ((32, 32, 4), np.float32), "label": ((), np.int32)}


def test_runs_of_before_the_published_times_keep_theirs():
    config, _ = configs.load(DIT)
    here = configs.flatten(config)
    before = {key: value for key, value in here.items() if key not in ("model.time_offset", "model.freq_shift", "model.mlp_norm_eps")}
    stored = former_names.keys(before, here)
    assert (here["model.time_offset"], stored["model.time_offset"], stored["model.freq_shift"]) == (-1.0, 0.0, 0.0)


def test_wrong_sizes_and_rules():
    for path in (DIT, JOINT):
        with pytest.raises(UserError, match="no DiT of size 'XXL'; choose one of S, B, L, XL"):
            build(path, model__size="XXL")
        with pytest.raises(UserError, match="config.train.scale_rule must be one of none, linear, sqrt, not 'cube'"):
            build(path, train__scale_rule="cube")


def test_the_direction_of_the_velocity():
    """1 - cosine, by hand; from an output of 0, with which training begins, there is a finite way on."""
    module, rng = configs.load("imagenet256/lightning_xl1")[1], np.random.default_rng(0)
    process, (out, x0, noise) = Gaussian(schedules.flow(), velocity), rng.normal(size=(3, 2, 4, 4, 5)).astype(np.float32)
    noised = Noised(x0, None, np.float32([0.2, 0.7]), noise)
    term = module.direction(process)
    value, (slope, zero) = jax.jit(lambda out: (
        term(out, noised), [jax.grad(lambda out: term(out, noised).sum())(at) for at in (out, jnp.zeros_like(out))]))(out)
    true = noise - x0
    cosine = (out * true).sum(-1) / np.linalg.norm(out, axis=-1) / np.linalg.norm(true, axis=-1)
    np.testing.assert_allclose(value, 1 - cosine.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose((slope * out).sum(-1), 0, atol=1e-6)  # its length does not matter
    assert np.isfinite(zero).all() and (np.sign(zero) == -np.sign(true)).all()


@pytest.mark.slow
def test_the_hybrid_loss_and_the_label_dropout(monkeypatch):
    """A network that predicts nothing has the squared error 1, and sees the null label in a tenth of the examples."""
    seen = []

    class Nothing:
        def apply(self, params, x, t, label):
            seen.append((np.asarray(t), np.asarray(label)))
            return jnp.zeros((*x.shape[:-1], 8))

    config, module = configs.load(DIT)
    monkeypatch.setattr(nets.DiT, "preset", lambda *args, **options: Nothing())
    size = 400
    batch = {name: modality.random(np.random.default_rng(0), size) for name, modality in MODALITIES.items()}
    value, metrics = module.build(config).loss(None, batch | {"index": np.arange(size, dtype=np.uint32)}, jax.random.key(0))
    t, label = seen[0]
    assert metrics["loss/image"] == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(value, metrics["loss/image"] + metrics["loss/sigma"] / (1000 * math.log(2)), rtol=1e-5)
    assert (label == 1000).mean() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / size))
    np.testing.assert_array_equal(label[label < 1000], batch["label"][label < 1000])
    assert np.abs(t * 1000 - np.rint(t * 1000)).max() < 1e-3 and t.min() > 0 and len(np.unique(t)) > 300


def test_dit_samples_at_its_own_times_and_guides_three_channels(monkeypatch):
    """The nodes 0, 4, 8, ... of 0 .. 999 (improved diffusion's space_timesteps for "250"), from N(0, 1) on."""
    seen = []

    class Labelled:
        """eps = 0.1 with a label, 0 without."""

        def apply(self, params, x, t, label):
            jax.debug.callback(lambda t: seen.append(float(t)), t[0])
            return jnp.broadcast_to(0.1 * (label < 1000)[:, None, None, None], (*x.shape[:-1], 8))

    config, module = configs.load(DIT)
    monkeypatch.setattr(nets.DiT, "preset", lambda *args, **options: Labelled())
    experiment, keys = module.build(config), jax.random.split(jax.random.key(0), 1)
    draw = jax.jit(experiment.sample, static_argnames=("steps", "guidance"))
    images = {w: draw(None, keys, {"label": jnp.zeros(1, jnp.int32)}, steps=250, guidance=w)["image"] for w in (1.5, 1.0)}
    jax.effects_barrier()
    stride, place, expected = 999 / 249, 0.0, []
    for _ in range(250):
        expected.append(round(place) + 1)
        place += stride
    assert expected[:3] == [1, 5, 9] and expected[-1] == 1000
    assert np.rint(1000 * np.asarray(seen[:250])).tolist() == expected[::-1] == np.rint(1000 * np.asarray(seen[250:])).tolist()
    change = np.abs(images[1.5] - images[1.0]).max((0, 1, 2))
    assert change[:3].min() > 1 and change[3] < 0.01
    image = experiment.process.parts["image"]
    ratio = image.prior(keys, (2,)) / dataclasses.replace(image, prior_std=None).prior(keys, (2,))
    np.testing.assert_allclose(ratio, 1 / image.schedule(jnp.ones(()))[1], rtol=1e-6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    for split, count in (("train", 40), ("val", 8)):
        rng = np.random.default_rng(count)
        write_latents(folder, split, [{name: modality.random(rng, count) for name, modality in MODALITIES.items()}], MODALITIES, shard=16)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path, terms", [(DIT, {"image", "sigma"}), (SIT, {"image"}), (JOINT, {"image", "label"})])
def test_train_and_sample_in_small(path, terms, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "XS", (2, 64, 4))
    small = [
        "--config", path, "--workdir", str(tmp_path / "run"), f"--config.data.dir={cache}",
        "--config.model.size=XS", "--config.model.patch=16", "--config.model.dtype=float32",
        "--config.train.steps=4", "--config.train.global_batch=16", "--config.train.microbatches=2", "--config.train.log_every=2",
        "--config.train.eval_every=4", "--config.train.tensorboard=false", "--config.sample.steps=2",
        "--config.train.noise_scale=true", '--config.train.norm_groups=[("blocks","blocks/"),("time","time/")]',
        "--config.train.scale_rule=sqrt",
    ]  # fmt: skip
    assert cli.main(["train", *small]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [2, 4] and "val/loss" in lines[-1]
    for line in trained:
        assert line["skipped"] == 0 and {f"loss/{term}" for term in terms} <= set(line)
        trace, grad_sq = line["noise_scale/trace"], line["noise_scale/grad_sq"]
        assert line["noise_scale"] == (pytest.approx(trace / grad_sq) if grad_sq > 0 else None)
        assert {"grad_norm/blocks", "grad_norm/time", "grad_norm/other", "param_norm/other"} <= set(line)

    assert cli.main(["sample", *small, "--given", "label=207", "--number", "2", "--out", str(tmp_path / "out")]) == 0
    samples = np.load(tmp_path / "out" / "samples.npz")
    assert samples["image"].shape == (2, 32, 32, 4) and np.isfinite(samples["image"]).all() and set(samples["label"]) == {207}
