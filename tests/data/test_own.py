"""A user's own data: what a folder, a tar file or an array holds becomes modalities and sources, and mistakes are named."""

import io
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mmdiff.data import own
from mmdiff.data.modalities import Images, Labels
from mmdiff.data.own import CroppedImages, OwnImages, Standardized, open_arrays, open_images
from mmdiff.data.sources import fingerprint, load_all
from mmdiff.data.token_modalities import Sequences, Texts
from mmdiff.errors import UserError

COLOURS = {"red": (250, 0, 0), "blue": (0, 0, 250)}


def settings(path, **others):
    values = {"size": 8, "channels": 3, "damaged": 0.0, "validation": 0.1, "test": 0.1, "length": 16, "vocabulary": 300}
    return ConfigDict({"dir": str(path), **values, **others})


def stored(name, i, **options):
    """A file of one colour and of an odd size and kind."""
    picture, stream = Image.new("RGB", (9 + i, 12 + 3 * i), COLOURS[name]), io.BytesIO()
    kind, mode = (("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("BMP", "RGB"), ("WEBP", "RGB"))[i % 5]
    picture.convert(mode).save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}), **options)
    return stream.getvalue(), kind.lower()


@pytest.fixture
def classes(tmp_path):
    for name in COLOURS:
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(10):
            content, kind = stored(name, i)
            (tmp_path / "set" / name / f"{i}.{kind}").write_bytes(content)
    return tmp_path / "set"


def test_images_in_folders_of_classes(classes, capsys):
    found = open_images(settings(classes), "label")
    assert found.modalities == {"image": CroppedImages(8, 8, 3), "label": Labels(2)} and found.shape == {"image": (8, 8, 3), "label": ()}
    assert "20 images in 2 classes (blue, red); 16 train, 2 validation, 2 test; 8x8 pixels, colour" in capsys.readouterr().err
    parts = {split: load_all(found.source(split)) for split in ("train", "validation", "test")}
    for part in parts.values():
        colours = np.array([(0, 0, 250), (250, 0, 0)])[part["label"]]
        np.testing.assert_allclose(part["image"].mean((1, 2)), colours / 127.5 - 1, atol=0.05)
    assert sorted(parts["test"]["label"]) == [0, 1] and found.source("train").names == ("blue", "red")
    assert len({fingerprint(found.source(split)) for split in parts}) == 3
    one = next(classes.glob("red/*.bmp"))
    whole = found.modalities["image"].parse(str(one))  # as `--given image=FILE`, whatever its size
    np.testing.assert_allclose(whole.reshape(64, 3), np.broadcast_to(np.array(COLOURS["red"]) / 127.5 - 1, (64, 3)), atol=1e-6)
    alone = load_all(open_images(settings(classes, channels=1)).source("train"))
    assert set(alone) == {"image"} and alone["image"].shape == (16, 8, 8, 1)


def test_images_are_decoded_once_and_kept_as_they_are(classes, monkeypatch):
    train = open_images(settings(classes), "label").source("train")
    first = train.take(np.array([3, 0, 3]))
    with monkeypatch.context() as patch:
        patch.setattr(own, "MEMORY", 0)
        again = open_images(settings(classes), "label").source("train").take(np.array([3, 0, 3]))
    monkeypatch.setattr(own, "decode", None)
    for other in (again, train.take(np.array([3, 0, 3]))):
        for name, array in first.items():
            np.testing.assert_array_equal(other[name], array)
    assert train.take(np.zeros(0, int))["image"].shape == (0, 8, 8, 3)


def test_every_caption_of_an_image_is_an_example(classes):
    for i, path in enumerate(sorted(classes.rglob("*.*"))):
        name = path.parent.name
        texts = [f"a {name} card", f"{name}, the {i}th"][: 1 + i % 2]
        path.with_suffix(".json").write_text(f'{{"caption": {texts}}}'.replace("'", '"'))
    found = open_images(settings(classes), "caption")
    words, train = found.modalities["caption"].tokenizer, found.source("train")
    assert isinstance(found.modalities["caption"], Texts) and words.length <= 16 and words.size <= 300
    part = load_all(train)
    assert isinstance(train, OwnImages) and len(train) == 2 * 16 == len(part["caption"])  # the folders are no classes here
    for texts, image in zip(words.decode(part["caption"]), part["image"]):
        assert ("red" in texts) == bool(image.mean((0, 1))[0] > 0) and ("blue" in texts) == bool(image.mean((0, 1))[2] > 0)
    assert len(set(words.decode(part["caption"]))) > 2
    [name] = found.frozen_deps
    before = found.frozen_deps[name]()
    assert before == open_images(settings(classes), "caption").frozen_deps[name]()
    assert before != open_images(settings(classes, vocabulary=280), "caption").frozen_deps[name]()


