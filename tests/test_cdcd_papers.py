"""The paper's images by CDCD: from a stored set over a tokenizer and its cache to a trained step and a sample, in small."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_sets

from mmdiff import config as configs
from mmdiff.__main__ import main
from mmdiff.data import network_cache, token_cache
from mmdiff.data.loader import batches
from mmdiff.data.sources import load_all
from mmdiff.data.token_cache import open_tokenizer, read_meta, token_source
from mmdiff.errors import UserError
from mmdiff.training import sharding
from mmdiff.training.step import init_state, make_step, step_of

FOLDER = pathlib.Path(__file__).parents[1] / "configs/cdcd"
TEXTS = ("coco_text", "cub200_text")
NAMES = ("imagenet256_class", *TEXTS)
SMALL = {"model.width": "32", "model.depth": "2", "model.dtype": "float32"}
SMALL_TEXT = {"text.published": "false", "text.width": "16", "text.depth": "1", "text.heads": "2"}


def load(name, **overrides):
    values = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
    config, module = configs.load(str(FOLDER / f"{name}.py"), values)
    return module.build(config), config


def small(name):
    return SMALL | (SMALL_TEXT if name in TEXTS else {})


def flags(values):
    return [f"--config.{key}={value}" for key, value in values.items()]


def underscored(values):
    return {key.replace(".", "__"): value for key, value in values.items()}


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The folder of every set, by its name."""
    tfds = tmp_path_factory.mktemp("tfds")
    for builder in (small_sets.ImageNet, small_sets.Coco):
        small_sets.prepare(builder, tfds)
    return {"imagenet2012": tfds, "coco_captions": tfds, "cub200": small_sets.cub200(tmp_path_factory.mktemp("cub"))}


SETS = {"imagenet256_class": "imagenet2012", "coco_text": "coco_captions", "cub200_text": "cub200"}


TINY = {"model.features": 8, "model.encoder_blocks": 1, "model.decoder_blocks": 1}


