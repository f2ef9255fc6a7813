"""Zero-shot classification of tiny sets on disk by an encoder whose every answer is known."""

import io
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
import small_sets
import tensorflow_datasets as tfds
from PIL import Image

from mmdiff import __main__ as cli
from mmdiff.errors import UserError
from mmdiff.evals import retrieval, zeroshot
from mmdiff.evals.zeroshot import TASKS, ZeroShot, asked, class_names, plain

LEVELS = 7  # grey levels of images, each of which stands for a class
# True labels and what the images show: of class 0 five of six are right, of class 1 none, of class 2 both.
TRUE, SHOWN = [0, 0, 0, 0, 0, 0, 1, 2, 2], [0, 0, 1, 0, 0, 0, 2, 2, 2]
WORDS = ("an_apple", "redWine", "/t/tower/outdoor")
NAMES = ("an apple", "red Wine", "tower outdoor")


def grey(level):
    stream = io.BytesIO()
    Image.fromarray(np.full((24, 40, 3), 30 * level + 10, np.uint8)).save(stream, "PNG")
    return io.BytesIO(stream.getvalue())


class Greys(small_sets.Tiny, skip_registration=True):
    VERSION = tfds.core.Version("3.0.2")
    COUNTS = {"train": 1, "test": len(TRUE)}
    LABELS = {"names": list(WORDS)}
    MORE: dict = {}

    def _info(self):
        image = tfds.features.Image(encoding_format="png")
        features = {"image": image, "label": tfds.features.ClassLabel(**self.LABELS), **self.MORE}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def example(self, i):
        i = max(i - 1, 0) if "test" in self.COUNTS else i  # the first is for training
        return {"image": grey(SHOWN[i]), "label": TRUE[i], **({"segmentation_mask": grey(0)} if self.MORE else {})}


class Cifar(Greys, skip_registration=True):
    name = "cifar10"


class Pets(Greys, skip_registration=True):
    name = "oxford_iiit_pet"
    MORE = {"segmentation_mask": tfds.features.Image(shape=(None, None, 3))}  # another image, which nobody reads


class EuroSat(Greys, skip_registration=True):
    name = "eurosat"
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="rgb")]
    COUNTS = {"train": len(TRUE)}

    def example(self, i):
        return {"image": grey(TRUE[i]), "label": TRUE[i]}


class ImageNet(Greys, skip_registration=True):
    name = "imagenet2012"
    COUNTS = {"validation": len(TRUE)}
    LABELS = {"names": [f"n0000000{i}" for i in range(3)]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Cifar, Pets, EuroSat, ImageNet):
        small_sets.prepare(builder, folder)
    return folder


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "tfds")


def encode_image(params, keys, given):
    """The image's grey level as a one-hot vector, of some length."""
    level = np.rint(((np.asarray(given["image"]).mean((1, 2, 3)) + 1) * 127.5 - 10) / 30).astype(int)
    return 3 * np.eye(LEVELS)[level]


def encode_text(params, texts):
    """The class whose name is in the text."""
    which = [next(i for i, name in enumerate(params) if name in text) for text in texts]
    return 0.1 * np.eye(LEVELS)[which]


def found(folder, params=NAMES, **options):
    return ZeroShot(**{"encode_image": encode_image, "encode_text": encode_text, "data_dir": folder, "size": 8, "batch": 4, **options})(
        None, params, None, jax.random.key(0), 0)


def test_accuracies_are_those_of_the_known_answers(folder):
    result = found(folder)
    top1, per_class = 7 / 9, (5 / 6 + 0 + 1) / 3
    expected = {
        "cifar10_top1": top1, "cifar10_mean_per_class": per_class,
        "oxford_iiit_pet_top1": top1, "oxford_iiit_pet_mean_per_class": per_class,
        "eurosat_top1": 1.0, "eurosat_mean_per_class": 1.0,
        "zero_shot": (top1 + per_class + 1) / 3,
    }  # fmt: skip
    assert result.metrics == pytest.approx(expected) and set(result.definitions) == set(expected)
    assert "cifar10_top1, eurosat_top1, oxford_iiit_pet_mean_per_class" in result.definitions["zero_shot"]
    assert result.settings["zero_shot_images"] == {"cifar10": 9, "eurosat": 9, "oxford_iiit_pet": 9}
    for batch in (1, 9, 100):
        assert found(folder, batch=batch).metrics == pytest.approx(expected)


