"""The DiffDis configs in small: each trains and is measured by the commands; the tasks do not see each other's text."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoders
from PIL import Image

from mmdiff import __main__ as cli
from mmdiff import config as configs
from mmdiff import former_names
from mmdiff.data.loader import batches
from mmdiff.data.sources import RandomSource
from mmdiff.data.tower_cache import Towers
from mmdiff.errors import UserError
from mmdiff.evals import report
from mmdiff.nets.dit import SIZES
from mmdiff.projects.digits.digit_alignment import DigitAlignment
from mmdiff.projects.scenes.captioned_scenes import CaptionedScenes
from mmdiff.projects.scenes.scene_alignment import SceneAlignment, SceneTowers
from mmdiff.training import loop
from mmdiff.training.step import init_state, step_of

FOLDER = pathlib.Path(__file__).parents[1] / "configs/diffdis"
TRAIN = {
    "train.steps": 3, "train.global_batch": 8, "train.warmup_steps": 1, "train.log_every": 1, "train.eval_every": 3,
    "train.checkpoint_every": 3, "train.tensorboard": False}
NET = {"model.width": 16, "model.depth": 2, "model.heads": 2, "model.shared": 1, "query.size": 8, "sample.steps": 2}
TOWERS = {
    "model.size": 8, "model.depth": 1, "model.width": 16, "model.text_depth": 1, "model.text_width": 16, "model.heads": 2,
    "model.patch": 8}  # fmt: skip


def load(name, **overrides):
    values = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
    config, module = configs.load(str(FOLDER / f"{name}.py"), values)
    return module.build(config), config


def options(name, workdir, values):
    given = [f"--config.{key}={value}" for key, value in values.items()]
    return ["--config", str(FOLDER / f"{name}.py"), "--workdir", str(workdir), *given]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Eight simulated devices wait for each other in vain where a machine of two cores is busy; the mesh has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: first)
        yield


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A run of tiny towers, and their folder."""
    folder = tmp_path_factory.mktemp("towers")
    given = options("scenes_towers", folder / "run", {**TRAIN, **TOWERS})
    assert cli.main(["train", *given]) == 0
    assert cli.main(["cache", *given, "--out", str(folder / "towers")]) == 0
    return folder


def measured(monkeypatch, given, workdir):
    found = []

    def write(workdir, experiment, config, results, *rest, real=report.write):
        found.extend(results)
        return real(workdir, experiment, config, results, *rest)

    monkeypatch.setattr(report, "write", write)
    assert cli.main(["eval", *given]) == 0
    written = json.loads((workdir / "report.json").read_text())
    for part in found:
        assert part.metrics and set(part.definitions) <= set(part.metrics)
        assert all(written[metric] is not None for metric in part.metrics)  # null is what is not finite
    return found[0]


def less(monkeypatch, kind, **fields):
    """The evaluator in small: the defaults of its fields are others."""
    real = kind.__init__

    def init(self, *args, **named):
        real(self, *args, **{**named, **fields})

    monkeypatch.setattr(kind, "__init__", init)


