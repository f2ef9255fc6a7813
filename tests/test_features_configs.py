"""REPA and ReDi on ImageNet: they begin where published weights of SiT are, and what is aligned, or sampled too, is in the loss."""

import jax
import numpy as np
import pytest

from mmdiff import config as configs
from mmdiff.__main__ import main
from mmdiff.convert import layouts
from mmdiff.convert.kinds import KINDS
from mmdiff.convert.weight_writer import write_weights
from mmdiff.nets.dit import SIZES
from mmdiff.training.finetune import start_from
from mmdiff.training.sharding import make_mesh

SMALL = {
    "model.size": "XS", "model.patch": "16", "model.dtype": "float32", "data.source": "random", "train.global_batch": "4",
    "train.log_every": "1", "train.eval_every": "0", "train.tensorboard": "false"}
OWN = {"repa": {"align.depth": "1", "align.hidden_width": "8", "feature_encoder.size": "6"}, "redi": {"feature_encoder.components": "3"}}

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    monkeypatch.setitem(SIZES, "XS", (2, 16, 2))


def build(name, **values):
    given = SMALL | OWN.get(name, {}) | {key.replace("__", "."): str(value) for key, value in values.items()}
    return configs.build(*configs.load(f"configs/imagenet256/{name}_xl2.py", [*given.items()]))


def batch_of(experiment, size=4):
    batch = {name: modality.random(np.random.default_rng(0), size) for name, modality in experiment.modalities.items()}
    return batch | {"index": np.arange(size, dtype=np.uint32)}


def test_the_terms_of_redi_and_their_times():
    """Both modalities have one time, unless they have their own; of the features' weight 0 is the image's loss alone."""
    module = configs.load("configs/imagenet256/redi_xl2.py")[1]
    shares = {"together": 0.5, "independent": 0.2, "image_alone": 0.3}
    found = jax.jit(module.noise_levels(shares, 0.1))(jax.random.key(0), np.arange(4000))
    same, absent = (np.asarray(found["image"] == found["features"]), np.asarray(found["features"] == 1))
    assert same.mean() == pytest.approx(0.5, abs=0.03) and absent.mean() == pytest.approx(0.3, abs=0.03)
    assert np.mean(found["label"]) == pytest.approx(0.1, abs=0.02) and set(np.unique(found["label"])) == {0, 1}
    always = module.noise_levels({"together": 1.0, "independent": 0.0, "image_alone": 0.0}, 0.1)(jax.random.key(0), np.arange(100))
    assert (always["image"] == always["features"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_they_begin_with_the_outputs_of_converted_weights(name, tmp_path):
    """SiT's published layout -> a run -> REPA or ReDi that starts from it: the image at step 0 is SiT's; then three steps are taken."""
    sit, here = build("sit"), build(name)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(sit.init, jax.random.key(0))["params"]
    params = jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
    write_weights(tmp_path / "sit.safetensors", layouts.state_dict(KINDS["sit"].layout, sit.net, params))
    flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
    run = str(tmp_path / "sit")
    command = ["convert", "--config", "configs/imagenet256/sit_xl2.py", "--workdir", run, *flags]
    assert main([*command, "--from", str(tmp_path / "sit.safetensors"), "--as", "sit"]) == 0

    weights, [said] = start_from(run, here, {}, jax.jit(here.init)(jax.random.key(0)), make_mesh({}))
    assert "those here that do not fit begin afresh: " in said and " there, absent here" not in said
    batch = batch_of(here)
    xt, t = {part: batch[part] for part in here.process.parts}, {part: np.full(4, 0.7, np.float32) for part in here.process.parts}
    theirs = [{part: tree[part] for part in sit.process.parts} for tree in (xt, t)]
    found, expected = jax.jit(lambda: (here.apply(weights, xt, t), sit.apply({"params": params}, *theirs)))()
    assert np.abs(expected["image"]).max() > 0.01
    np.testing.assert_allclose(found["image"], expected["image"], rtol=1e-5, atol=1e-5)
    assert {*found} - {*expected} == ({"dino"} if name == "repa" else {"features"})

    own = [f"--config.{key}={value}" for key, value in OWN[name].items()]
    config = ["--config", f"configs/imagenet256/{name}_xl2.py", "--workdir", str(tmp_path / "run"), *flags, *own]
    assert main(["train", *config, "--config.train.steps=3", f"--config.train.start={run}"]) == 0
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    assert f'"loss/{"dino" if name == "repa" else "features"}"' in metrics


@pytest.mark.slow
def test_a_repa_without_weight_is_sit():
    """The loss of the term's weight 0, and its gradient, are those of SiT; the term is a metric."""
    sit, repa = build("sit"), build("repa", align__weight=0)
    params = jax.jit(repa.init)(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.05, params)
    plain = {"params": {name: leaf for name, leaf in params["params"].items() if "_tap" not in name}}
    batch = batch_of(repa)

    @jax.jit
    def losses():
        return [jax.value_and_grad(experiment.loss, has_aux=True)(own, batch, jax.random.key(1))
                for experiment, own in ((sit, plain), (repa, params))]

    ((value, _), gradient), ((again, metrics), other) = losses()
    np.testing.assert_allclose(value, again, rtol=1e-6)
    assert 0 < metrics["loss/dino"] < 2 and not any(np.any(other["params"].pop(f"dino_tap_{i}")["kernel"]) for i in range(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, other)


@pytest.mark.slow
def test_redi_guides_the_image_by_the_label_or_by_its_features():
    """In one step the image that the label guides moves and its features do not; features guide it, too, and may be given or absent."""
    keys, labels = jax.random.split(jax.random.key(0), 4), {"label": np.arange(4, dtype=np.int32)}
    by_label = build("redi")
    by_features = build("redi", sample__representation_guidance="true")
    params = jax.tree.map(lambda leaf: leaf + 0.05, jax.jit(by_label.init)(jax.random.key(1)))

    def samples(experiment, given, steps=1, **options):
        return jax.jit(lambda: experiment.sample(params, keys, given, steps=steps, **options))()

    plain, guided = (samples(by_label, labels, guidance=w) for w in (1.0, 2.4))
    np.testing.assert_allclose(plain["features"], guided["features"], atol=1e-5)
    assert np.abs(plain["image"] - guided["image"]).max() > 1e-3
    # Features of time 1 are absent: in the first step they guide nothing yet.
    unlabelled = [samples(by_features, {}, steps=2, guidance=w)["image"] for w in (1.0, 2.4)]
    assert np.abs(unlabelled[0] - unlabelled[1]).max() > 1e-3
    features = by_features.modalities["features"].random(np.random.default_rng(0), 4)
    found = samples(by_features, {"features": features}, steps=2, guidance=2.4)
    np.testing.assert_array_equal(found["features"], features)
    alone = samples(by_label, labels, steps=2, guidance=2.4, absent=("features",))
    assert all(np.isfinite(each["image"]).all() for each in (found, alone))