def test_sets_that_cannot_be_run_are_named(folder, tmp_path):
    not_run = found(folder).settings["zero_shot_not_run"]
    assert set(not_run) == set(TASKS) - {"cifar10", "eurosat", "oxford_iiit_pet"}
    assert not_run["food101"] == not_run["fgvc_aircraft"] == "not on disk"
    assert not_run["imagenet2012"] == f"names of classes are missing: write them into {folder / 'imagenet2012/classes.txt'}"
    with pytest.raises(UserError, match=f"none of the data sets cifar10, .* can be classified: in {tmp_path}/none they are missing"):
        found(tmp_path / "none")
    some = found(folder, names=("food101", "cifar10"))
    assert set(some.settings["zero_shot_not_run"]) == {"food101"} and set(some.metrics) == {
        "cifar10_top1", "cifar10_mean_per_class", "zero_shot"}
    assert some.definitions["zero_shot"] == "the mean over 1 of 12 data sets: cifar10_top1"


def test_names_of_ones_own(folder):
    (folder / "imagenet2012/classes.txt").write_text("an apple\nred Wine\ntower outdoor\n")
    assert found(folder).metrics["imagenet2012_top1"] == pytest.approx(7 / 9)
    (folder / "cifar10/classes.txt").write_text("tower outdoor\nred Wine\nan apple\n")  # turned round
    assert found(folder).metrics["cifar10_top1"] == 0
    (folder / "cifar10/classes.txt").write_text("tower outdoor\nred Wine\n")
    with pytest.raises(UserError, match="classes.txt has 2 names for 3 classes"):
        found(folder)


def in_folders(folder, names=WORDS):
    """The test images in folders of their classes; -> the labels' order there is that of the names."""
    for i, (level, label) in enumerate(zip(SHOWN, TRUE)):
        (folder / names[label].strip("/").replace("/", " ")).mkdir(parents=True, exist_ok=True)
        (folder / names[label].strip("/").replace("/", " ") / f"{i}.png").write_bytes(grey(level).getvalue())
    return folder


def test_sets_and_ones_own_images_in_folders_of_classes(tmp_path):
    in_folders(tmp_path / "food101/test", NAMES)
    in_folders(tmp_path / "imagenet2012", ["n00000000", "n00000001", "n00000002"])
    (tmp_path / "imagenet2012/classes.txt").write_text("\n".join(NAMES))
    own = in_folders(tmp_path / "my own", NAMES)
    result = found(tmp_path, names=("food101", "imagenet2012", str(own)))
    expected = {"top1": 7 / 9, "mean_per_class": (5 / 6 + 0 + 1) / 3}
    each = {f"{name}_{kind}": value for name in ("food101", "imagenet2012", "my_own") for kind, value in expected.items()}
    assert result.metrics == pytest.approx(each | {"zero_shot": 7 / 9})  # of the published ones
    assert result.definitions["zero_shot"] == "the mean over 2 of 12 data sets: food101_top1, imagenet2012_top1"
    assert set(found(tmp_path, names=(str(own),)).metrics) == {"my_own_top1", "my_own_mean_per_class"}
    in_folders(tmp_path / "other/my own", NAMES)
    with pytest.raises(UserError, match="are called my_own: rename one folder"):
        found(tmp_path, names=(str(own), str(tmp_path / "other/my own")))
    (own / "loose.png").write_bytes(grey(0).getvalue())
    with pytest.raises(UserError, match="loose.png is in no folder of a class"):
        found(tmp_path, names=(str(own),))


def test_prompts_of_ones_own(folder, tmp_path):
    asked = []

    def encode(params, texts):
        asked.extend(texts)
        return encode_text(params, texts)

    own = in_folders(tmp_path / "own", NAMES)
    (folder / "cifar10/prompts.txt").write_text("{}!\n\nlook, a {} {0}\n")
    result = found(folder, encode_text=encode, names=("cifar10", "eurosat", str(own)))
    assert result.settings["zero_shot_prompts"] == {"cifar10": 2, "eurosat": 3, "own": 1}
    assert {"an apple!", "look, a an apple {0}", "{} seen from above.".format("an apple"), "a photo of a an apple."} <= set(asked)
    asked.clear()
    found(folder, encode_text=encode, names=("cifar10", str(own)), prompts=("one {}",))
    assert set(asked) == {f"one {name}" for name in NAMES}
    (folder / "cifar10/prompts.txt").write_text("a photo\n")
    with pytest.raises(UserError, match="prompts.txt has the prompt 'a photo' without the place of the class"):
        found(folder)


def test_some_pictures_of_each(folder):
    result = found(folder, count=3)  # 0, 3 and 6 of nine
    assert result.settings["zero_shot_images"]["cifar10"] == 3
    assert result.metrics["cifar10_top1"] == pytest.approx(2 / 3) and result.metrics["cifar10_mean_per_class"] == 0.5


def test_a_set_that_cannot_be_read_is_an_error(folder):
    info = folder / "cifar10/3.0.2/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="cifar10.* cannot be read .*prepare it again"):
        found(folder)


