"""A user's own images: every layout is read, what is missing of a split is split off the same way everywhere, mistakes are named."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from mmdiff.data import image_folders
from mmdiff.data.image_datasets import ImageDataset, tokenizer
from mmdiff.data.image_folders import split_rows
from mmdiff.data.sources import load_all
from mmdiff.errors import UserError


def png(shade=0):
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def files_of(folder, kind, split):
    records = image_folders.read(folder, kind)[split]
    return {str(each["image"].relative_to(folder)): each for each in records.get(range(len(records)))}


def refusal(folder, kind):
    with pytest.raises(UserError) as caught:
        image_folders.read(folder, kind)
    return str(caught.value)


def test_the_split_is_even_over_the_classes_and_the_same_wherever_the_folder_lies(tmp_path):
    contents = {f"{name}/{i}.png": png(i) for name in ("cat", "dog") for i in range(20)} | {"owl/0.png": png()}
    here, there = (write(tmp_path / place, contents) for place in ("here", "there"))
    parts = {split: files_of(here, "label", split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in parts.items()} == {"train": 33, "val": 4, "test": 4}
    assert sorted(sum(map(list, parts.values()), [])) == sorted(contents)
    for split in ("val", "test"):
        assert sorted(each["label"] for each in parts[split].values()) == [0, 0, 1, 1]
    assert set(files_of(there, "label", "test")) == set(parts["test"])
    assert image_folders.read(here, "label")["train"].names == ["cat", "dog", "owl"]
    assert set().union(*(files_of(here, "image", split) for split in parts)) == set(contents)


def test_an_added_example_moves_few_others():
    keys = [f"{i}.png" for i in range(100)]
    before, after = (split_rows(names, [0] * len(names), {"val": 0.1, "test": 0.1}) for names in (keys, [*keys, "new.png"]))
    assert {part: len(rows) for part, rows in before.items()} == {"train": 80, "val": 10, "test": 10}
    for part, rows in before.items():
        assert len(np.setdiff1d(rows, after[part])) <= 2
    with pytest.raises(UserError, match="above 0 and in all below 1, not val 0.5, test 0.5"):
        split_rows(keys, [0] * 100, {"val": 0.5, "test": 0.5})


@pytest.mark.parametrize(
    "others, sizes", [(("val", "test"), (6, 2, 2)), (("validation",), (5, 2, 1)), ((), (4, 1, 1)), (("test",), (5, 1, 2))])
def test_a_users_own_split_is_kept_and_what_is_missing_is_split_off_the_training_data(tmp_path, others, sizes):
    write(tmp_path, {f"train/a/{i}.png": png(i) for i in range(6)} | {f"{part}/a/{i}.png": png(i) for part in others for i in range(2)})
    found = {split: files_of(tmp_path, "label", split) for split in ("train", "val", "test")}
    assert tuple(map(len, found.values())) == sizes
    assert all(name.startswith("train/") for name in found["train"])
    for split, folder in (("val", "validation" if "validation" in others else "val"), ("test", "test")):
        assert all(name.startswith(f"{folder if folder in others else 'train'}/") for name in found[split])


def test_classes_may_be_called_train_and_test(tmp_path):
    write(tmp_path, {f"{name}/{i}.png": png() for name in ("train", "bus") for i in range(4)})
    assert image_folders.read(tmp_path, "label")["train"].names == ["bus", "train"]


CAPTIONS = {"0.png": ["a cat"], "1.png": ['a "big", red cat'], "2.png": ["a dog", "a hound"]}
LAYOUTS = {
    "captions.tsv": "0.png\ta cat\n1.png\ta \"big\", red cat\n2.png\ta dog\n2.png\ta hound\n",
    "captions.csv": 'file,caption\n0.png,a cat\n1.png,"a ""big"", red cat"\n2.png,a dog\n2.png,a hound\n',
    "captions.json": json.dumps({name: found if len(found) > 1 else found[0] for name, found in CAPTIONS.items()}),
    "beside": None,
    "tar": None,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions(tmp_path, layout):
    images = {name: png() for name in CAPTIONS}
    beside = {name.replace(".png", ".json"): json.dumps({"caption": found}) for name, found in CAPTIONS.items()}
    train = write(tmp_path / "train", images | ({layout: LAYOUTS[layout]} if LAYOUTS[layout] else beside))
    write(tmp_path / "val", {"0.png": png(), "0.txt": "a bird"})
    write(tmp_path / "test", {"0.png": png(), "0.txt": "a fish"})
    if layout == "tar":
        with tarfile.open(tmp_path / "train/0.tar", "w") as tar:
            for name in (*images, *beside):
                tar.add(train / name, name)
                (train / name).unlink()
    records = image_folders.read(tmp_path, "caption")["train"]
    assert [each["captions"] for each in records.get(range(3))] == list(CAPTIONS.values()) and records.captions == 2
    [bird] = image_folders.read(tmp_path, "caption")["val"].get([0])
    assert bird["captions"] == ["a bird"]


def numbered(path, kind="txt", beside="number {}"):
    """Ten images with captions, or what else is beside them, in a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(10):
            for name, content in ((f"{i}.png", png(i)), (f"{i}.{kind}", beside.format(i).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_one_tar_file_is_split_and_its_index_lies_beside_it(tmp_path):
    path = numbered(tmp_path / "set.tar")
    parts = [image_folders.read(path, "caption")[split] for split in ("train", "val", "test")]
    found = [[each["captions"][0] for each in part.get(range(len(part)))] for part in parts]
    assert list(map(len, found)) == [8, 1, 1] and sorted(sum(found, [])) == [f"number {i}" for i in range(10)]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["set.index.npz", "set.tar"]


def test_tar_files_of_classes(tmp_path):
    for name, label in {"train/0.tar": "{}\n", "train/1.tar": "0", "val/0.tar": "2"}.items():
        numbered(tmp_path / name, "cls", label)
    for _ in range(2):  # the second time by the index
        parts = image_folders.read(tmp_path, "label", {"val": 0.1})
        train = parts["train"].get(range(20))
        assert [each["label"] for each in train] == [*range(10), *[0] * 10] and parts["train"].names == tuple("0123456789")
        assert train[3]["image"].read() == png(3) and {each["label"] for each in parts["val"].get(range(10))} == {2}
    before = parts["train"].identity()
    numbered(tmp_path / "train/1.tar", "cls", "1")
    assert image_folders.read(tmp_path, "label", {"val": 0.1})["train"].identity() != before
    numbered(tmp_path / "train/1.tar", "cls", "cat {}")
    assert "0.png in " in refusal(tmp_path, "label") and "has 'cat 0' for a class: put a .cls of its name" in refusal(tmp_path, "label")
    numbered(tmp_path / "train/1.tar")
    assert "0.png in " in refusal(tmp_path, "label") and "has no class" in refusal(tmp_path, "label")
    (tmp_path / "train/cat").mkdir()
    assert "holds tar files and the folder cat: choose one of both" in refusal(tmp_path, "label")


def test_sets_of_ones_own_need_no_split(tmp_path):
    write(tmp_path, {f"{name}/{i}.png": png(i) for name in ("cat", "dog") for i in range(10)})
    train, val = (ImageDataset("folder", split, tmp_path, 4) for split in ("train", "val"))
    assert (len(train), len(val), train.names) == (18, 2, ("cat", "dog"))
    assert val.take(np.arange(2))["label"].tolist() == [0, 1]
    # One tar file of captions goes wherever a set of captions does: into a token cache, say.
    path = numbered(tmp_path / "set.tar")
    words = tokenizer("captioned", path, 8, 300)
    train, val = (load_all(ImageDataset("captioned", split, path, 4, words))["text"] for split in ("train", "val"))
    assert (len(train), len(val)) == (9, 1) and len(set(words.decode(np.concatenate([train, val])[:, 0]))) == 10


@pytest.mark.parametrize("text, reason", [
    ('0.png,"a cat\n1.png,a dog\n', "is not comma-separated .unexpected end of data, line 2"),  # not one image with a long caption
    ('0.png,"a" cat\n', "is not comma-separated"),
    (f'0.png,"{"x" * 200_000}"\n', "is not comma-separated .field larger"),
    ('file,caption\n0.png,"a\ncat"\n1.png\n', "line 4 of .* has no comma"),
])  # fmt: skip
def test_quotes_of_a_list_must_end(tmp_path, text, reason):
    write(tmp_path, {"captions.csv": text, "0.png": png(), "1.png": png()})
    assert re.search(reason, refusal(tmp_path, "caption"))


def test_every_label_keeps_an_example_for_training():
    rows = image_folders.split_rows(list("abcde"), [0, 0, 1, 2, 2], {"val": 0.49, "test": 0.49})
    assert {0, 1, 2} == {[0, 0, 1, 2, 2][row] for row in rows["train"]}


def test_mistakes_are_named(tmp_path):
    assert "there is no folder" in refusal(tmp_path / "none", "image")
    write(tmp_path / "few", {"0.png": png(), "1.png": png()})
    assert "has 2 images, too few to split off" in refusal(tmp_path / "few", "image")
    assert "0.png is in no folder of a class" in refusal(tmp_path / "few", "label")
    assert "has no caption" in refusal(tmp_path / "few", "caption")
    write(tmp_path / "two", {"train/0.png": png(), "val/0.png": png(), "valid/0.png": png()})
    assert "has both val and valid" in refusal(tmp_path / "two", "image")
    write(tmp_path / "lists", {"captions.csv": "0.png,a,b\n", "0.png": png()})
    assert "line 1 of" in refusal(tmp_path / "lists", "caption") and "more than one comma" in refusal(tmp_path / "lists", "caption")
    write(tmp_path / "lists", {"captions.json": "[]"})
    assert "captions.csv and captions.json: choose one" in refusal(tmp_path / "lists", "caption")
    (tmp_path / "lists/captions.csv").unlink()
    assert "is no object of captions by file" in refusal(tmp_path / "lists", "caption")
    write(tmp_path / "lists", {"captions.json": '{"0.png": 3}'})
    assert "has a number for a caption" in refusal(tmp_path / "lists", "caption")


def test_classes_to_measure_on_are_those_of_the_test_folder_of_a_split_whatever_lies_beside_it(tmp_path):
    """A class may be called test, too."""
    names = "train/a/0.png", "test/b/0.png", "test/c/0.png", "previews/0.png", "classes/test/0.png", "classes/rain/0.png"
    write(tmp_path, dict.fromkeys(names, png()))
    assert tuple(image_folders.read_classes(tmp_path).names) == ("b", "c")
    assert tuple(image_folders.read_classes(tmp_path / "classes").names) == ("rain", "test")
