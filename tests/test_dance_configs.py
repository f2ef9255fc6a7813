"""Dance to music by CDCD: each config builds, learns and samples in small; what is drawn knows nothing of the real music."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from mmdiff import config as configs
from mmdiff.__main__ import main
from mmdiff.data import network_cache, token_cache
from mmdiff.data.loader import batches
from mmdiff.data.sources import ArraySource, load_all
from mmdiff.errors import UserError
from mmdiff.nets.audio import AudioAutoencoder
from mmdiff.projects.dance import aist, dance
from mmdiff.projects.dance.speed import Speed
from mmdiff.training import sharding
from mmdiff.training.step import init_state, make_step, step_of

FOLDER = pathlib.Path(__file__).parents[1] / "configs/cdcd"
PAPERS = ("aist_music", "tiktok_music")
SMALL = {
    "model.width": "8", "model.depth": "1", "model.heads": "2", "dance.width": "8", "dance.depth": "1", "dance.heads": "2",
    "loss.count": "2", "train.warmup_steps": "0",
}  # fmt: skip
TINY_AUDIO = AudioAutoencoder(44_032, codes=512, code_size=2, widths=(2, 2, 4), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0))


def load(name, small=SMALL, **overrides):
    values = small | {key.replace("__", "."): str(value) for key, value in overrides.items()}
    if small and name in PAPERS:
        values["model.dtype"] = "float32"
    config, module = configs.load(str(FOLDER / f"{name}.py"), list(values.items()))
    return module.build(config), config


def flags(values):
    return [f"--config.{key}={value}" for key, value in values.items()]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, overrides",
    [
        ("dance_music", {"loss__sample_inter": "5e-6", "model__patch": "43"}),
        ("dance_music", {"dance__fused": "true", "dance__freeze": "true", "model__aligned": "false", "model__patch": "43"}),
        ("aist_music", {"data__video": "true", "loss__sample_inter": "5e-6"}),
        ("tiktok_music", {"dance__fused": "false", "loss__sample_inter": "5e-6"}),
    ],
)
def test_a_step_and_a_sample(name, overrides):
    experiment, config = load(name, data__source="random", **overrides)
    first = next(batches(experiment.train_data(), 0, 4))
    experiment.process.check(first)
    step = jax.jit(make_step(experiment.loss, experiment.optimizer))
    before = jax.jit(lambda key: init_state(experiment.init, experiment.optimizer, key, experiment.loss))(jax.random.key(0))
    after, metrics = step(before, first)
    wanted = {"loss/vlb", "loss/auxiliary", "loss/step_intra"} | ({"loss/sample_inter"} if "loss__sample_inter" in overrides else set())
    assert wanted <= set(metrics) and metrics["skipped"] == 0 and all(np.isfinite(value) for value in metrics.values())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)["params"]["encoder"]
    frozen = {name: moved.pop(name) for name in ("motion", "genre") if name in moved and config.dance.freeze}
    assert all(jax.tree.leaves(moved)) and not any(jax.tree.leaves(frozen)) and bool(frozen) == config.dance.freeze

    conditions = [each for each in experiment.shape if each != "music"]
    assert conditions == {"aist_music": ["motion", "genre", "video"], "tiktok_music": ["motion"]}.get(name, ["motion", "genre"])
    given = {each: first[each][:2] for each in conditions}
    draw = jax.jit(lambda params, keys, given: experiment.sample(params, keys, given, steps=2, guidance=1.5))
    drawn = draw(after.ema, jax.random.split(jax.random.key(1), 2), given)
    experiment.process.check({"music": drawn["music"], **given})  # no mask is left


def published(folder, data, splits, count=20):
    """Writes segments of made-up dances as those of AIST++ or TikTok lie in their folders; -> what was heard of each split."""
    heard = {}
    for part, split in enumerate(sorted(splits)):
        clips = load_all(dance.DanceMusic("train" if split == "train" else "test", count=count))
        inner, numbers = (f"{split}/", 219) if data == "aist" else ("", 75)
        names = [f"g{aist.CODES[genre]}_sBM_c01_d04_mBR0_ch02_seg{100 * part + i}" for i, genre in enumerate(clips["genre"])]
        motion = np.random.default_rng(len(split)).normal(size=(count, 120 if data == "aist" else 60, numbers))
        for kind, end in (("motion", "npy"), ("audio", "wav")):
            (folder / f"{kind}_s2" / inner).mkdir(parents=True, exist_ok=True)
            files = [f"{kind}_s2/{inner}{name}.{end}" for name in names]
            (folder / f"{data}_{kind}_{split}_segment.txt").write_text("\n".join(f"./all/{file}" for file in files) + "\n")
            for i, file in enumerate(files):
                if kind == "motion":
                    np.save(folder / file, motion[i])
                else:
                    soundfile.write(folder / file, clips["audio"][i], dance.RATE)
        np.save(folder / f"{split}_genre.npy", np.eye(10)[clips["genre"]])
        heard[split] = clips
    return heard


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_real_dances_are_measured_whose_beats_nobody_knows(name, tmp_path):
    data = name.split("_")[0]
    heard = published(tmp_path, data, {"train", "test"} | ({"val"} if data == "aist" else set()))
    net = dataclasses.replace(TINY_AUDIO, codes=2048)
    splits = {split: lambda split=split: aist.Segments(tmp_path, split, data) for split in heard}
    recipe = network_cache.CacheWriter(net, splits, "audio", "music")
    params = jax.jit(lambda key: net.init(key, jnp.zeros((1, 44_032))))(jax.random.key(0))
    assert recipe.write(tmp_path / "tokens", params, {"config": {}, "step": 0})

    cached = {"data__dir": tmp_path / "tokens", "sample__steps": 1, "eval__examples": 20, "eval__batch": 20}
    assert load(name, **cached)[0].evaluators == ()
    experiment, config = load(name, eval__segments=tmp_path, **cached)
    evaluator, = experiment.evaluators
    clips, known = load_all(evaluator.clips("test")), load_all(experiment.test_data())
    np.testing.assert_array_equal(clips["motion"], known["motion"])
    assert np.corrcoef(clips["audio"][7], heard["test"]["audio"][7][: len(clips["audio"][7])])[0, 1] > 0.999
    assert ("genre" in clips) == (name == "aist_music") and evaluator.decode(known["music"][:2]).shape == clips["audio"][:2].shape

    found = evaluator(experiment, jax.jit(experiment.init)(jax.random.key(0)), config, jax.random.key(1), 0)
    assert found.metrics["beat_f1_real"] == 1 > found.metrics["beat_f1"] and "onsets of the real music" in found.definitions["beat_f1"]
    assert ("genre_accuracy" in found.metrics) == (name == "aist_music")

    tokenizer, _ = load("music_tokenizer", small={}, data__name=data, data__dir=tmp_path)
    evaluator = dataclasses.replace(tokenizer.evaluators[0], net=net, windows=(256,))
    found = evaluator(tokenizer, params, config, jax.random.key(1), 0)
    assert found.metrics["beat_f1_real"] == 1 and "onsets of the real music" in found.definitions["beat_f1"]
    used = len(np.unique(load_all(token_cache.token_source(tmp_path / "tokens", "test"))["music"]))
    assert found.metrics["codebook_usage"] == used / 2048 and set(found.definitions) <= set(found.metrics)
    assert ("genre_accuracy" in found.metrics) == (name == "aist_music")


def test_the_settings_are_the_published_ones():
    for name, found in (("aist_music", [80, 16, 41_450]), ("tiktok_music", [100, 96, 2_483])):
        experiment, config = load(name, small={})
        assert [config.chain.steps, config.train.global_batch, config.train.steps] == found and config.sample.steps == found[0]
        assert [config.loss[key] for key in ("auxiliary", "step_intra", "sample_inter", "count")] == [5e-4, 5e-5, 0.0, 10]
        assert [config.train[key] for key in ("learning_rate", "warmup_steps", "patience")] == [2e-4, 1000, 60_000]
        params = jax.eval_shape(experiment.init, jax.random.key(0))["params"]
        assert count(params) - count(params["encoder"]) == {"aist_music": 406_494_208, "tiktok_music": 407_272_448}[name]
    experiment, _ = load("aist_music", small={}, data__seconds=6, data__video="true")
    assert experiment.shape == {"music": (1033,), "motion": (360, 73, 3), "genre": (), "video": (2048,)}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_the_full_width_lowers(name):
    experiment, config = load(name, small={}, data__source="random")
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    state = sharding.abstract_state(experiment.init, experiment.optimizer, mesh, experiment.rules, experiment.loss)
    example = {**experiment.train_data().take([0]), "index": np.zeros(1, np.uint32)}
    batch = {key: jax.ShapeDtypeStruct((config.train.global_batch, *array.shape[1:]), array.dtype) for key, array in example.items()}
    assert "bf16" in sharding.lower_step(step_of(experiment, config.train), state, batch, mesh).as_text()


def test_the_tokenizer_reads_the_published_segments(tmp_path):
    for name, splits in (("aist", ["train", "val", "test"]), ("tiktok", ["train", "test"])):
        experiment, _ = load("music_tokenizer", small={}, data__name=name, data__dir=tmp_path)
        assert list(experiment.cache.splits) == splits and experiment.shape["audio"] == (44_032,)
        with pytest.raises(UserError, match=f"no such file: .*{name}_motion_train_segment.txt"):
            experiment.train_data()
    experiment, _ = load("music_tokenizer", small={}, data__name="aist", data__seconds=6)
    assert experiment.cache.net.grid == (1033,)


def test_mistakes(tmp_path, capsys):
    for name in PAPERS:
        assert main(["eval", "--config", str(FOLDER / f"{name}.py"), "--workdir", str(tmp_path)]) == 2
        assert f"{name}.py measures nothing as it is set" in capsys.readouterr().err
        with pytest.raises(UserError, match="config.data.dir is empty: name the folder of a token cache"):
            load(name)[0].train_data()
    with pytest.raises(UserError, match="there is no token cache"):
        load("dance_music", data__dir=tmp_path / "none")[0].train_data()


# ------------------------------------------------------------------------------------------------- a run, from its cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The tokens of an untrained tokenizer."""
    out = tmp_path_factory.mktemp("caches") / "music"
    splits = {split: lambda split=split: dance.DanceMusic(split, count=20) for split in dance.COUNTS}
    recipe = network_cache.CacheWriter(TINY_AUDIO, splits, image="audio", tokens="music")
    params = jax.jit(lambda key: TINY_AUDIO.init(key, jnp.zeros((1, 44_032))))(jax.random.key(0))
    assert recipe.write(out, params, {"config": {}, "step": 0})
    return out