def test_a_damaged_share_is_left_out(classes):
    next(classes.glob("red/*")).write_bytes(b"nothing")
    with pytest.raises(UserError, match="config.data.damaged"):
        [load_all(open_images(settings(classes), "label").source(split)) for split in ("train", "validation", "test")]
    found = open_images(settings(classes, damaged=0.6), "label")
    assert sum(len(load_all(found.source(split))["label"]) for split in ("train", "validation", "test")) == 20


def saved(path, **arrays):
    np.savez(path, **arrays)
    return settings(path)


def test_arrays_say_what_they_are(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "pixels": rng.integers(0, 256, (40, 4, 6, 3), np.uint8), "grey": rng.integers(0, 256, (40, 4, 4), np.uint8),
        "floats": rng.uniform(-1, 1, (40, 4, 4, 1)), "vectors": rng.normal(50, 7, (40, 5)).astype(np.float32),
        "number": rng.normal(size=40), "several": rng.normal(size=(40, 2, 3)), "class": np.arange(40) % 3,
        "name": np.array(["b", "a"])[np.arange(40) % 2],
        "yes": np.arange(40) % 2 == 0, "far": 7 + np.arange(40) % 2, "tokens": rng.integers(0, 9, (40, 6))}
    found = open_arrays(saved(tmp_path / "x.npz", **arrays))
    kinds = {name: (type(modality), modality.shape) for name, modality in found.modalities.items()}
    assert kinds == {
        "pixels": (Images, (4, 6, 3)), "grey": (Images, (4, 4, 1)), "floats": (Images, (4, 4, 1)), "vectors": (Standardized, (5,)),
        "number": (Standardized, (1,)), "several": (Standardized, (2, 3)), "class": (Labels, ()), "name": (Labels, ()), "yes": (Labels, ()),
        "far": (Labels, ()), "tokens": (Sequences, (6,))}
    assert [found.modalities[name].count for name in ("class", "name", "yes", "far")] == [3, 2, 2, 2]
    assert found.modalities["name"].names == ("a", "b") and found.modalities["class"].names is None
    assert found.modalities["far"].parse("8,7").tolist() == [1, 0] and found.modalities["tokens"].states == 9
    kinds = ("class (labels of 3 classes)", "vectors (vectors of 5)", "tokens (", "34 train, 3 validation, 3 test")
    assert all(kind in found.summary for kind in kinds)
    parts = {split: load_all(found.source(split)) for split in ("train", "validation", "test")}
    assert [len(part["class"]) for part in parts.values()] == [34, 3, 3]
    for part in parts.values():
        for name, modality in found.modalities.items():
            modality.check(part[name])
    np.testing.assert_allclose(parts["train"]["vectors"].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(parts["train"]["vectors"].std(0), 1, atol=1e-5)
    # In the units of the file again, and from them.
    vectors = found.modalities["vectors"]
    rows = vectors.export(np.concatenate([part["vectors"] for part in parts.values()]))
    np.testing.assert_allclose(np.sort(rows, 0), np.sort(arrays["vectors"], 0), rtol=1e-5)
    np.save(tmp_path / "some.npy", arrays["vectors"][:3])
    np.testing.assert_allclose(vectors.export(vectors.parse(str(tmp_path / "some.npy"))), arrays["vectors"][:3], rtol=1e-5)
    assert vectors.show(rows) is None


def test_arrays_alone_in_a_folder_and_split_by_the_user(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(30.0))
    assert list(open_arrays(settings(tmp_path / "x.npy")).modalities) == ["x"]
    np.save(tmp_path / "y.npy", np.arange(30) % 2)
    assert list(open_arrays(settings(tmp_path)).modalities) == ["x", "y"]
    for part, count in (("train", 20), ("test", 3)):
        np.savez(tmp_path / f"{part}.npz", x=np.arange(float(count)), y=np.arange(count) % 2)
    found = open_arrays(settings(tmp_path))
    assert [len(found.source(split)) for split in ("train", "validation", "test")] == [18, 2, 3]
    np.testing.assert_allclose(found.modalities["x"].export(found.source("test").arrays["x"])[:, 0], [0, 1, 2], atol=1e-5)


def test_arrays_of_other_units_or_names_of_classes_are_other_arrays(tmp_path):
    """The network knows neither: a run would be sampled in the new units, and "a" would be what was "b"."""
    x, y = np.random.default_rng(0).normal(size=(30, 2)), np.array(["a", "b"])[np.arange(30) % 2]
    renamed = np.where(y == "a", "c", y)
    sets = {"same": {"x": x, "y": y}, "order": {"y": y, "x": x}, "units": {"x": 10 * x, "y": y}, "names": {"x": x, "y": renamed}}
    found = {}
    for name, arrays in sets.items():
        [(what, fingerprint_of)] = open_arrays(saved(tmp_path / f"{name}.npz", **arrays)).frozen_deps.items()
        found[name] = fingerprint_of()
    assert found["same"] == found["order"] and len(set(found.values())) == 3


def test_vectors_of_any_scale_are_standardised_but_what_never_changes(tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 2)) * [1e-20, 0.0] + [0.0, 0.1]
    train = open_arrays(saved(tmp_path / "x.npz", x=x)).source("train").arrays["x"]
    np.testing.assert_allclose(train.std(0), [1, 0], atol=1e-3)


