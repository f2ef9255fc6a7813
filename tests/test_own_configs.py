"""A user's own data by flags alone: each config of configs/own builds on it; with --all it trains, samples by name and reports."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmdiff import config as configs
from mmdiff.data import image_folders
from mmdiff.data.modalities import Labels
from mmdiff.errors import UserError

OWN = pathlib.Path(__file__).parents[1] / "configs/own"
SHAPES = {"circle": (220, 40, 40), "square": (40, 180, 60), "triangle": (40, 70, 220)}
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220)}
SMALL = {"model.width": "16", "model.depth": "1", "model.heads": "2", "train.global_batch": "4"}


def picture(shape, colour, rng):
    """A shape on a light ground, of any size."""
    width, height = (int(length) for length in rng.integers(24, 90, 2))
    found = Image.new("RGB", (width, height), tuple(int(level) for level in rng.integers(225, 255, 3)))
    side = min(width, height)
    radius, x, y = side * rng.uniform(0.24, 0.36), width / 2 + side * rng.uniform(-0.1, 0.1), height / 2 + side * rng.uniform(-0.1, 0.1)
    corners = {"triangle": [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]}.get(shape)
    paint, box = ImageDraw.Draw(found), (x - radius, y - radius, x + radius, y + radius)
    if corners:
        paint.polygon(corners, fill=colour)
    else:
        (paint.ellipse if shape == "circle" else paint.rectangle)(box, fill=colour)
    return found


def stored(image, kind):
    """A file's content and ending, of one of several kinds: colour, a palette, transparency, turned by EXIF."""
    stream, turned = io.BytesIO(), Image.Exif()
    turned[274] = 6
    name, image, options = [
        ("png", image, {}), ("png", image.convert("P", palette=Image.Palette.ADAPTIVE), {}), ("png", image.convert("RGBA"), {}),
        ("jpg", image.rotate(90, expand=True), {"exif": turned, "quality": 92}), ("bmp", image, {})][kind % 5]
    image.save(stream, {"jpg": "JPEG"}.get(name, name.upper()), **options)
    return stream.getvalue(), name