@pytest.fixture(scope="module")
def caches(sets, tmp_path_factory):
    """`name of a config -> its cache`, by an untrained tokenizer; test_the_commands trains one."""
    made = {}

    def cache(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "tokens"
            experiment, _ = load("images_tokenizer", **underscored(TINY), data__name=SETS[name], data__dir=sets[SETS[name]])
            params = jax.jit(experiment.init)(jax.random.key(0))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(network_cache, "PIXELS", 2 * 256**2)
                assert experiment.cache.write(made[name], params, {"config": {}, "step": 0})
        return made[name]

    return cache


@pytest.mark.parametrize("name, parameters", [("imagenet256_class", 517_792_206), ("coco_text", 98_964_359), ("cub200_text", 98_964_359)])
def test_the_networks_and_settings_are_the_published_ones(name, parameters):
    """517.8 M, and 35.8 M beside the text encoder."""
    experiment, config = load(name)
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    if name in TEXTS:  # the published text encoder is none of the model's parameters
        assert round(count(params) / 1e6, 1) == 35.8 and experiment.shape["text"] == (77, 512)
        params = jax.eval_shape(load(name, text__published=False)[0].init, jax.random.key(0))
    assert count(params) == parameters
    assert config.chain.steps == 80 and config.loss.count == 10 and config.train.ema == pytest.approx(0.99 ** (1 / 25), abs=1e-5)
    found = [config.train[key] for key in ("learning_rate", "warmup_steps", "patience", "global_batch")]
    found += [config.loss[key] for key in ("auxiliary", "step_intra", "sample_inter")] + [config.sample.top_p]
    assert found == {
        "imagenet256_class": [4.5e-4, 5000, 100_000, 192, 1e-3, 5e-5, 0.0, 0.86],
        "coco_text": [2e-4, 1000, 60_000, 32, 5e-4, 5e-5, 0.0, 0.85],
        "cub200_text": [4.5e-4, 1000, 25_000, 48, 5e-4, 0.0, 5e-6, 0.85],
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_full_width_lowers(name):
    experiment, config = load(name, data__source="random")
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    state = sharding.abstract_state(experiment.init, experiment.optimizer, mesh, experiment.rules, experiment.loss)
    example = {**experiment.train_data().take([0]), "index": np.zeros(1, np.uint32)}
    batch = {key: jax.ShapeDtypeStruct((config.train.global_batch, *array.shape[1:]), array.dtype) for key, array in example.items()}
    lowered = sharding.lower_step(step_of(experiment, config.train), state, batch, mesh)
    assert "bf16" in lowered.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_step_and_a_sample_from_a_cache(name, caches, monkeypatch):
    monkeypatch.setattr(network_cache, "PIXELS", 2 * 256**2)
    cache, condition = caches(name), "text" if name in TEXTS else "label"
    experiment, _ = load(name, **underscored(small(name)), data__dir=cache, loss__count=2, train__warmup_steps=0, sample__top_p=1e-6)
    assert (experiment.frozen_deps["tokenizer"]() == token_cache.read_meta(cache)["fingerprint"]) == (name not in TEXTS)  # words count, too
    step = jax.jit(make_step(experiment.loss, experiment.optimizer))
    before = jax.jit(lambda key: init_state(experiment.init, experiment.optimizer, key, experiment.loss))(jax.random.key(0))
    after, metrics = step(before, next(batches(experiment.train_data(), 0, 2)))
    contrast = "loss/sample_inter" if name == "cub200_text" else "loss/step_intra"
    assert {"loss/vlb", "loss/auxiliary", contrast} <= set(metrics) and metrics["skipped"] == 0
    assert all(np.isfinite(value) for value in metrics.values())
    same = jax.tree.map(lambda a, b: a.ndim > 1 and bool((a == b).all()), before.params, after.params)
    assert not any(jax.tree.leaves(same)), same

    words = "a red square, seen here" if condition == "text" else "7"
    given = {condition: np.repeat(experiment.modalities[condition].parse(words), 2, 0)}
    assert experiment.modalities[condition].show(given[condition]) == [words] * 2
    draw = jax.jit(lambda params, keys, given: experiment.sample(params, keys, given, steps=1, guidance=1.5)["tokens"])
    drawn = np.asarray(draw(after.ema, jax.random.split(jax.random.key(1), 2), given))
    experiment.process.check({"tokens": drawn, **given})  # no mask is left
    np.testing.assert_array_equal(*drawn)  # truncated to the likeliest token, in one step: nothing is left to chance
    figures = experiment.modalities["tokens"].show(drawn)
    assert figures.shape == (2, 256, 256, 3) and figures.dtype == np.uint8


@pytest.mark.slow
def test_the_commands(sets, tmp_path, capsys):
    """A tokenizer, its metrics, its cache, training from that and a sample, as the head of coco_text.py says."""
    once = {"train.steps": 1, "train.log_every": 1, "train.tensorboard": "false", "train.global_batch": 8}
    tokenizer = ["--config", str(FOLDER / "images_tokenizer.py"), "--workdir", str(tmp_path / "tokenizer")]
    values = TINY | once | {"data.name": "coco_captions", "data.dir": sets["coco_captions"], "train.eval_every": 0}
    assert main(["train", *tokenizer, *flags(values)]) == 0
    assert main(["eval", *tokenizer]) == 0
    report = json.loads((tmp_path / "tokenizer/report.json").read_text())
    assert report["frechet_ratio"] > 0 and report["reconstruction_mse"] > 0
    assert main(["cache", *tokenizer, "--out", str(tmp_path / "tokens")]) == 0
    run = ["--config", str(FOLDER / "coco_text.py"), "--workdir", str(tmp_path / "run")]
    values = small("coco_text") | once | {"data.dir": tmp_path / "tokens", "eval.examples": 8, "train.eval_every": 1, "loss.count": 2}
    assert main(["train", *run, *flags(values)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"loss/step_intra", "val/loss"} <= set().union(*lines) and lines[0]["skipped"] == 0
    out = ["--out", str(tmp_path / "out"), "--number", "1", "--given", "text=a red square, seen here"]
    assert main(["sample", *run, *out, "--steps", "2"]) == 0
    assert "text: a red square, seen here" in capsys.readouterr().out and (tmp_path / "out/samples.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_and_what_training_reads(name, caches):
    cache = caches(name)
    experiment, config = load(name, data__dir=cache, **underscored(small(name)))
    meta, train = read_meta(cache), experiment.train_data()
    assert [meta["grid"], meta["codes"]] == {"imagenet256_class": [[16, 16], 974]}.get(name, [[32, 32], 2887])
    stored = load_all(token_source(cache, "train"))
    if name in TEXTS:
        words = open_tokenizer(config.data, 77)
        assert words.size <= 49408 and stored["text"].shape == (6, {"coco_text": 5, "cub200_text": 10}[name], 77)
        assert len(train) == 6 * stored["text"].shape[1] and load_all(train)["text"].shape == (len(train), 77)
        assert words.decode(stored["text"][2, :1]) == ["a blue square, seen once" + (", take 0" if name == "cub200_text" else "")]
    else:
        np.testing.assert_array_equal(load_all(train)["label"], 7 * np.arange(6))
    batch = next(batches(train, 0, 4))
    experiment.process.check(batch)
    kinds = {"label": ()} if name == "cub200_text" else {}  # negatives are of another kind of bird
    assert {key: array.shape[1:] for key, array in batch.items() if key != "index"} == experiment.shape | kinds


@pytest.mark.parametrize("name, freeze", [("imagenet256_class", None), ("coco_text", False), ("coco_text", True)])
def test_what_decays(name, freeze):
    """Without a gradient the released optimizer still shrinks all weights, norms and biases included, but none of a frozen encoder."""
    experiment, config = load(name, **underscored(small(name)), **({} if freeze is None else {"text__freeze": freeze}))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), jax.eval_shape(experiment.init, jax.random.key(0)))

    @jax.jit
    def updated(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return experiment.optimizer.update(zeros, experiment.optimizer.init(params), params, value=1.0)[0]["params"]

    updates = updated(params)
    frozen = updates.pop("encoder", {})
    (updates if not freeze else {})["encoder"] = frozen
    rate = 3e-6  # where the warm-up starts
    assert all(np.allclose(leaf, -rate * config.train.weight_decay, rtol=1e-5, atol=0) for leaf in jax.tree.leaves(updates))
    assert not freeze or (frozen and not any(leaf.any() for leaf in jax.tree.leaves(frozen)))


def test_mistakes(caches, tmp_path):
    for name in NAMES:
        experiment, _ = load(name)  # without data: the doors are passed later
        assert experiment.frozen_deps["tokenizer"]() is None
        with pytest.raises(UserError, match="config.data.dir is empty: name the folder of a token cache"):
            experiment.train_data()
        with pytest.raises(UserError, match="choose tokens or random"):
            load(name, data__source="tfds")[0].train_data()
    with pytest.raises(UserError, match="there is no token cache"):
        load("coco_text", data__dir=tmp_path / "none")[0].train_data()
    with pytest.raises(UserError, match="has captions as ids, but the config needs what a published encoder makes of them"):
        load("coco_text", data__dir=caches("coco_text"))[0].train_data()
    cache = caches("imagenet256_class")
    with pytest.raises(UserError, match=r"has no captions \(no words.json\)"):
        load("coco_text", data__dir=cache, text__published=False)
    with pytest.raises(UserError, match="has 32 x 32 tokens of 2887 codes, but the config needs 16 x 16 of 974"):
        load("imagenet256_class", data__dir=caches("coco_text"))[0].train_data()
    with pytest.raises(UserError, match="there is no set of images 'imagenet'"):
        load("images_tokenizer", data__name="imagenet", data__dir=tmp_path)[0].train_data()
