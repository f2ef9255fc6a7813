"""The emoji: the tar file, which the package's command makes, its splits and captions, and what is said of files that are others."""

import json
import tarfile

import numpy as np
import pytest

from mmdiff.data.sources import fingerprint, load_all
from mmdiff.errors import UserError
from mmdiff.projects.emoji.emoji import SPLITS, TONES, caption, emoji_source, emoji_tokenizer, parsed
from mmdiff.projects.emoji.emoji_classifiers import ToneClassifier
from mmdiff.projects.emoji.emoji_package import convert
from tests.small_sets import emoji, emoji_pairs, write_tar


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(emoji(tmp_path_factory.mktemp("emoji") / "emoji64.tar"))


@pytest.fixture(scope="module")
def sources(file):
    return {split: emoji_source(split, file) for split in SPLITS}


def pairs(source):
    return {(name, tones) for name, tones in zip(source.names, source.tones) if tones}


def test_each_name_and_each_tone_of_a_held_out_pair_occurs_in_training(sources):
    found = {split: pairs(source) for split, source in sources.items()}
    assert all(found.values()) and not found["train"] & (found["validation"] | found["test"]) and not found["validation"] & found["test"]
    seen = {name for name, _ in found["train"]}, {tone for _, tones in found["train"] for tone in tones}
    for split in SPLITS[1:]:
        assert {name for name, _ in found[split]} <= seen[0] and seen[1] == set(range(5))
        lone = {name for name, tones in zip(sources[split].names, sources[split].tones) if not tones}
        assert lone and not lone & set(sources["train"].names)
    assert sum(map(len, sources.values())) == len(emoji_pairs()) and len({fingerprint(source) for source in sources.values()}) == 3


def test_examples_are_over_white_and_captions_are_of_the_training_words(sources, file):
    examples, tokenizer = load_all(sources["train"]), emoji_tokenizer(file)
    assert examples["image"].shape[1:] == (32, 32, 3) and examples["image"].dtype == np.float32 and (examples["image"][:, 0, 0] == 1).all()
    assert examples["text"].shape[1:] == (16,) and tokenizer.size <= 1024
    texts = [caption(name, tones) for name, tones in zip(sources["train"].names, sources["train"].tones)]
    assert tokenizer.decode(examples["text"]) == texts
    assert [parsed(text) for text in texts] == list(zip(sources["train"].tones, sources["train"].names))


def test_the_classifier_of_tones_knows_real_pictures(sources):
    for split, source in sources.items():
        rows = [row for row, tones in enumerate(source.tones) if len(tones) == 1]
        read = ToneClassifier(sources["train"])(source.take(rows)["image"])
        assert np.mean(read == [source.tones[row][0] for row in rows]) >= 0.95, split
    blue = np.tile(np.float32([-1, -1, 1]), (1, 32, 32, 1))
    assert ToneClassifier(sources["train"])(blue) == [-1]  # which no tone has


def test_the_package_becomes_the_file(file, tmp_path):
    """An emoji.json as it is published: in capitals, variants by the modifiers' code points, pictures that this maker does not have."""
    codes, listed, images = dict(zip(TONES, ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))), {}, {}
    for key, picture, found in emoji_pairs():
        images[f"package/img/google/64/{key}.png"] = picture
        own = {"image": f"{key}.png", "has_img_google": True}
        variant = "-".join(codes[tone.removesuffix(" skin tone")] for tone in found["tones"])
        if variant:
            listed[found["name"]]["skin_variations"][variant] = own
        else:
            listed[found["name"]] = {**found, **own, "name": found["name"].upper(), "skin_variations": {}}
    listed["other"] = {**listed[found["name"]], "has_img_google": False}
    content = {"package/emoji.json": json.dumps(list(listed.values())).encode(), "package/README.md": b"", **images}
    write_tar(tmp_path / "package.tgz", content, "w:gz")
    assert convert(str(tmp_path / "package.tgz"), str(tmp_path / "made.tar")) == len(emoji_pairs())
    assert fingerprint(emoji_source("train", str(tmp_path / "made.tar"))) == fingerprint(emoji_source("train", file))
    write_tar(tmp_path / "other.tgz", {"package/package.json": b"{}"}, "w:gz")
    nameless = json.dumps([{**found, "name": None, "short_names": []}]).encode()
    write_tar(tmp_path / "null.tgz", {**content, "package/emoji.json": nameless}, "w:gz")
    for name in ("other", "null"):
        with pytest.raises(UserError, match=f"{name}.tgz is not the npm package"):
            convert(str(tmp_path / f"{name}.tgz"), str(tmp_path / "other.tar"))
    with pytest.raises(UserError, match="none/made.tar cannot be written"):
        convert(str(tmp_path / "package.tgz"), str(tmp_path / "none/made.tar"))
    assert not (tmp_path / "other.tar").exists()


def test_what_is_said_of_another_file(tmp_path):
    _, picture, found = emoji_pairs()[0]
    whole = {"a.png": picture, "a.json": json.dumps(found).encode()}
    files = {
        "no.tar": (None, "config.data.dir is empty"), "lone.tar": ({"a.png": picture}, "a lacks its .png or .json"),
        "e.tar": ({}, "it holds none"),
        "b.tar": ({"a.png": b"no", "a.json": json.dumps(found).encode()}, "cannot be read as an image"),
        "c.tar": ({"a.png": picture, "a.json": b"{"}, "is not valid JSON"),
        "d.tar": ({"a.png": picture, "a.json": json.dumps({**found, "category": "Letters"}).encode()}, "one of ten categories"),
        "null.tar": ({"a.png": picture, "a.json": json.dumps({**found, "name": None}).encode()}, "has a .json without a name"),
        "twice.tar": ({"a.png": picture, "./a.png": picture}, "./a.png in .*twice.tar is there twice"),
        "few.tar": (whole | {"._a.png": b"", "._a.json": b""}, "1 pictures, too few for train data"),
        "plain.tar": (
            {f"{key}.{kind}": each for key, image, found in emoji_pairs() if not found["tones"]
             for kind, each in (("png", image), ("json", json.dumps(found).encode()))}, "too few for train data")}
    for name, (content, words) in files.items():
        if content is not None:
            write_tar(tmp_path / name, content)
        with pytest.raises(UserError, match=words):
            emoji_source("train", "" if content is None else str(tmp_path / name))
    (tmp_path / "torn.tar").write_bytes((tmp_path / "few.tar").read_bytes()[:700])
    with pytest.raises(UserError, match="cannot be read as a tar file"):
        emoji_source("train", str(tmp_path / "torn.tar"))
    with pytest.raises(UserError, match="no split 'val'"):
        emoji_source("val", str(tmp_path / "few.tar"))


def test_a_tar_file_of_another_order_has_the_same_examples(file, tmp_path):
    with tarfile.open(file) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    write_tar(tmp_path / "other.tar", dict(reversed(content.items())))
    assert fingerprint(emoji_source("test", str(tmp_path / "other.tar"))) == fingerprint(emoji_source("test", file))