@pytest.mark.slow
def test_towers_are_measured_and_kept(towers, monkeypatch, capsys):
    less(monkeypatch, SceneTowers, count=200)
    given = options("scenes_towers", towers / "run", {**TRAIN, **TOWERS})
    found = measured(monkeypatch, given, towers / "run")
    assert {"retrieval_r1", "retrieval_r1_held_out", "digit_accuracy"} <= set(found.metrics)
    capsys.readouterr()
    assert cli.main(["cache", *given, "--out", str(towers / "towers")]) == 0
    assert f"nothing to do: {towers / 'towers'} holds the towers of step 3" in capsys.readouterr().out
    assert cli.main(["sample", *given]) == 2
    assert "this model samples nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_scenes_train_and_all_their_figures_are_there(towers, tmp_path, monkeypatch, capsys):
    less(monkeypatch, CaptionedScenes, count=200)
    less(monkeypatch, SceneAlignment, choose=2)
    given = options("scenes", tmp_path, {**TRAIN, **NET, "data.towers": towers / "towers"})
    assert cli.main(["train", *given]) == 0
    seen = {key for line in (tmp_path / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert {"generate/loss/image", "generate/loss/text", "align/loss/infonce", "val/loss"} <= seen
    found = measured(monkeypatch, given, tmp_path)
    assert {
        "retrieval_r1", "retrieval_r1_all_digits", "retrieval_r1_held_out", "retrieval_r1_50", "retrieval_r1_1_of_8", "prompt_correctness",
        "round_trip", "caption_correctness", "prompt_correctness_best_of_2", "towers_retrieval_r1",
        "towers_retrieval_r1_all_digits"} <= set(found.metrics)  # fmt: skip
    assert {"Caption to image", "Image to caption"} <= set(found.figures)
    noted = json.loads((tmp_path / "dependencies.json").read_text())
    assert noted == {"towers": Towers(str(towers / "towers")).fingerprint()}
    (tmp_path / "dependencies.json").write_text(json.dumps({"towers": "0" * 64}))
    capsys.readouterr()
    assert cli.main(["eval", *given]) == 2 and cli.main(["train", *given]) == 2
    assert capsys.readouterr().err.count("was trained with towers of fingerprint 000000000000") == 2


@pytest.mark.slow
def test_digits_train_and_all_their_figures_are_there(tmp_path, monkeypatch):
    less(monkeypatch, DigitAlignment, slow=10, per_class=5, choose=2, stages=((1, 2), (1, 1)))
    given = options("digits", tmp_path, {**TRAIN, **NET})
    assert cli.main(["train", *given]) == 0
    found = measured(monkeypatch, given, tmp_path)
    assert {
        "alignment_accuracy", "alignment_accuracy_1", "alignment_accuracy_50", "alignment_accuracy_dropped", "round_trip",
        "alignment_accuracy_shuffled", "diffusion_classifier_accuracy", "conditional_agreement", "milliseconds_50_cached",
        "best_of_2_agreement"} <= set(found.metrics)  # fmt: skip


@pytest.mark.parametrize("overrides", [
    {}, pytest.param({"fusion": "shared"}, marks=pytest.mark.slow), pytest.param({"two_way": "True"}, marks=pytest.mark.slow)],
    ids=["mmdit", "shared", "two-way"])
def test_neither_task_sees_the_other_ones_text(overrides):
    """Both passes in one call: names are the same whatever the captions, images whatever the queries; each depends on its own."""
    experiment, config = load(
        "digits", **{key.replace(".", "__"): value for key, value in NET.items()},
        **{f"model__{key}": value for key, value in overrides.items()})
    net, data = experiment.evaluators[0].aligner.net, experiment.test_data().take(np.arange(4))
    params = jax.jit(experiment.init)(jax.random.key(0))
    params = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape), params)  # zeros would hide things
    t = {"image": jnp.zeros(4), "text": jnp.zeros(4), "query": jnp.full(4, 0.5)}
    run = jax.jit(net.apply)
    x = {name: jnp.asarray(data[name]) for name in t}
    out = run(params, x, t)
    text, query, image = (run(params, {**x, name: x[name][::-1]}, t) for name in ("text", "query", "image"))
    np.testing.assert_array_equal(out["query"], text["query"])
    np.testing.assert_array_equal(out["image"], query["image"])
    for name, other in (("image", text), ("query", query), ("query", image)):
        assert float(jnp.abs(out[name] - other[name]).max()) > 1e-4


@pytest.mark.parametrize("name", ["digits", "scenes", "sd_scale"])
def test_made_up_examples_have_all_that_the_loss_needs(name):
    """`mmdiff aot` and `mmdiff bench` know the batch from the modalities."""
    experiment, _ = load(name)
    batch = {**RandomSource(experiment.modalities).take([0, 1]), "index": np.arange(2, dtype=np.uint32)}
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    loss, metrics = jax.eval_shape(experiment.loss, params, batch, jax.random.key(0))
    assert loss.shape == () and {"generate/loss/image", "align/loss/infonce"} <= set(metrics)


def test_scenes_say_what_they_lack(tmp_path):
    experiment, _ = load("scenes", data__towers=tmp_path / "none", model__width=16)
    with pytest.raises(UserError, match="there are no towers in .*scenes_towers.py"):
        experiment.train_data()
    with pytest.raises(UserError, match="choose infonce or siglip"):
        load("scenes", query__loss="clip")
    with pytest.raises(UserError, match="choose both, generate or align"):
        load("scenes", tasks="paint")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["infonce", "siglip", "mse"])
