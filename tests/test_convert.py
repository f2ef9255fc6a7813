"""`mmdiff convert`: published weights become a run that samples and that others start from, and become published weights again."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest

from mmdiff import __main__ as cli
from mmdiff import config as configs
from mmdiff import conversion, nets, open_run, publishing
from mmdiff.convert import layouts
from mmdiff.convert.kinds import KINDS
from mmdiff.convert.tensors import Tensor
from mmdiff.convert.weight_files import open_weights
from mmdiff.convert.weight_writer import write_weights
from mmdiff.data import drafts
from mmdiff.errors import UserError
from mmdiff.nets.dit import SIZES

SMALL = ["--config.model.size=XS", "--config.model.image=8", "--config.model.dtype=float32", "--config.model.scan=false"]
TINY = ["--config.model.width=32", "--config.model.heads=4", "--config.model.image=8", "--config.model.dtype=float32"]
TOKENS = ["--config.model.width=32", "--config.model.depth=1", "--config.model.heads=4"]
CASES = {  # name -> the kind of its weights, config and options
    "dit": ("dit", "imagenet256/dit_xl2", SMALL), "sit": ("sit", "imagenet256/sit_xl2", SMALL),
    "lightningdit": ("lightningdit", "imagenet256/lightning_xl1", SMALL),
    "imf": ("imf", "imagenet256/meanflow_xl2", ["--config.model.depth=2", "--config.model.head_depth=1", *TINY]),
    "jit": ("jit", "imagenet256/jit_b16", [
        "--config.model.size=TWO", "--config.model.in_context=2,1", "--config.model.patch=8", "--config.data.size=16",
        "--config.model.dtype=float32", "--config.data.name=random"]),
    "repa": ("repa", "imagenet256/repa_xl2", [
        *SMALL, "--config.model.size=TWO", "--config.align.depth=1", "--config.model.learn_sigma=false", "--config.model.time_scale=1",
        "--config.model.time_offset=0"]),
    "unidiffuser": ("unidiffuser", "joint/unidiffuser", [
        *TINY[:2], "--config.model.depth=2", "--config.model.dtype=float32", "--config.data.size=8", "--config.data.vector=6",
        "--config.text.size=5"]),
    "class": ("vq-diffusion", "cdcd/imagenet256_class", TOKENS),
    "text": ("vq-diffusion", "cdcd/coco_text", [*TOKENS, "--config.model.conv=false", "--config.model.mlp_ratio=4"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    monkeypatch.setitem(SIZES, "XS", (1, 32, 4))
    monkeypatch.setitem(SIZES, "TWO", (2, 32, 4))


def call(*args):
    return cli.main([str(arg) for arg in args])


def of(workdir, case="dit"):
    _, config, options = CASES[case]
    return "--config", config, "--workdir", workdir, *made_up(options)


def made_up(options):
    return [*options, *([] if "--config.data.name=random" in options else ["--config.data.source=random"])]


def random_weights(case):
    """A state dict in the published layout, of random numbers."""
    kind, config, options = CASES[case]
    values, module = configs.load(config, [arg.removeprefix("--config.").split("=") for arg in made_up(options)])
    net = (experiment := configs.build(values, module)).net
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
    return layouts.state_dict(KINDS[kind].layout, net, params)


def assert_same(path, arrays):
    found = {key: tensor.read() for key, tensor in open_weights(path).items()}
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key].view(np.uint32), array.view(np.uint32), err_msg=key)


SLOW = "class", "dit", "imf", "jit", "repa", "unidiffuser"


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_published_weights_become_a_run_and_published_weights_again(case, tmp_path, capsys):
    file, run, kind = tmp_path / "it.safetensors", tmp_path / "run", CASES[case][0]
    arrays = random_weights(case)
    write_weights(file, arrays)
    assert call("convert", *of(run, case), "--from", file, "--as", kind) == 0
    said = capsys.readouterr().out
    assert f"{len(arrays)} tensors" in said and KINDS[kind].licence in said
    if kind == "vq-diffusion":  # nothing is sampled that cannot be decoded
        assert call("sample", *of(run, case), "--number", 1) == 2
        said = capsys.readouterr()
        assert "config.encoder.path is empty" in said.err and "samples of step" not in said.out
    assert json.loads((run / "source.json").read_text())["licence"] == KINDS[kind].licence

    assert call("convert", *of(run, case), "--to", "published", "--out", tmp_path / "published") == 0
    assert_same(tmp_path / "published", arrays)
    assert (tmp_path / "published" / "source.json").exists()
    if case in ("text", "unidiffuser"):
        assert call("convert", *of(run, case), "--to", "diffusers", "--out", tmp_path / "diffusers") == 0
        assert call("convert", *of(tmp_path / "again", case), "--from", tmp_path / "diffusers", "--as", kind) == 0
        assert call("convert", *of(tmp_path / "again", case), "--to", "published", "--out", tmp_path / "twice") == 0
        assert_same(tmp_path / "twice", arrays)


@pytest.mark.parametrize("case", CASES)
def test_arrays_with_other_axes_are_refused(case):
    """Every array of a file, flat, a single number, empty, or with an axis more: one sentence, whatever a layout does with it."""
    kind, config, options = CASES[case]
    values, module = configs.load(config, [arg.removeprefix("--config.").split("=") for arg in made_up(options)])
    net = (experiment := configs.build(values, module)).net
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))["params"]
    arrays = layouts.state_dict(KINDS[kind].layout, net, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    for key, array in arrays.items():
        for other in (array.reshape(-1), np.float32(1), np.zeros((0, *array.shape[1:]), np.float32), array[None], array[..., None]):
            if other.shape != array.shape:
                damaged = {name: Tensor.of(each) for name, each in (arrays | {key: other}).items()}
                with pytest.raises(UserError, match="it.pt|shapes|is not the table"):
                    layouts.load(KINDS[kind].layout, net, shapes, damaged, "it.pt")
                    pytest.fail(f"{key} {list(other.shape)} for {list(array.shape)}")


def test_the_library_s_own_layout_holds_the_whole_run(tmp_path):
    tiny, run, again = str(pathlib.Path(__file__).parent / "tiny.py"), tmp_path / "run", tmp_path / "again"
    assert call("train", "--config", tiny, "--workdir", run, "--config.seed=3") == 0
    (run / "dependencies.json").write_text('{"tokenizer": "abc"}')
    assert call("convert", "--config", tiny, "--workdir", run, "--to", "mmdiff", "--out", tmp_path / "own") == 0
    # The values of the config are those of the weights.
    assert call("convert", "--config", tiny, "--workdir", again, "--from", tmp_path / "own", "--as", "mmdiff") == 0
    first, second = (open_run(tiny, folder) for folder in (run, again))
    assert first.config.to_dict() == second.config.to_dict() and (first.step, second.step) == (4, 0)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    for name in ("data.json", "dependencies.json"):
        assert json.loads((run / name).read_text()) == json.loads((again / name).read_text())
    one, other = first.evaluate(), second.evaluate()
    assert one["weight_norm"] == other["weight_norm"] and one["train_seconds"] and other["train_seconds"] is None


def test_weights_go_to_an_address_and_become_a_run_at_one(bucket, tmp_path, capsys):
    tiny, run = ("--config", str(pathlib.Path(__file__).parent / "tiny.py")), tmp_path / "run"
    assert call("train", *tiny, "--workdir", run) == 0
    assert call("convert", *tiny, "--workdir", run, "--to", "mmdiff", "--out", bucket / "own") == 0
    assert (bucket / "own").names() == {"config.json", "model.safetensors"}
    assert call("convert", *tiny, "--workdir", bucket / "again", "--from", bucket / "own", "--as", "mmdiff") == 0
    assert "memory://bucket/again is a run" in capsys.readouterr().out
    first, second = (open_run(tiny[1], folder) for folder in (run, str(bucket / "again")))
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    for command in (("--to", "mmdiff", "--out", bucket / "own"), ("--from", bucket / "own", "--as", "mmdiff")):
        assert call("convert", *tiny, "--workdir", bucket / "again", *command) == 2
    said = capsys.readouterr().err
    assert "memory://bucket/own is there already" in said and "memory://bucket/again holds a run already" in said


def test_a_run_with_another_function_is_not_written_as_published(tmp_path):
    def run(**fields):
        net = nets.DiT(nets.Patches(8, 8, 4, 2, 8), 10, depth=1, width=32, heads=4, **fields)
        experiment = types.SimpleNamespace(net=net, process=None, modalities={})
        return types.SimpleNamespace(name="mine.py", experiment=experiment, params={}, config={}, workdir=tmp_path / "run", step=0)

    for fields, to, words in (
        (dict(time_offset=-1.0, qk_norm=True), "published", r"is not that of dit \(qk_norm=True, not False\), where its weights"),
        (dict(), "diffusers", r"is not that of dit \(time_offset=0.0, not -1.0\)"),
        (dict(time_scale=-1.0, time_offset=1.0), "diffusers", "diffusers has no pipeline for SiT"),
        (dict(time_offset=-1.0, freq_shift=1.0), "published", "write it with --to diffusers"),
        (dict(time_offset=-1.0), "diffusers", "name the folder of the autoencoder, in diffusers' layout, with --vae"),
    ):
        with pytest.raises(UserError, match=words):
            publishing.export_weights(run(**fields), to, tmp_path / "out")
    joint = run()
    joint.experiment.net = nets.MMDiT({"image": nets.Patches(8, 8, 1, 2)}, depth=1, width=32, heads=4)
    with pytest.raises(UserError, match="mine.py has a network of its own, which has no published layout: write it with --to mmdiff"):
        publishing.export_weights(joint, "published", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_published_weights_samples_and_others_start_from_it(tmp_path, capsys):
    file, run, tuned = tmp_path / "it.safetensors", tmp_path / "run", tmp_path / "tuned"
    write_weights(file, random_weights("dit"))
    assert call("convert", *of(run), "--from", file, "--as", "dit") == 0
    assert call("sample", *of(run), "--given", "label=207", "--number", 1, "--steps", 2, "--out", tmp_path / "out") == 0
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        assert samples["image"].shape == (1, 8, 8, 4) and np.isfinite(samples["image"]).all()
    short = ["--config.train.steps=1", "--config.train.global_batch=8", "--config.train.eval_every=0",
             "--config.train.tensorboard=false", "--config.train.learning_rate=1e-30", "--config.train.ema=0.5"]  # fmt: skip
    capsys.readouterr()
    assert call("train", *of(run), *short[:-1]) == 2
    assert "holds weights alone, of a conversion" in capsys.readouterr().err
    assert call("train", *of(tuned), *short, f"--config.train.start={run}", "--config.train.start_strict=true") == 0
    first, second = (open_run(CASES["dit"][1], folder).params for folder in (run, tuned))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), first, second)
    assert call("convert", *of(tuned), "--to", "published", "--out", tmp_path / "tuned-out") == 0  # the licence goes on with the weights
    assert f"licence: {KINDS['dit'].licence}" in capsys.readouterr().out
    assert json.loads((tmp_path / "tuned-out" / "source.json").read_text()) == json.loads((run / "source.json").read_text())
    (tuned / "source.json").write_text('["MIT"]')
    assert call("convert", *of(tuned), "--to", "published", "--out", tmp_path / "none") == 2
    assert "tuned/source.json is not what mmdiff convert writes: restore it" in capsys.readouterr().err


def test_a_draft_takes_the_place_of_what_a_link_leads_to_and_leaves_nothing_when_it_fails(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with drafts.draft(tmp_path / "link", 1) as draft, pytest.raises(UserError, match="another process is writing .*disk"):
        (draft / "it").write_text("it")
        with drafts.draft(tmp_path / "link", 1):
            pass
    assert (tmp_path / "disk/it").read_text() == "it"
    with pytest.raises(UserError, match="disk is there already"), drafts.draft(tmp_path / "link", 1):
        pass
    with pytest.raises(KeyError), drafts.draft(tmp_path / "new/folder/it", 1):
        raise KeyError
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}


def test_of_two_conversions_at_once_one_makes_the_run(tmp_path, capsys, monkeypatch):
    file, command = tmp_path / "it.safetensors", ["convert", *of(tmp_path / "run"), "--from", tmp_path / "it.safetensors", "--as", "dit"]
    write_weights(file, random_weights("dit"))

    def slow(*args):
        monkeypatch.setattr(conversion, "open_weights", open_weights)
        assert call(*command) == 0
        return open_weights(*args)

    monkeypatch.setattr(conversion, "open_weights", slow)
    assert call(*command) == 2 and "run holds a run already: choose another workdir" in capsys.readouterr().err


@pytest.mark.parametrize("args, words", [
    (["--as", "dit"], "takes weights in"),
    (["--from", "it.safetensors"], "convert needs --as KIND"),
    (["--to", "published"], "convert needs --out DIR"),
    (["--from", "it.safetensors", "--as", "dit", "--out", "out"], "--out goes with --to"),
    (["--to", "published", "--out", "out", "--as", "dit"], "--as goes with --from"),
    (["--from", "it.safetensors", "--as", "dti"], "no weights of the kind 'dti'"),
    (["--from", "it.safetensors", "--as", "sit"], "weights of the kind sit are for a network with time_scale=-1.0 (here 1000.0)"),
    (["--from", "it.safetensors", "--as", "mmdiff"], "is no folder that `mmdiff convert --to mmdiff` has written"),
    (["--from", "missing.pt", "--as", "dit"], "no such file: missing.pt"),
    (["--from", "it.safetensors", "--as", "dit", "--config.model.patch=4"], "pos_embed [1, 16, 32] is not the table"),
    (["--from", "it.safetensors", "--as", "dit", "--config.model.time_offset=0"], "with time_offset=-1.0 (here 0.0)"),
    (["--from", "folder", "--as", "dit"], "folder has num_layers 28 in its config.json, and the network of the config 1"),
    (["--from", "vae", "--as", "dit"], "vae is of AutoencoderKL by its config.json, not DiT (Peebles & Xie 2023)"),
    (["--from", "int.safetensors", "--as", "dit"], "int.safetensors has numbers that are no floats, as weights are: final_layer.adaLN_mod"),
    (["--from", "nan.safetensors", "--as", "dit"], "has values that are not finite, of final_layer.adaLN_modulation.1.bias"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_leaves_nothing(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = random_weights("dit")
    write_weights("it.safetensors", arrays)
    write_weights("folder", arrays, {"num_layers": 28})
    write_weights("vae", arrays, {"_class_name": "AutoencoderKL", "in_channels": 3})
    write_weights("nan.safetensors", arrays | {"final_layer.adaLN_modulation.1.bias": np.full(64, np.nan, np.float32)})
    write_weights("int.safetensors", arrays | {"final_layer.adaLN_modulation.1.bias": np.zeros(64, np.int32)})
    assert call("convert", *of("run"), *args) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"it.safetensors", "int.safetensors", "nan.safetensors", "folder", "vae"}
