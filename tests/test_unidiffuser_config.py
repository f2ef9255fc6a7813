"""The UniDiffuser config in small: its weights start a training unchanged, its guidance is the published one, its two times are two."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled

from mmdiff import __main__ as cli
from mmdiff import config as configs
from mmdiff import open_run, sampling
from mmdiff.convert import layouts, unidiffuser
from mmdiff.convert.weight_writer import write_weights
from mmdiff.data.latents import write_latents
from mmdiff.errors import UserError
from mmdiff.processes import eps

CONFIG = str(pathlib.Path(__file__).parents[1] / "configs/joint/unidiffuser.py")
TINY = {
    "model.width": 16, "model.depth": 2, "model.heads": 2, "model.dtype": "float32", "model.scan": False, "data.size": 4,
    "data.vector": 6, "text.size": 5, "data.source": "random"}
TRAIN = {
    "train.steps": 3, "train.global_batch": 4, "train.warmup_steps": 0, "train.log_every": 1, "train.eval_every": 0,
    "train.tensorboard": False, "train.learning_rate": 1e-30, "train.ema": 0.5, "data.source": "latents"}
SHAPES = {"image": (4, 4, 4), "vision": (6,), "text": (77, 5)}


def call(*args):
    return cli.main([str(arg) for arg in args])


def of(workdir, values={}):
    return "--config", CONFIG, "--workdir", workdir, *(f"--config.{key}={value}" for key, value in {**TINY, **values}.items())


@pytest.fixture(scope="module")
def experiment(one_device):
    return configs.build(*configs.load(CONFIG, [(key, str(value)) for key, value in TINY.items()]))


def normal(seed, count=2):
    """An array of each modality."""
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {name: jax.random.normal(key, (count, *shape)) for key, (name, shape) in zip(keys, SHAPES.items())}


def times(image, text, count=2):
    return {name: jnp.full(count, text if name == "text" else image) for name in SHAPES}


@pytest.fixture(scope="module")
def params(experiment):
    """With outputs that are not 0, as they are at first."""
    return filled(experiment.net, normal(0), times(0.5, 0.5))


def cache(folder, modalities):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        examples = {name: rng.standard_normal((count, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
        write_latents(folder, split, [examples], modalities)
    return folder


@pytest.mark.slow
def test_published_weights_start_a_training_from_a_cache_with_equal_outputs(experiment, params, tmp_path, capsys):
    """A pipeline of diffusers becomes a run; three steps that start from it, of a vanishing rate, leave its weights: averages round."""
    net = experiment.net
    write_weights(
        tmp_path / "pipeline/unet", layouts.state_dict(unidiffuser.UNIDIFFUSER_DIFFUSERS, net, params["params"]),
        unidiffuser.diffusers_config(net, {}))
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    (tmp_path / "none").mkdir()
    (tmp_path / "none/model_index.json").write_text("{}")
    assert call("convert", *of(tmp_path / "u"), "--from", tmp_path / "none", "--as", "unidiffuser") == 2
    assert "is a pipeline without a folder transformer or unet" in capsys.readouterr().err
    assert call("convert", *of(tmp_path / "u"), "--from", tmp_path / "pipeline", "--as", "unidiffuser") == 0
    assert "AGPL-3.0 for the authors' code" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, open_run(CONFIG, tmp_path / "u").params, params)
    # A text has no decoder: its states are stored, and no picture is made of them.
    out = "--absent", "image", "--absent", "vision", "--steps", 1, "--number", 2, "--out", tmp_path / "out"
    assert call("sample", *of(tmp_path / "u"), *out) == 0
    assert "text: vectors [2, 77, 5], no images and no words: they are in samples.npz alone" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["samples.npz"]
    start = {"train.start": tmp_path / "u", "train.start_strict": True, "data.dir": cache(tmp_path / "cache", experiment.modalities)}
    assert call("train", *of(tmp_path / "tuned", TRAIN | start)) == 0
    lines = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()]
    seen = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    assert [step for step, *_ in seen] == [1, 2, 3] and np.isfinite(seen).all() and min(norm for *_, norm in seen) > 0
    assert json.loads((tmp_path / "tuned/source.json").read_text())["kind"] == "unidiffuser"
    tuned = open_run(CONFIG, tmp_path / "tuned").params
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-7), tuned, params)


def test_the_loss_is_of_all_noises_as_one_vector(experiment, params):
    """Terms that are means over their numbers, weighted by how many these are, make the mean over all, up to the image's share."""
    batch = {**normal(3), "index": np.arange(2)}
    value, metrics = jax.jit(experiment.loss)(params, batch, jax.random.key(4))
    counts = {name: np.prod(shape) for name, shape in SHAPES.items()}
    summed = sum(metrics[f"loss/{name}"] * count for name, count in counts.items())
    assert len({*counts.values()}) > 1
    np.testing.assert_allclose(value, summed / counts["image"], rtol=1e-6)


