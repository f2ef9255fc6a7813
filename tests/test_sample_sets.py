"""Sets of samples: the same bytes whatever computes them and whenever it is killed, in files that others read, one setting in a folder."""

import ast
import dataclasses
import functools
import json
import pathlib
import zipfile

import jax
import numpy as np
import pytest
import tiny_encoders
from jax.sharding import PartitionSpec
from PIL import Image

from mmdiff import sample_sets
from mmdiff.__main__ import main
from mmdiff.data import shards
from mmdiff.data.named_autoencoders import Autoencoder
from mmdiff.errors import UserError
from mmdiff.evals import evaluator
from mmdiff.evals.image_sets import open_images
from mmdiff.keys import key_of_use
from mmdiff.runs import open_run
from mmdiff.training import lock

TINY = str(pathlib.Path(__file__).parent / "tiny.py")
NUMBER = 257
SETTINGS = {"steps": 2, "guidance": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("sets") / "tiny"
    assert main(["train", "--config", TINY, "--workdir", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def run(workdir):
    return open_run(TINY, workdir)


def write(run, out, number=NUMBER, **changes):
    labels = sample_sets.classes(run, "balanced", number, 3)
    options = {"given": labels, **SETTINGS, "batch": 8, **changes}
    return sample_sets.write(run, out, number, **options)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """The set of one device."""
    out = tmp_path_factory.mktemp("sets") / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda devices=jax.devices()[:1]: devices)
        write(run, out)
    return out


# ---- One set, whatever computes it ----


def test_eight_devices_that_are_killed_twice_make_the_bytes_of_one(run, alone, tmp_path, monkeypatch):
    assert len(jax.local_devices()) == 8
    whole = shards.write
    for left in (2, 7):  # the second time within a shard: between its two files

        def killed(folder, number, arrays, left=left):
            if len(list(folder.glob("*.npy"))) // 2 >= left:
                if left == 7:
                    whole(folder, number, {"image": arrays["image"]})
                raise KeyboardInterrupt
            return whole(folder, number, arrays)

        monkeypatch.setattr(shards, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            write(run, tmp_path)
        assert not (tmp_path / "samples.npz").exists()
    written = []
    monkeypatch.setattr(shards, "write", lambda folder, number, arrays: written.append(number) or whole(folder, number, arrays))
    write(run, tmp_path)
    assert written == list(range(7, 33))  # what was whole stays
    assert contents(tmp_path) == contents(alone) and len(contents(alone)) == 3
    monkeypatch.setattr("mmdiff.runs.Run.stream", lambda *args, **options: pytest.fail("it is whole"))
    write(run, tmp_path)


def test_a_set_at_an_address_has_the_bytes_of_one_in_a_folder(run, alone, bucket, monkeypatch):
    out, whole = str(bucket / "set"), shards.write

    def killed(folder, number, arrays):
        if number == 3:
            whole(folder, number, {"image": arrays["image"]})
            raise KeyboardInterrupt
        return whole(folder, number, arrays)

    monkeypatch.setattr(shards, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        write(run, out)
    with pytest.raises(UserError, match="holds a set of samples that is not whole"):
        open_images(out)
    written = []
    monkeypatch.setattr(shards, "write", lambda folder, number, arrays: written.append(number) or whole(folder, number, arrays))
    with lock.held_at(bucket / "set"), pytest.raises(UserError, match="bucket/set is being written by process"):
        write(run, out)
    paths = write(run, out)
    assert written == list(range(3, 33)) and list(map(str, paths)) == [f"{out}/samples.npz", f"{out}/samples.png"]
    assert (bucket / "set").names() == set(contents(alone))
    assert {name: (bucket / "set" / name).read_bytes() for name in contents(alone)} == contents(alone)
    found, there = open_images(out), open_images(alone)
    assert np.array_equal(next(found.read(300, range(NUMBER))), next(there.read(300, range(NUMBER))))
    monkeypatch.setattr("mmdiff.runs.Run.stream", lambda *args, **options: pytest.fail("it is whole"))
    write(run, out)
    with pytest.raises(UserError, match=r"holds samples of other settings \(seed 3, not 4\)"):
        write(run, out, seed=4)


def test_weights_that_are_spread_over_a_mesh_sample_as_one_device(workdir, run):
    spread = open_run(TINY, workdir, {"train.mesh.fsdp": "4", "train.mesh.data": "2"})
    experiment = dataclasses.replace(spread.experiment, rules=[("image", PartitionSpec(None, "fsdp"))])
    spread = dataclasses.replace(spread, experiment=experiment)
    [image] = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(spread.params) if "image" in jax.tree_util.keystr(path)]
    assert image.addressable_shards[0].data.shape == (75, 16) and len(image.addressable_shards) == 8
    labels = np.arange(37, dtype=np.int32) % 10
    for (k, found), (other, alone) in zip(
        *(each.stream(37, given={"label": labels}, **SETTINGS, batch=2) for each in (spread, run)), strict=True
    ):
        assert k == other
        np.testing.assert_allclose(found["image"], alone["image"], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found["label"], alone["label"])
    with pytest.raises(UserError, match="does not fit the 8 device"):
        open_run(TINY, workdir, {"train.mesh.fsdp": "3"}).params


def test_sample_i_depends_on_the_seed_and_i(run, alone):
    images, labels = read(alone)
    other = list(run.stream(20, given={"label": labels[:20]}, **SETTINGS, batch=5))  # in other batches, of another number
    assert [k for k, _ in other] == [0, 1, 2, 3]
    shown = np.concatenate([run.show({"image": samples["image"]})["image"] for _, samples in other])
    assert np.abs(shown.astype(int) - images[:20, ..., :1]).max() <= 1  # the last digit of a float may differ, and round to the next grey
    few = list(run.stream(20, given={"label": labels[:20]}, **SETTINGS, batch=8, only=[1]))
    assert np.array_equal(run.show(few[0][1])["image"], images[8:16, ..., :1])
    assert not np.array_equal(images[0], images[1])


def test_samples_are_those_of_one_device_batch_by_batch(run, monkeypatch):
    monkeypatch.setattr("mmdiff.runs.LARGEST_BATCH", 4)
    found = run.sample(9, **SETTINGS)  # three devices compute three each
    sample = functools.partial(run.experiment.sample, steps=2, guidance=1.5)
    wanted = evaluator.in_batches(sample, run.params, evaluator.example_keys(key_of_use(3, "sample"), 9), {}, 3)
    for name, modality in run.experiment.modalities.items():
        np.testing.assert_array_equal(found[name], getattr(modality, "quantize", np.asarray)(wanted[name]))


def test_several_devices_decode_as_one(tmp_path, monkeypatch):
    autoencoder = Autoencoder({"kind": "autoencoder_kl", "path": str(tiny_encoders.autoencoder(tmp_path / "vae")[0])}, 4)
    monkeypatch.setattr("mmdiff.data.named_autoencoders.PIXELS", 2 * 8**2)  # two images at once
    latents = np.random.default_rng(0).standard_normal((5, 4, 4, 4), np.float32)
    images = autoencoder.decode(latents)
    monkeypatch.setattr(jax, "local_devices", lambda devices=jax.devices()[:1]: devices)
    autoencoder._decoded = None
    np.testing.assert_array_equal(images, autoencoder.decode(latents))


def test_classes_are_balanced_by_the_seed_and_i(run):
    labels = sample_sets.classes(run, "balanced", 95, 3)["label"]
    assert sorted(np.bincount(labels[:90])) == [9] * 10 and np.bincount(labels).max() == 10
    assert len({tuple(labels[i : i + 10]) for i in range(0, 90, 10)}) == 9  # in mixed orders
    for how in ("balanced", "random"):
        few, many, other = (sample_sets.classes(run, how, number, seed)["label"] for number, seed in ((33, 3), (95, 3), (95, 4)))
        assert np.array_equal(few, many[:33]) and not np.array_equal(many, other) and many.dtype == np.int32
    chance = np.bincount(sample_sets.classes(run, "random", 3000, 0)["label"], minlength=10)
    assert ((chance - 300) ** 2 / 300).sum() < 27.9  # chi-squared with 9 degrees of freedom, 0.1 %
    assert list(sample_sets.shown(run, ["label"], [])) == ["image", "label"] and sample_sets.shown(run, [], ["label"]) == ("image", None)
    with pytest.raises(UserError, match="--classes random is for a modality of classes, and this model has none that is left"):
        sample_sets.classes(run, "random", 3, 0, taken=["label"])


# ---- Files that others read ----


def read(out):
    with np.load(out / "samples.npz") as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        return arrays["arr_0"], arrays["arr_1"]


def test_the_file_is_as_published_evaluators_stream_it(alone):
    images, labels = read(alone)
    assert images.dtype == np.uint8 and images.shape == (NUMBER, 8, 8, 3) and labels.dtype == np.int64
    assert sorted(np.bincount(labels)) == [25] * 3 + [26] * 7
    with zipfile.ZipFile(alone / "samples.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        with archive.open("arr_0.npy") as member:  # as theirs: the header by hand, then so many bytes for a batch
            assert member.read(8) == b"\x93NUMPY\x01\x00"
            header = ast.literal_eval(member.read(int.from_bytes(member.read(2), "little")).decode())
            assert header == {"descr": "|u1", "fortran_order": False, "shape": (NUMBER, 8, 8, 3)}
            assert member.read(3 * 192) == images[:3].tobytes()
    ours = open_images(alone / "samples.npz")
    assert ours.count == NUMBER
    with Image.open(alone / "samples.png") as grid:
        assert grid.width < 1000 and grid.height < 1100  # of the first 64


def test_numbered_files_hold_the_same(run, alone, tmp_path):
    images, labels = read(alone)
    write(run, tmp_path, form="png")
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [f"{i:06d}.png" for i in range(NUMBER)]
    for i in (0, 100, 256):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / names[i])), images[i, ..., 0])
    assert np.array_equal(np.load(tmp_path / "labels.npy"), labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "labels.npy", "samples.json", "samples.png"]


def test_the_command_writes_a_set(run, workdir, tmp_path, capsys):
    out = tmp_path / "set"
    plain = ["sample", "--config", TINY, "--workdir", str(workdir), "--out", str(out)]
    of_set = ["--number=30", "--format=npz", "--batch=8", "--guidance=1.5"]
    assert main([*plain, *of_set, "--classes=balanced", "--seed=3"]) == 0
    said = capsys.readouterr()
    assert "30 samples of step 4 (seed 3, 2 steps, guidance 1.5)" in said.out and str(out / "samples.npz") in said.out
    assert "image 30 of 30, " in said.err and " images/s" in said.err
    write(run, tmp_path / "same", 30)
    before = contents(out)
    assert before == contents(tmp_path / "same")
    assert main([*plain[:-1], str(tmp_path / "few"), "--number=30", "--classes=balanced", "--seed=3", "--guidance=1.5"]) == 0
    with np.load(tmp_path / "few/samples.npz") as few:
        assert np.array_equal(few["label"], read(out)[1])
    capsys.readouterr()
    np.save(tmp_path / "labels.npy", np.zeros(30, np.int32))
    for words, command in {
        "holds samples of other settings (seed 3, not 4)": [*plain, *of_set, "--classes=balanced", "--seed=4"],
        "would be overwritten": [*plain[:-1], str(tmp_path), *of_set, f"--given=label={tmp_path / 'labels.npy'}"],
        "holds a set of samples": plain,
        "--batch goes with --format": [*plain, "--batch=3"],
        "--distributed goes with --format": [*plain, "--distributed"],
        "label is set twice": [*plain, *of_set, "--classes=random", "--given=label=7", "--given=label=6"],
        "has none that is left": [*plain, *of_set, "--classes=random", "--given=label=7"],
    }.items():
        assert main(command) == 2
        assert words in capsys.readouterr().err
    assert contents(out) == before


# ---- A folder takes one set ----


def test_other_settings_are_refused_and_nothing_is_lost(run, workdir, alone, tmp_path):
    before = contents(alone)
    for change, words in {
        "seed": "seed 3, not 4", "guidance": "guidance 1.5, not 1.0", "steps": "steps 2, not 1", "batch": "batch 8, not 4",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=rf"holds samples of other settings \({words}\): name another folder"):
            write(run, alone, **{change: {"seed": 4, "guidance": 1.0, "steps": 1, "batch": 4}[change]})
    with pytest.raises(UserError, match="step 4, not 2"):
        write(open_run(TINY, workdir, step=2), alone)
    with pytest.raises(UserError, match=r"\(other given\)"):
        write(run, alone, given={})
    json.loads((alone / "samples.json").read_text())
    assert contents(alone) == before
    run.write(run.sample(2), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="holds samples.npz of another call"):
        write(run, tmp_path, 3)
    assert contents(tmp_path) == before
    tars = tmp_path / "mine" / "shards"
    tars.mkdir(parents=True)
    (tars / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds shards/0.tar of another call"):
        write(run, tars.parent, 3)
    assert [path.name for path in tars.parent.rglob("*")] == ["shards", "0.tar"]


@pytest.mark.parametrize("damage", [
    lambda content: content[:-10], lambda content: b"", lambda content: content.replace(b"(8, 8, 8, 1)", b"(4, 8, 8, 1)")])
def test_a_damaged_shard_is_named_and_made_anew(run, tmp_path, monkeypatch, damage):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample_sets, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write(run, tmp_path, 20)
    shard = tmp_path / "shards/image-00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(damage(whole))
    with pytest.raises(UserError, match="image-00001.npy is damaged: remove it and run the same command again"):
        write(run, tmp_path, 20)
    shard.unlink()
    write(run, tmp_path, 20)
    assert len(read(tmp_path)[0]) == 20


def test_settings_that_were_overwritten_are_a_sentence(run, tmp_path):
    for content in ("[1]", '{"settings": 3}', '{"settings": {}, "whole": true}'):
        (tmp_path / "samples.json").write_text(content)
        with pytest.raises(UserError, match="holds samples of other settings"):
            write(run, tmp_path, 3)


def test_two_calls_do_not_write_the_same_set(run, tmp_path, monkeypatch):
    def other(*args):
        with pytest.raises(UserError, match="another process is writing samples to"):
            write(run, tmp_path, 3)

    monkeypatch.setattr(sample_sets, "_join", other)
    write(run, tmp_path, 3)


def test_what_is_no_set_of_images_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="of this model none would be sampled: leave --format out"):
        write(run, tmp_path / "a", 3, given={"image": np.zeros((3, 8, 8, 1), np.float32)})
    assert not (tmp_path / "a").exists()