def test_images_and_labels_of_arrays(tmp_path):
    config = saved(tmp_path / "x.npz", photos=np.zeros((30, 4, 4, 3), np.uint8), kind=np.arange(30) % 3)
    found = open_images(config, "label")
    assert list(found.modalities) == ["image", "label"] and set(found.source("train").arrays) == {"image", "label"}
    assert list(open_images(config).modalities) == ["image"]
    with pytest.raises(UserError, match="captions come from a folder"):
        open_images(config, "caption")
    with pytest.raises(UserError, match="has the arrays a, and one of images is needed"):
        open_images(saved(tmp_path / "y.npz", a=np.zeros(30)))


@pytest.mark.parametrize("arrays, reason", [
    ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, "need one length"),
    ({"x": np.zeros((0, 2))}, "need one length"),
    ({"x": np.float32(3)}, "need one length"),
    ({"x": np.zeros((30, 4, 4, 5), np.uint8)}, "1 or 3 channels"),
    ({"x": np.full((30, 4, 4, 3), 7.0)}, r"pixels must be numbers in \[-1, 1\]"),
    ({"x": np.full((30, 2), np.nan)}, "vectors must be finite"),
    ({"x": np.zeros((30, 2), complex)}, "arrays hold numbers or texts"),
    ({"x": np.zeros((30, 2, 2), np.int64)}, "are no images, vectors, labels or tokens"),
    ({"x": np.full((30, 2), -1)}, "ids are"),
    ({"x": np.zeros(2)}, "too few to split off"),
    ({"x": np.zeros((30, 0), np.int64)}, "the rows hold nothing"),
    ({"x": np.full((30, 2), 2**63, np.uint64)}, "ids of tokens are below 1,048,576, and one is 9,223,372,036,854,775,808"),
    ({"index": np.arange(30) % 2}, "called 'index', which no modality can be"),  # every batch has one
    ({"a/b": np.zeros((30, 2))}, "called 'a/b'"),
])  # fmt: skip
def test_arrays_that_are_none(tmp_path, arrays, reason):
    with pytest.raises(UserError, match=reason):
        open_arrays(saved(tmp_path / "x.npz", **arrays))


def test_settings_that_are_none(classes):
    for path, reason in (("", "config.data.dir is empty"), (pathlib.Path("/none"), "there is no folder"), ("nope://x", "no address")):
        with pytest.raises(UserError, match=reason):
            open_images(settings(path))
    wrong = {"channels": 4, "test": 0.0, "validation": 0.9, "damaged": 1.0}
    reasons = "1 .grey. or 3", "must be above 0", "in all below 1", "damaged is the share"
    for (key, value), reason in zip(wrong.items(), reasons):
        with pytest.raises(UserError, match=reason):
            open_images(settings(classes, **{key: value}), "label")