GUIDING = {"image": ("text",), "vision": ("text",), "text": ("image", "vision")}  # what each is guided by


def guided(experiment, prior, w):
    """As the sampler does it: all three sampled."""
    return sampling.guided(
        experiment.apply, dict.fromkeys(SHAPES, w), (), experiment.process, each=tuple(SHAPES), prior=prior, shared=[("image", "vision")])


def test_guidance_is_the_published_combination_of_three_calls(experiment, params):
    """(1 + 7) c - 7 u, where what guides has noise in its place at time 1; the latents and the vector do not guide each other."""
    x, t, noise = normal(1), times(0.4, 0.4), normal(2)
    found = jax.jit(guided(experiment, noise, 8.0))(params, x, t)
    apply = jax.jit(experiment.apply)
    c = apply(params, x, t)
    for name, gone in GUIDING.items():
        u = apply(params, {**x, **{other: noise[other] for other in gone}}, {**t, **dict.fromkeys(gone, jnp.ones(2))})
        np.testing.assert_allclose(found[name], 8 * c[name] - 7 * u[name], atol=2e-5)


def test_what_is_absent_is_noise_that_the_network_sees(experiment, params):
    """At time 1 the network reads the noise in a text's place, which changes the image's output; but no text does: bit for bit."""
    apply, x, t = jax.jit(experiment.apply), normal(1), times(0.4, 1.0)
    one, other = (apply(params, {**x, "text": normal(seed)["text"]}, t)["image"] for seed in (2, 3))
    assert jnp.abs(one - other).max() > 1e-3
    unguided = jax.jit(guided(experiment, normal(4), 0.0))
    texts = [unguided(params, {**x, "text": normal(seed)["text"]}, times(0.4, 0.0)) for seed in (2, 3)]
    for name in ("image", "vision"):
        np.testing.assert_array_equal(*(out[name] for out in texts))
    assert jnp.abs(texts[0]["text"] - texts[1]["text"]).max() > 1e-3


def test_the_sampler_takes_the_image_and_its_vector_together(experiment, params):
    keys, x = jax.random.split(jax.random.key(0), 2), normal(1)
    sample = jax.jit(lambda given: experiment.sample(params, keys, given, steps=2, guidance=8.0))
    texts = sample({name: x[name] for name in ("image", "vision")})
    assert np.isfinite(texts["text"]).all() and all(np.array_equal(texts[name], x[name]) for name in ("image", "vision"))
    with pytest.raises(UserError, match="image and vision have one time, and vision alone cannot be given: give, leave out or sample them"):
        experiment.sample(params, keys, {"vision": x["vision"]}, steps=2, guidance=8.0)
    with pytest.raises(UserError, match="image and vision have one time, and image alone cannot be absent"):
        experiment.sample(params, keys, {}, steps=2, guidance=1.0, absent=("image",))
    for shared in ("image", "vision"), [("image",)], [("image", "depth")], [("image", "vision"), ("text", "vision")]:
        with pytest.raises(UserError, match="shared is groups of "):
            sampling.make_sampler(experiment.process, experiment.apply, SHAPES, shared=shared)
        with pytest.raises(UserError, match="shared is groups of "):
            sampling.guided(experiment.apply, 2.0, (), experiment.process, each=("text",), prior=x, shared=shared)
    for options in {"order": tuple(SHAPES)}, {"paths": {"vision": lambda t: t**2}}:
        with pytest.raises(UserError, match="image and vision have one time: they need one path"):
            sampling.make_sampler(experiment.process, experiment.apply, SHAPES, shared=[("image", "vision")], **options)
    path = sampling.settled_at(0.5)
    sampling.make_sampler(experiment.process, experiment.apply, SHAPES, shared=[("image", "vision")], paths={"image": path, "vision": path})


def test_the_chain_is_stable_diffusion_s_at_times_counted_from_1(experiment):
    """The network is told 1000 t, with 0 for what is given; alpha_bar at i / 1000 has i betas."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha, sigma = experiment.process.parts["text"].schedule(np.array([1, 500, 1000]) / np.float32(1000))
    np.testing.assert_allclose(alpha**2, np.cumprod(1 - betas)[[0, 499, 999]], rtol=2e-6)
    assert {part.predict for part in experiment.process.parts.values()} == {eps}
    prior = experiment.process.prior(jax.random.split(jax.random.key(0), 64), SHAPES)
    assert all(abs(float(x.std()) - 1) < 0.03 for x in prior.values())