def test_examples_have_keys_of_their_own(folder):
    sampled = []

    def noted(params, keys, given):
        sampled.append(np.asarray(jax.random.key_data(keys)))
        return encode_image(params, keys, given)

    found(folder, encode_image=noted, batch=4)
    in_fours = np.concatenate(sampled[:3])[:9]
    sampled.clear()
    found(folder, encode_image=noted, batch=9)
    np.testing.assert_array_equal(sampled[0], in_fours)
    assert len(np.unique(in_fours, axis=0)) == 9


def test_many_prompts_are_read_by_parts(monkeypatch):
    names, calls = [f"class {i:03d}" for i in range(50)], []

    def embed(params, texts):
        calls.append(len(texts))
        return np.asarray([[len(text), text.count("a"), int(text[-4:-1])] for text in texts], float)

    monkeypatch.setattr(zeroshot, "TEXTS", 20)
    templates = ("a photo of a {}.", "the {}.", "a {}.")
    one = ZeroShot(encode_image, embed, "", 8)._classes(None, names, templates)
    assert max(calls) == 18 and sum(calls) == 150
    np.testing.assert_allclose(one, retrieval.class_vectors(lambda texts: embed(None, texts), names, templates))


def test_the_table():
    assert len(TASKS) == 12
    assert {name for name, task in TASKS.items() if task.per_class} == {
        "caltech101", "fgvc_aircraft", "oxford_flowers102", "oxford_iiit_pet"}
    for task in TASKS.values():
        assert len(set(task.templates)) == len(task.templates) >= 1
        assert all(template.count("{}") == 1 for template in task.templates)


def test_names_in_plain_words(tmp_path):
    names = {
        "/a/airplane_cabin": "airplane cabin", "/b/bakery/shop": "bakery shop", "AnnualCrop": "Annual Crop", "apple_pie": "apple pie",
        "AM General Hummer SUV 2000": "AM General Hummer SUV 2000", "F-16A/B": "F-16A/B", "hard-leaved pocket orchid":
        "hard-leaved pocket orchid"}  # fmt: skip
    assert {name: plain(name) for name in names} == names
    assert class_names(["a_b", "n00000001"], tmp_path) == ["a b", "n00000001"]
    assert class_names(["n00000000", "n00000001"], tmp_path) == []
    with pytest.raises(UserError, match="several classes are called 'a b': write names that differ into .*classes.txt"):
        class_names(["a_b", "c", "a b"], tmp_path)  # each would be right about no image


# -------------------------------------------------------------------------------------------------------------- the command

CONFIG = """
import dataclasses

import test_zeroshot
import tiny
from mmdiff.evals import zeroshot


def get_config():
    config = tiny.get_config()
    config.eval = {"batch": 4, "zeroshot": "", "zeroshot_dir": "", "zeroshot_prompts": "", "zeroshot_images": 0}
    return config


def build(config):
    encode_text = lambda params, texts: test_zeroshot.encode_text(test_zeroshot.NAMES, texts)
    return dataclasses.replace(tiny.build(config), evaluators=zeroshot.asked(config.eval, test_zeroshot.encode_image, encode_text, 8))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The options of a config that classifies, and of a run of it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.py").write_text(CONFIG)
    options = ["--config", str(folder / "config.py"), "--workdir", str(folder / "run")]
    assert cli.main(["train", *options, "--config.train.steps=1"]) == 0
    return options


def test_the_command_classifies_what_is_on_disk_and_reports_it(run, folder, capsys):
    assert cli.main(["eval", *run, "--zeroshot", "cifar10, food101", "--zeroshot-dir", str(folder)]) == 0
    told = capsys.readouterr()
    assert "not run for want of data or names" in told.err and told.err.count("food101") == 1
    report = json.loads(open(f"{run[-1]}/report.json").read())
    assert report["cifar10_top1"] == report["zero_shot"] == pytest.approx(7 / 9) and "cifar10_top1" in told.out
    assert cli.main(["eval", *run, "--zeroshot", "all", "--zeroshot-dir", str(folder)]) == 0
    report = json.loads(open(f"{run[-1]}/report.json").read())
    assert report["eurosat_top1"] == 1 and "oxford_iiit_pet_mean_per_class" in report


def test_the_command_classifies_ones_own_images_by_ones_own_prompts(run, tmp_path, capsys):
    (tmp_path / "prompts").write_text("this is a {}\n")
    own = in_folders(tmp_path / "pets", NAMES)
    assert cli.main(["eval", *run, "--zeroshot", str(own), "--prompts", str(tmp_path / "prompts")]) == 0
    report = json.loads(open(f"{run[-1]}/report.json").read())
    assert report["pets_top1"] == pytest.approx(7 / 9) and report["settings"]["zero_shot_prompts"] == {"pets": 1}
    assert "pets_mean_per_class" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, message",
    [
        (["--zeroshot", "cifar01"], "data set or folder 'cifar01' \\(did you mean cifar10\\?\\): .* some of cifar10, cifar100, "),
        (["--zeroshot", "cifar10", "--zeroshot-dir", "/nowhere"], "no folder /nowhere: name the one with the zero-shot data sets"),
        (["--zeroshot", ",", "--prompts", "p"], "no zero-shot data set or folder ''"),  # and not the folder that one is in
        (["--zeroshot-dir", "/tmp"], "--zeroshot-dir goes with data sets: say which, --zeroshot all"),
        (["--zeroshot", ""], "say which, --zeroshot all"),
        (["--prompts", "p"], "--prompts goes with data sets: say which, --zeroshot all"),
        (["--zeroshot", "all", "--zeroshot-dir", ".", "--prompts", "none"], r"no such file: none \(--prompts, config.eval.zeroshot"),
        (["--zeroshot", ".", "--prompts", "p"], r"p has the prompt 'a thing' without .* \(--prompts, config"),
        (["--zeroshot", "all", "--split", "validation"], "leave --split validation out"),
        (["--zeroshot", "food101", "--zeroshot-dir", "."], "none of the data sets food101 can be classified: in . they are missing"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(run, given, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").write_text("a thing\n")
    assert cli.main(["eval", *run, *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmdiff: error")]
    assert len(lines) == 1 and re.search(message, lines[0]), lines


GENERATOR = """
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import test_zeroshot
from mmdiff import Experiment, schedules, training_config
from mmdiff.data import Images, Texts, bpe
from mmdiff.data.sources import RandomSource, Subset
from mmdiff.processes import Gaussian, Given, Joint, x0