def make(folder, count):
    """classes/: images in folders of classes; captions.tar: images with captions; rings.npz: vectors and labels."""
    rng = np.random.default_rng(0)
    for i in range(count):
        shape = list(SHAPES)[i % 3]
        content, kind = stored(picture(shape, SHAPES[shape], rng), i // 3)
        (folder / "classes" / shape).mkdir(parents=True, exist_ok=True)
        (folder / "classes" / shape / f"{i}.{kind}").write_bytes(content)
    with tarfile.open(folder / "captions.tar", "w") as tar:
        for i in range(count):
            shape, colour = list(SHAPES)[i % 3], list(COLOURS)[i // 3 % 3]
            content, kind = stored(picture(shape, COLOURS[colour], rng), i // 9)
            for name, data in ((f"{i:05}.{kind}", content), (f"{i:05}.txt", f"a {colour} {shape}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    angle, label = rng.uniform(0, 2 * np.pi, 4 * count), np.arange(4 * count) % 2
    vectors = 100 + (10 + 20 * label)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 0.3, (4 * count, 2))
    np.savez(folder / "rings.npz", x=vectors.astype(np.float32), ring=np.array(["inner", "outer"])[label])
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return make(tmp_path_factory.mktemp("few"), 30)


CASES = {
    "images": ("classes", {"data.size": "8", "data.flips": "0.5"}, {}),
    "image_label": ("classes", {"data.size": "8", "data.channels": "1"}, {"label": "square"}),
    "captions": ("captions.tar", {"data.size": "8"}, {"caption": "a red circle"}),
    "arrays": ("rings.npz", {}, {"ring": "outer"}),
}


def built(name, few, **others):
    path, values, _ = CASES[name]
    overrides = {"data.dir": str(few / path), **SMALL, **values, **others}
    config, module = configs.load(str(OWN / f"{name}.py"), list(overrides.items()))
    return config, configs.build(config, module)


@pytest.mark.parametrize("name, task", [*((name, "") for name in CASES), ("image_label", "conditional"), ("captions", "conditional")])
def test_every_config_builds_on_a_users_data(name, task, few):
    """By shapes alone: a step of training and a sample given what the command would be given."""
    _, experiment = built(name, few, **({"task": task} if task else {}))
    batch = experiment.train_data().take(np.arange(4)) | {"index": np.arange(4, dtype=np.uint32)}
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    value, metrics = jax.eval_shape(experiment.loss, params, batch, jax.random.key(0))
    learnt = {f"loss/{name}" for name, part in experiment.process.parts.items() if part.learnt}
    assert value.shape == () and learnt == set(metrics) and len(learnt) == (1 if task == "conditional" else len(experiment.shape))
    train = experiment.train_data()
    classes = {"label": Labels(3, getattr(train, "names", None))}  # which a run notes of its data
    modalities = {**experiment.modalities, **classes} if name == "image_label" else experiment.modalities
    given = {key: jnp.asarray(np.repeat(modalities[key].parse(text), 2, 0)) for key, text in CASES[name][2].items()}
    keys = jax.random.split(jax.random.key(0), 2)
    sampled = jax.eval_shape(lambda params: experiment.sample(params, keys, given, steps=2, guidance=1.5), params)
    assert {key: array.shape for key, array in sampled.items()} == {key: (2, *shape) for key, shape in experiment.shape.items()}
    assert bool(experiment.frozen_deps) == (name in ("captions", "arrays"))  # what the weights need of the data
    for split in ("train", "validation", "test"):
        assert len(getattr(experiment, f"{split}_data")()) > 0


def test_mistakes_are_named(few):
    with pytest.raises(UserError, match="config.data.flips must be at least 0 and at most 1"):
        built("images", few, **{"data.flips": "2"})
    with pytest.raises(UserError, match="config.data.dir is empty"):
        built("images", few, **{"data.dir": ""})
    with pytest.raises(UserError, match="is in no folder of a class"):
        built("image_label", few, **{"data.dir": str(few / "classes/circle")})
    with pytest.raises(UserError, match="has no caption"):
        built("captions", few, **{"data.dir": str(few / "classes")})
    for name in ("image_label", "captions"):
        with pytest.raises(UserError, match="config.task is 'both': choose joint or conditional"):
            built(name, few, task="both")
    with pytest.raises(UserError, match="patches of 3 do not tile"):
        built("images", few, **{"model.patch": "3"})


# ------------------------------------------------------------------------------------------------------- the whole way, in small


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return make(tmp_path_factory.mktemp("many"), 300)


SHORT = {
    "model.width": 64, "model.depth": 2, "train.ema": 0.98, "train.warmup_steps": 20, "train.eval_every": 0, "train.tensorboard": "false"}
SHORT_IMAGES = {"data.size": 16, "train.global_batch": 32, "train.sample_every": 0, "sample.steps": 12}


def commands(use, train, sample, evaluate):
    """A run's three commands, with a small network, in a process of their own: the tests' flags make slow programs and eight devices."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    program = "import json, sys; from mmdiff.__main__ import main; sys.exit(any(main(words) for words in json.loads(sys.argv[1])))"
    train = [f"--config.{key}={value}" for key, value in (SHORT | train).items()]
    words = [["train", *use, *train], ["sample", *use, *sample], ["eval", *use, *evaluate]]
    given = json.dumps([[str(word) for word in each] for each in words])
    subprocess.run([sys.executable, "-c", program, given], env=env, check=True, cwd=OWN.parents[1])


def colour_of(image):
    """Which of the colours a shape in the middle of an image [H, W, 3] in [-1, 1] has."""
    middle = image[4:-4, 4:-4].reshape(-1, 3)
    darkest = middle[np.argsort(middle.min(-1))[: len(middle) // 4]].mean(0)
    return list(COLOURS)[int(np.argmin([np.square(darkest - (np.array(level) / 127.5 - 1)).sum() for level in COLOURS.values()]))]


@pytest.mark.slow
def test_images_in_classes_are_sampled_by_name_and_reported(many, tmp_path):
    use = ("--config", OWN / "image_label.py", "--workdir", tmp_path / "run")
    asked = [shape for shape in SHAPES for _ in range(16)]
    commands(
        use, SHORT_IMAGES | {"data.dir": many / "classes", "train.steps": 350},
        ["--given", f"label={','.join(asked)}", "--out", tmp_path / "out"], ["--config.eval.most=60"])
    found = [list(SHAPES)[list(COLOURS).index(colour_of(image))] for image in np.load(tmp_path / "out/samples.npz")["image"]]
    for shape in SHAPES:
        assert np.mean([seen == shape for seen, name in zip(found, asked, strict=True) if name == shape]) >= 0.8, shape
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["label_accuracy"] >= 0.9 and report["sample_agreement"] >= 0.8 and report["novelty"] > 0.1


@pytest.mark.slow
def test_images_with_captions_are_sampled_by_text(many, tmp_path):
    use = ("--config", OWN / "captions.py", "--workdir", tmp_path / "run")
    asked = [colour for colour in COLOURS for _ in range(16)]
    (tmp_path / "asked.txt").write_text("".join(f"a {colour} circle\n" for colour in asked))
    commands(
        use, SHORT_IMAGES | {"data.dir": many / "captions.tar", "train.steps": 500},
        ["--given", f"caption={tmp_path / 'asked.txt'}", "--out", tmp_path / "out"], ["--config.eval.most=60"])
    found = [colour_of(image) for image in np.load(tmp_path / "out/samples.npz")["image"]]
    assert np.mean([seen == colour for seen, colour in zip(found, asked, strict=True)]) >= 0.8
    assert json.loads((tmp_path / "run/report.json").read_text())["caption_recall"] >= 0.5  # by chance 0.11


@pytest.mark.slow
def test_vectors_are_sampled_in_their_units(many, tmp_path):
    use = ("--config", OWN / "arrays.py", "--workdir", tmp_path / "run")
    commands(
        use, {"data.dir": many / "rings.npz", "train.steps": 500, "sample.steps": 25}, ["--given", "ring=outer", "--number", 200],
        ["--config.eval.most=200"])
    radius = np.linalg.norm(np.load(tmp_path / "run/samples/samples.npz")["x"] - 100, axis=1)
    assert np.mean(np.abs(radius - 30) < 3) >= 0.8
    assert json.loads((tmp_path / "run/report.json").read_text())["ring_accuracy"] >= 0.95


def test_the_made_up_data_are_what_they_should_be(few):
    records = image_folders.read(few / "classes", "label")["train"]
    assert {record["image"].suffix for record in records.get(range(len(records)))} == {".png", ".jpg", ".bmp"}
    rng = np.random.default_rng(1)
    for shape in SHAPES:
        for colour, level in COLOURS.items():
            pixels = np.asarray(picture(shape, level, rng).resize((16, 16)), np.float32) / 127.5 - 1
            assert colour_of(pixels) == colour