@pytest.fixture(scope="module")
def small(cache):
    experiment, config = load("dance_music", data__dir=cache, model__patch="43", sample__steps="2", eval__clips="20", eval__batch="10")
    return experiment, config, jax.jit(experiment.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def trajectory(small):
    """`(motion, genre, absent) -> states`, with the same keys."""
    experiment, _, params = small
    keys = jax.random.split(jax.random.key(2), 3)

    def states(given, absent):
        return experiment.sample(params, keys, given, steps=4, guidance=1.5, absent=absent, history=True)["music"]

    return jax.jit(states, static_argnames="absent")


@pytest.mark.slow
def test_drawing_starts_from_masks_and_never_sees_the_real_music(small, trajectory, monkeypatch):
    experiment, config, params = small
    clips = {name: array[:3] for name, array in experiment.test_data().arrays.items()}
    given = {name: np.asarray(clips[name]) for name in ("motion", "genre")}
    states = np.asarray(trajectory(given, ()))
    mask = experiment.process.parts["music"].mask
    assert (states[0] == mask).all() and (states[-1] < mask).all()
    assert ((states[:-1] == mask) >= (states[1:] == mask)).all()

    # The whole evaluation: with other music, in the cache and in the clips, the same is drawn.
    class Heard(Exception):
        pass

    def stop(self, audio, real, suffix=""):
        raise Heard(audio)

    monkeypatch.setattr("mmdiff.projects.dance.music.Listener.__init__", lambda self, clips: None)
    monkeypatch.setattr("mmdiff.projects.dance.music.Listener.metrics", stop)

    def heard(seed):
        rng = np.random.default_rng(seed)
        known = ArraySource({**experiment.test_data().arrays, "music": rng.integers(0, 512, (20, 344)).astype(np.int32)})
        real = ArraySource({"audio": rng.uniform(-1, 1, (20, 44_032)).astype(np.float32), "genre": np.asarray(known.arrays["genre"])})
        evaluator = dataclasses.replace(experiment.evaluators[0], clips=lambda split: real, training=lambda: real)
        with pytest.raises(Heard) as found:
            evaluator(dataclasses.replace(experiment, test_data=lambda: known), params, config, jax.random.key(3), 0)
        return found.value.args[0]

    first, second = heard(1), heard(2)
    assert first.shape == (20, 44_032)
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_an_absent_dance_has_no_say(small, trajectory):
    experiment, _, params = small
    clips = {name: np.asarray(array[:3]) for name, array in experiment.test_data().arrays.items()}
    x = {name: jnp.asarray(clips[name]) for name in experiment.shape}

    @jax.jit
    def out(x, absent):
        t = {"music": jnp.full(3, 0.5), "motion": absent, "genre": jnp.zeros(3)}
        noised = experiment.process.corrupt(jax.random.split(jax.random.key(4), 3), x, t)
        return experiment.apply(params, *experiment.process.inputs(noised.xt, noised.t))["music"]

    other = {**x, "motion": x["motion"][::-1] + 0.1}
    np.testing.assert_array_equal(out(x, jnp.ones(3)), out(other, jnp.ones(3)))
    assert float(jnp.abs(out(x, jnp.zeros(3)) - out(other, jnp.zeros(3))).max()) > 0
    assert trajectory({"genre": clips["genre"]}, ("motion",)).shape == (5, 3, 344)


@pytest.mark.slow
def test_speed(small):
    experiment, config, params = small
    found = Speed(given=("motion", "genre"), seconds=2.0, batch=3, repeats=1)(experiment, params, config, jax.random.key(0), 0)
    assert set(found.metrics) == set(found.definitions) == {"music_per_second", "music_per_second_quarter"}
    assert all(value > 0 for value in found.metrics.values())
    assert "3 clips at once, 2 steps" in found.definitions["music_per_second"]
    assert "1 steps" in found.definitions["music_per_second_quarter"]


@pytest.mark.slow
def test_the_commands(cache, tmp_path, monkeypatch):
    """Training, a wav from a motion file, and the report."""
    for split in dance.COUNTS:
        monkeypatch.setitem(dance.COUNTS, split, 20)
    run = ["--config", str(FOLDER / "dance_music.py"), "--workdir", str(tmp_path / "run")]
    once = {"train.steps": 1, "train.global_batch": 8, "train.eval_every": 0, "train.tensorboard": "false", "train.log_every": 1}
    values = SMALL | once | {"data.dir": cache, "model.patch": 43, "sample.steps": 2, "eval.clips": 20, "eval.batch": 10}
    assert main(["train", *run, *flags(values)]) == 0

    rotations, path = dance.DanceMusic("test", count=20).poses(5)
    aist.write_motion(tmp_path / "dance.pkl", rotations, path)
    out = ["--out", str(tmp_path / "out"), "--number", "2", "--given", f"motion={tmp_path / 'dance.pkl'}"]
    assert main(["sample", *run, *out, "--given", "genre=house"]) == 0
    for number in range(2):
        assert aist.read_wav(tmp_path / f"out/music_{number}.wav").shape == (44_032,)
    assert {"samples.npz", "samples_music.png", "samples_motion.png"} <= {file.name for file in (tmp_path / "out").iterdir()}
    with np.load(tmp_path / "out/samples.npz") as arrays:
        assert arrays["music"].shape == (2, 344) and arrays["genre"].tolist() == [5, 5]
    assert main(["sample", *run, *out]) == 0  # without a genre

    assert main(["eval", *run]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert {"beat_coverage", "beat_hit_shuffled", "beat_f1", "genre_accuracy", "frechet_audio", "music_per_second"} <= set(report)


@pytest.fixture(scope="module")
def experiments(loaded_launch):
    return loaded_launch("dance_experiments")


def test_the_experiments_name_values_that_exist(experiments):
    every = experiments.settings()
    assert [name for _, name, _, _ in every] == ["vanilla", "step-intra", "sample-inter"]
    for *_, overrides in every:
        configs.load(str(FOLDER / "dance_music.py"), list(overrides.items()))


@pytest.mark.slow
def test_an_experiment_runs(experiments, cache, monkeypatch):
    for split in dance.COUNTS:
        monkeypatch.setitem(dance.COUNTS, split, 20)
    few = SMALL | {"data.dir": str(cache), "model.patch": "43", "train.steps": "1", "sample.steps": "1", "eval.clips": "20"}
    metrics, seconds = experiments.run(1, "dance_music", experiments.LOSSES["sample-inter"] | few | {"train.global_batch": "4"})
    assert set(metrics) == set(experiments.METRICS) and all(np.isfinite(value) for value in metrics.values()) and seconds > 0