def test_the_losses_of_a_query(loss):
    """A new network's query: InfoNCE near log B whatever the scale, and every loss has a gradient on the shared trunk."""
    experiment, _ = load("digits", **{key.replace(".", "__"): value for key, value in NET.items()}, query__loss=loss)
    batch = next(batches(experiment.train_data(), 0, 16))
    params = jax.jit(experiment.init)(jax.random.key(0))
    (_, metrics), gradient = jax.jit(jax.value_and_grad(experiment.loss, has_aux=True))(params, batch, jax.random.key(1))
    assert np.isfinite(float(metrics[f"align/loss/{loss}"]))
    assert float(jnp.abs(gradient["params"]["query_out"]["kernel"]).max()) > 0
    # The logits' scale and bias are learned by what uses them alone.
    moved = {name: float(jnp.abs(gradient["params"][name])) > 0 for name in ("logit_scale", "logit_bias")}
    assert moved == {"logit_scale": loss != "mse", "logit_bias": loss == "siglip"}


def test_the_settings_of_the_paper():
    experiment, config = load("sd_scale", data__source="random")
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 1_254_083_730
    assert params["params"]["head"]["blocks"]["qkv"]["kernel"].shape == (6, 768, 3 * 768)
    assert experiment.shape == {"image": (32, 32, 4), "text": (77, 768)}
    train = config.train
    assert (train.learning_rate, train.new_learning_rate, train.warmup_steps) == (1e-5, 1e-4, 1000)
    assert (train.weight_decay, train.ema) == (1e-4, 0.9999)
    assert (config.query.weight, config.dropout) == (1.0, 0.1)
    before = former_names.keys({}, configs.flatten(config))
    assert (before["noise"], before["model.time_offset"]) == ("scaled_linear", 0.0)  # of runs that do not begin as DiT
    with pytest.raises(UserError, match="config.noise is 'pink': choose linear or scaled_linear"):
        load("sd_scale", data__source="random", noise="pink")



@pytest.mark.slow
def test_the_setting_of_the_paper_steps_in_small(monkeypatch):
    """One step at reduced width: the generator's weights move at a tenth of the others' rate."""
    monkeypatch.setitem(SIZES, "XS", (2, 32, 4))
    experiment, config = load(
        "sd_scale", data__source="random", model__size="XS", model__shared=1, model__head_width=16, model__head_heads=2,
        model__head_depth=1, model__patch=16, model__dtype="float32", train__global_batch=4, train__warmup_steps=1)
    batch = next(batches(experiment.train_data(), 0, 4))
    state = init_state(experiment.init, experiment.optimizer, jax.random.key(0), experiment.loss)
    after, metrics = jax.jit(step_of(experiment, config.train))(state, batch)
    assert {"generate/loss/image", "align/loss/infonce"} <= set(metrics) and np.isfinite(float(metrics["loss"]))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params["params"], after.params["params"])
    assert moved["image_out"]["kernel"] == pytest.approx(1e-5, rel=0.05)  # AdamW's first step is the rate
    assert moved["query_out"]["kernel"] == pytest.approx(1e-4, rel=0.05)
    drawn = experiment.sample(
        after.params, jax.random.split(jax.random.key(1), 2), {"text": jnp.asarray(batch["text"][:2])}, steps=2, guidance=2.0)
    assert drawn["image"].shape == (2, 32, 32, 4) and bool(jnp.isfinite(drawn["image"]).all())


@pytest.fixture(scope="module")
def aircraft(tmp_path_factory):
    """The smallest of the zero-shot data sets: two images of two variants, as the archive has them."""
    folder = tmp_path_factory.mktemp("zeroshot")
    (folder / "fgvc-aircraft-2013b/data/images").mkdir(parents=True)
    (folder / "fgvc-aircraft-2013b/data/variants.txt").write_text("A300\nBoeing 747\n")
    (folder / "fgvc-aircraft-2013b/data/images_variant_test.txt").write_text("001 A300\n002 Boeing 747\n")
    for name, level in (("001", 40), ("002", 200)):
        Image.new("RGB", (20, 16), (level, level, level)).save(folder / f"fgvc-aircraft-2013b/data/images/{name}.jpg")
    return folder


def classified(experiment, config):
    """What the first evaluator, the zero-shot one, finds of a new network."""
    params = jax.jit(experiment.init)(jax.random.key(0))
    found = experiment.evaluators[0](experiment, params, config, jax.random.key(1), 0)
    assert found.settings["zero_shot_images"] == {"fgvc_aircraft": 2} and len(found.settings["zero_shot_not_run"]) == 11
    return found.metrics["zero_shot"]