TOKENIZER = bpe.train([f"a photo of a {name}." for name in test_zeroshot.NAMES], 40, 300)
TEXTS = TOKENIZER.encode([f"a photo of a {name}." for name in test_zeroshot.NAMES])


def get_config():
    train = training_config(steps=1, global_batch=8, ema=0.5, learning_rate=1.0, tensorboard=False, eval_every=1)
    return ConfigDict({"seed": 0, "train": train, "sample": {"steps": 1, "guidance": 1.0}, "eval": {"texts": True}})


def apply(params, x, t):  # the image of the class that the text names
    which = (x["text"][:, None] == TEXTS).all(-1).argmax(-1)
    return {"image": jnp.broadcast_to((30 * which + 10)[:, None, None, None] / 127.5 - 1, x["image"].shape)}


def build(config):
    modalities = {"image": Images(8, 8, 3), "text": Texts(TOKENIZER)}
    process = Joint(image=Gaussian(schedules.flow(), x0), text=Given(0))
    if not config.eval.texts:
        modalities, process = {"image": modalities["image"]}, Joint(image=process.parts["image"])
    return Experiment(
        process=process, modalities=modalities, init=lambda key: {"w": jnp.zeros(1)}, apply=apply, optimizer=optax.sgd(0.0),
        loss=lambda params, batch, key: (params["w"].sum(), {}), data=lambda split: Subset(RandomSource(modalities), 8))
"""


def test_a_generator_classifies_by_its_losses(tmp_path, capsys):
    (tmp_path / "generator.py").write_text(GENERATOR)
    run = ["--config", str(tmp_path / "generator.py"), "--workdir", str(tmp_path / "run")]
    assert cli.main(["train", *run]) == 0
    own = in_folders(tmp_path / "pets", NAMES)
    assert cli.main(["eval", *run, "--zeroshot", str(own)]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["pets_top1"] == pytest.approx(7 / 9) and report["pets_mean_per_class"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert "by the denoising losses given a prompt" in (tmp_path / "run/report.html").read_text()
    assert report["settings"]["zero_shot_prompts"] == {"pets": 1}
    capsys.readouterr()
    (tmp_path / "prompts").write_text("an XYZ {}\n")
    for wrong, said in ((["--prompts", str(tmp_path / "prompts")], "none of the training texts has "),
                        (["--config.eval.texts=false"], "this model has no vectors of images and texts to classify by")):
        assert cli.main(["eval", *run, "--zeroshot", str(own), *wrong]) == 2
        assert said in capsys.readouterr().err


def test_nothing_is_asked_for_by_default_and_nothing_is_chosen_on_test_sets(folder):
    options = types.SimpleNamespace(zeroshot="", zeroshot_dir="", batch=4)
    assert asked(options, encode_image, encode_text, 8) == ()
    options.zeroshot, options.zeroshot_dir = "cifar10", str(folder)
    (evaluator,) = asked(options, encode_image, encode_text, 8)
    result = evaluator(types.SimpleNamespace(split="validation"), NAMES, None, jax.random.key(0), 0)
    assert not result.metrics and "test sets" in result.settings["zero_shot_not_run"]