def test_towers_classify_pictures_of_published_sets(aircraft):
    values = {key.replace(".", "__"): value for key, value in TOWERS.items()}
    assert len(load("scenes_towers", **values)[0].evaluators) == 1
    experiment, config = load("scenes_towers", **values, eval__zeroshot="all", eval__zeroshot_dir=aircraft)
    assert classified(experiment, config) in (0, 0.5, 1)


@pytest.mark.slow
def test_diffdis_classifies_images_of_published_sets(aircraft, towers, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "XS", (2, 32, 4))
    asked = {"eval__zeroshot": "all", "eval__zeroshot_dir": aircraft, "eval__batch": 2}
    net = {key.replace(".", "__"): value for key, value in NET.items()}
    assert classified(*load("scenes", **net, data__towers=towers / "towers", **asked)) in (0, 0.5, 1)
    small = dict(
        data__source="random", model__size="XS", model__shared=1, model__head_width=16, model__head_heads=2, model__head_depth=1,
        model__patch=16, model__dtype="float32")
    small |= dict(data__size=4, model__patch=2)
    with pytest.raises(UserError, match="config.encoder.path is empty: name the published autoencoder"):
        load("sd_scale", **small, **asked)
    paths = dict(
        encoder__path=tiny_encoders.autoencoder(tmp_path / "vae")[0], text_encoder__path=tiny_encoders.clip_text(tmp_path / "clip", 768)[0])
    assert classified(*load("sd_scale", **small, **asked, **paths)) in (0, 0.5, 1)


@pytest.mark.slow
def test_towers_of_other_sizes_are_refused(towers):
    Towers(str(towers / "towers")).check(8)
    experiment, _ = load("scenes", data__towers=towers / "towers", model__width=16)
    with pytest.raises(UserError, match="vectors of 8"):
        experiment.train_data()


@pytest.fixture(scope="module")
def experiments(loaded_launch):
    return loaded_launch("diffdis_experiments")


def test_the_experiments_name_values_that_exist(experiments):
    every = list(experiments.settings())
    assert [name for part, name, *_ in every if part == "tasks"] == [
        "two towers", "generation alone", "alignment alone", "both", "alignment without noise"]
    for _, _, data, overrides in every:
        config, _ = configs.load(str(FOLDER / ("scenes_towers.py" if data == "towers" else "scenes.py")), list(overrides.items()))
        assert all(config.train[key.removeprefix("train.")] == float(value) for key, value in experiments.TRAIN.items() if "train." in key)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["towers", "both", "without noise"])
def test_an_experiment_runs(experiments, towers, monkeypatch, data):
    monkeypatch.setattr(experiments, "COUNT", 200)
    overrides, small = next((overrides, TOWERS if data == "towers" else {**NET, "data.towers": towers / "towers"})
                            for _, _, kind, overrides in experiments.settings() if kind == data)
    few = {"train.steps": 1, "train.global_batch": 8}
    metrics, seconds = experiments.run(1, data, {key: str(value) for key, value in {**overrides, **few, **small}.items()})
    wanted = {"retrieval_r1", "retrieval_r1_held_out", "digit_accuracy", "digit_accuracy_held_out"}
    if data == "both":
        wanted |= {"prompt_correctness", "prompt_correctness_seen", "frechet_ratio", "gradient_generate", "gradient_align"}
    assert set(metrics) == wanted and all(np.isfinite(value) for value in metrics.values()) and seconds > 0


def test_queries_that_are_not_of_length_one_are_refused():
    """Made-up ones have it; of a cache that was written otherwise training says what to do."""
    experiment, _ = load("sd_scale", data__source="random")
    batch = experiment.train_data().take(np.arange(4))
    np.testing.assert_allclose(np.linalg.norm(batch["query"], axis=1), 1, rtol=1e-5)
    assert loop.checked(experiment, batch) is batch
    wrong = batch | {"query": 27.7 * batch["query"]}
    with pytest.raises(UserError, match="modality 'query': a vector of length 27.7 among 4.*divide each vector by its length"):
        loop.checked(experiment, wrong)
    with pytest.raises(UserError, match="query: vectors must have the length 1, got 27.7"):
        experiment.modalities["query"].check(wrong["query"])
