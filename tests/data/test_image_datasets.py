"""Sets of images: what is stored comes out, cropped, sized and with its labels or captions; what is missing is named."""

import gzip
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import small_sets
from ml_collections import ConfigDict
from PIL import Image

from mmdiff.data import image_datasets
from mmdiff.data.image_datasets import ImageDataset, open_image_dataset
from mmdiff.data.prompts import main, prompts
from mmdiff.data.sources import ArraySource, Subset, load_all
from mmdiff.data.token_cache import Captioned
from mmdiff.errors import UserError


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (small_sets.ImageNet, small_sets.Coco):
        small_sets.prepare(builder, folder)
    return folder


@pytest.fixture
def birds(tmp_path):
    return small_sets.cub200(tmp_path / "cub")


def refused(*args, **options):
    with pytest.raises(UserError) as caught:
        ImageDataset(*args, **options)
    return str(caught.value)


def seen(i, size):
    """The middle of stored image i by its definition: cropped, then resized."""
    left = (small_sets.WIDTH - small_sets.HEIGHT) // 2
    with Image.open(io.BytesIO(small_sets.picture(i))) as file:
        square = file.crop((left, 0, left + small_sets.HEIGHT, small_sets.HEIGHT)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square, np.float32) / 127.5 - 1


def test_imagenet(tfds_dir):
    train, val = (ImageDataset("imagenet2012", split, tfds_dir, 32) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 3)
    found = train.take(np.array([4, 0, 4]))
    assert {name: (array.dtype.name, array.shape) for name, array in found.items()} == {
        "image": ("float32", (3, 32, 32, 3)), "label": ("int32", (3,))}
    np.testing.assert_array_equal(found["label"], [28, 0, 28])
    np.testing.assert_array_equal(load_all(val)["label"], [42, 49, 56])
    for row, i in zip(found["image"], [4, 0, 4]):
        np.testing.assert_allclose(row, seen(i, 32), atol=0.01)  # a level of 256
    assert found["image"].min() >= -1 and found["image"].max() <= 1 and train.take(np.zeros(0, int))["image"].shape == (0, 32, 32, 3)
    with pytest.raises(IndexError, match="asked of a source that holds 0..5"):
        train.take(np.array([6]))


def test_coco_has_five_captions_a_picture(tfds_dir):
    words = image_datasets.tokenizer("coco_captions", tfds_dir, 16, 300)
    assert words.length == 16 and words.size <= 300
    train, val = (ImageDataset("coco_captions", split, tfds_dir, 16, words) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 4)  # val, restval and test are one
    found = train.take(np.arange(3))
    assert found["text"].dtype == np.int32 and found["text"].shape == (3, 5, 16) and set(found) == {"image", "text"}
    for i, row in enumerate(found["text"]):
        own = [caption.lower() for caption in small_sets.captions(i, 4 + i % 3)]
        assert words.decode(row) == [own[j % len(own)] for j in range(5)]
    assert set(ImageDataset("coco_captions", "val", tfds_dir, 16).take(np.arange(4))) == {"image"}


def test_coco_as_its_archives_have_it(tmp_path):
    folder = small_sets.coco(tmp_path / "coco")
    train, val = (image_datasets.records_of("coco_captions", split, folder) for split in ("train", "val"))
    assert (len(train), len(val), train.captions) == (3, 2, 5)
    for i, record in enumerate(train.get(range(3)) + val.get(range(2))):
        assert record["captions"] == small_sets.captions(i, 4 + i % 3)[:5]
    np.testing.assert_allclose(ImageDataset("coco_captions", "val", folder, 16).take([1])["image"][0], seen(4, 16), atol=0.01)
    (folder / "train2014").rename(folder / "train")
    assert "train2014 does not exist: unpack train2014.zip (cocodataset.org)" in refused("coco_captions", "train", folder)
    (folder / "annotations/captions_val2014.json").write_text('{"images": []}')
    assert "captions_val2014.json is not COCO's list of captions (KeyError: 'annotations')" in refused("coco_captions", "val", folder)
    (folder / "annotations/captions_val2014.json").unlink()
    assert "unpack annotations_trainval2014.zip" in refused("coco_captions", "val", folder)


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_sets_as_karpathy_splits_them(tmp_path, name):
    folder, set_name = small_sets.karpathy(tmp_path / name, name=name), {"coco": "coco_karpathy"}.get(name, name)
    parts = {split: image_datasets.records_of(set_name, split, folder) for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [4, 2, 3] and parts["test"].captions == 5  # restval is train
    for i, record in enumerate(record for part in parts.values() for record in part.get(range(len(part)))):
        assert record["captions"] == small_sets.captions(i) and record["image"].is_file()
    assert image_datasets.test_split(set_name) == "test" and image_datasets.test_split("captioned") == "val"
    asked = prompts(set_name, folder, 2, "train")
    assert asked == prompts(set_name, folder, 4, "train")[:2] and len({*prompts(set_name, folder, 4, "train")}) == 4
    assert main(set_name, str(folder), str(tmp_path / "prompts.txt")) == 3
    assert (tmp_path / "prompts.txt").read_text().splitlines() == prompts(set_name, folder, split="test")  # on which nothing was chosen
    for number, why in (("5", "has 3 images, and 5 prompts are asked for"), ("-1", "write a whole number")):
        with pytest.raises(UserError, match=why):
            main(set_name, str(folder), str(tmp_path / "prompts.txt"), number)
    images = parts["test"].get([0])[0]["image"].parent
    images.rename(images.with_name("elsewhere"))
    assert f"{images} does not exist: unpack the set's images there" in refused(set_name, "test", folder)
    (folder / f"dataset_{name}.json").write_text('{"images": [{"split": "test"}]}')
    assert "is not Karpathy's list of captions (KeyError" in refused(set_name, "test", folder)
    (folder / f"dataset_{name}.json").unlink()
    assert "has no dataset_coco.json or dataset_flickr30k.json" in refused(set_name, "test", folder)


def test_no_tensorflow_is_needed(tfds_dir):
    read = (
        "import sys; from mmdiff.data.image_datasets import ImageDataset\n"
        f"for name in ('imagenet2012', 'coco_captions'): print(len(ImageDataset(name, 'train', {str(tfds_dir)!r}).take([0])['image']))\n"
        "assert 'tensorflow' not in sys.modules"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", read], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n1\n"), done.stderr


def test_cub200_splits_by_class(birds):
    words = image_datasets.tokenizer("cub200", birds, 16, 400)
    train, test = (load_all(ImageDataset("cub200", split, birds, 16, words)) for split in ("train", "val"))
    np.testing.assert_array_equal(train["label"], [0, 0, 1, 1, 3, 3])
    np.testing.assert_array_equal(test["label"], [2, 2])
    np.testing.assert_allclose(test["image"][1], seen(5, 16), atol=0.01)  # a level of 256
    assert train["text"].shape == (6, 10, 16)
    assert words.decode(train["text"][0]) == ["a red square, seen once, take 0", "a red square, seen twice, take 0"] * 5
    assert len(set(words.decode(train["text"][1]))) == 10


def test_ones_own_folder(tmp_path):
    for split, classes in (("train", "cab"), ("val", "ba")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "one.png").write_bytes(small_sets.picture(ord(name), "PNG"))
            (tmp_path / split / name / "notes.txt").write_text("not an image")
    np.testing.assert_array_equal(load_all(ImageDataset("folder", "train", tmp_path, 8))["label"], [0, 1, 2])
    assert load_all(ImageDataset("folder", "val", tmp_path, 8))["image"].shape == (2, 8, 8, 3)
    (tmp_path / "val" / "d").mkdir()
    assert "has a class 'd'" in refused("folder", "val", tmp_path)
    assert "there is no folder" in refused("folder", "train", tmp_path / "none")
    (tmp_path / "train/a/two.jpg").write_bytes(small_sets.picture(0)[:200])
    with pytest.raises(UserError, match=r"two.jpg cannot be read as an image"):
        load_all(ImageDataset("folder", "train", tmp_path, 8))


def test_what_is_missing_is_named(tfds_dir, birds, tmp_path):
    assert "there is no set of images 'imagenet'" in refused("imagenet", "train", tfds_dir)
    assert "no split 'test': choose one of train, val" in refused("cub200", "test", birds)
    assert "config.data.dir is empty" in refused("coco_captions", "train", "")
    missing = refused("imagenet2012", "train", tmp_path)
    assert "ILSVRC2012_img_train.tar" in missing and "tfds.builder('imagenet2012'" in missing and "array_record" in missing
    assert "tfds.builder('coco_captions/2014'" in refused("coco_captions", "train", tmp_path)
    copy = shutil.copytree(tfds_dir / "imagenet2012", tmp_path / "imagenet2012") / "5.1.0/dataset_info.json"
    assert "array_record" in copy.read_text()
    copy.write_text(copy.read_text().replace("array_record", "tfrecord"))
    assert "prepare it again" in refused("imagenet2012", "train", tmp_path)
    with pytest.raises(UserError, match="the images of imagenet2012 have no captions"):
        image_datasets.tokenizer("imagenet2012", tfds_dir)

    (birds / "text_c10/001.Albatross/bird_1.txt").write_text("\n")
    assert "bird_1.txt holds no captions" in refused("cub200", "train", birds)
    (birds / "text_c10/001.Albatross/bird_1.txt").unlink()
    assert "bird_1.txt of " in refused("cub200", "train", birds)
    (birds / "testclasses.txt").write_text("005.Gull")
    assert "names the class '005.Gull'" in refused("cub200", "val", birds)
    (birds / "testclasses.txt").unlink()
    assert "the list of classes" in refused("cub200", "val", birds)
    assert "the official archive CUB_200_2011.tgz" in refused("cub200", "train", tmp_path / "none")


def test_made_up_pictures():
    source = open_image_dataset(ConfigDict({"name": "random", "dir": ""}), "val", 8)
    assert source.take(np.arange(3))["image"].shape == (3, 8, 8, 3)


def test_every_caption_comes_once_with_its_picture():
    text = np.arange(4 * 3 * 2, dtype=np.int32).reshape(4, 3, 2)
    source = Captioned(ArraySource({"tokens": np.arange(4), "text": text}))
    found = load_all(source)
    assert len(source) == 12 and found["text"].shape == (12, 2)
    np.testing.assert_array_equal(found["text"], text.reshape(12, 2))
    np.testing.assert_array_equal(found["tokens"], np.repeat(np.arange(4), 3))
    with pytest.raises(IndexError):
        source.take(np.array([12]))


def test_some_of_a_source():
    source = ArraySource({"x": np.arange(10)})
    np.testing.assert_array_equal(load_all(Subset(source, 4))["x"], [0, 2, 5, 7])
    np.testing.assert_array_equal(load_all(Subset(source, 40))["x"], np.arange(10))
    with pytest.raises(IndexError):
        Subset(source, 4).take(np.array([4]))


# ----------------------------------------------------------------------------------------------------- images with captions


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def said(i):
    return f"a {list(small_sets.COLOURS)[i % 3]} square, the {i}th"


@pytest.fixture
def shards(tmp_path):
    """As img2dataset writes: two tar files of three images each, one caption in a .json alone, and what else lies there."""
    folder = tmp_path / "cc3m"
    (folder / "train").mkdir(parents=True)
    for number in range(2):
        files = {}
        for i in range(3 * number, 3 * number + 3):
            key = f"{i:09d}"
            files[f"{key}.jpg"] = small_sets.picture(i)
            if i != 4:
                files[f"{key}.txt"] = said(i).encode()
            files[f"{key}.json"] = json.dumps({"caption": said(i) if i == 4 else "not this one", "url": "..."}).encode()
        shard(folder / f"train/{number:05d}.tar", {**files, "lost.txt": b"a caption without its image"})
        (folder / f"train/{number:05d}_stats.json").write_text("{}")
    return folder


def check(folder, count):
    words = image_datasets.tokenizer("captioned", folder, 32, 400)
    source = ImageDataset("captioned", "train", folder, 16, words)
    assert len(source) == count
    found = source.take(np.array([4, 0, 4, 1]))
    assert found["text"].shape == (4, 1, 32) and found["image"].dtype == np.float32
    assert words.decode(found["text"][:, 0]) == [said(4), said(0), said(4), said(1)]
    for row, i in zip(found["image"], [4, 0, 4, 1]):
        np.testing.assert_allclose(row, seen(i, 16), atol=0.01)
    assert load_all(Captioned(source))["text"].shape == (count, 32)


def test_shards(shards):
    check(shards, 6)


def test_a_picture_with_a_second_dot_in_a_shard_is_left_out_with_a_word(shards, caplog):
    picture = small_sets.picture(7)
    shard(shards / "train/00001.tar", {
        "a.png": picture, "a.txt": b"a square", "a.mask.png": picture, "b v1.0.JPG": picture, "b v1.0.txt": b"a circle",
        "._c.png": picture, "a.b.csv": b"1"})  # fmt: skip
    assert len(ImageDataset("captioned", "train", shards, 8)) == 4
    [said] = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "00001.tar: 2 images are left out, the first of them a.mask.png: a name ends at its first dot" in said


def test_shards_are_gone_through_once(shards, monkeypatch):
    first = load_all(ImageDataset("captioned", "train", shards, 8))["image"]
    assert (shards / "train/index.npz").exists() and len(list((shards / "train").iterdir())) == 5
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        np.testing.assert_array_equal(load_all(ImageDataset("captioned", "train", shards, 8))["image"], first)
    shard(shards / "train/00001.tar", {"7.webp": small_sets.picture(7, "WEBP"), "7.txt": said(7).encode()})
    assert len(ImageDataset("captioned", "train", shards, 8)) == 4  # one has changed
    (shards / "train/index.npz").write_bytes(b"PK\x03\x04 and so on")
    assert len(ImageDataset("captioned", "train", shards, 8)) == 4
    shard(shards / "train/00002.tar", {"8.png": small_sets.picture(8, "PNG"), "8.txt": said(8).encode()})
    assert len(ImageDataset("captioned", "train", shards, 8)) == 5


def test_shards_in_a_folder_that_cannot_be_written(shards, monkeypatch):
    def full(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    assert len(ImageDataset("captioned", "train", shards, 8)) == 6
    assert not [path for path in (shards / "train").iterdir() if "index" in path.name]


@pytest.mark.parametrize("listed", ["tsv", "txt"])
def test_plain_folders_with_captions(tmp_path, listed):
    (tmp_path / "train/00000").mkdir(parents=True)
    for i in range(5):
        (tmp_path / f"train/00000/{i}.jpg").write_bytes(small_sets.picture(i))
        if listed == "txt":
            content = json.dumps({"caption": said(i)}) if i == 1 else said(i) + "\n"
            (tmp_path / f"train/00000/{i}.{'json' if i == 1 else 'txt'}").write_text(content)
    if listed == "tsv":
        (tmp_path / "train/captions.tsv").write_text("".join(f"00000/{i}.jpg\t{said(i)}\n" for i in range(5)))
    found = load_all(ImageDataset("captioned", "train", tmp_path, 16))["image"]
    np.testing.assert_allclose(found, [seen(i, 16) for i in range(5)], atol=0.01)
    words = image_datasets.tokenizer("captioned", tmp_path, 32, 400)
    assert words.decode(load_all(Captioned(ImageDataset("captioned", "train", tmp_path, 16, words)))["text"]) == [said(i) for i in range(5)]


def test_damaged_pairs_are_named(shards, tmp_path):
    train = shards / "train"
    good = (train / "00000.tar").read_bytes()
    with tarfile.open(train / "00000.tar") as tar:
        third = tar.getmembers()[2].offset
    for content in (good[:2000], good[:third], good[:third] + b"x" * 512 + good[third + 512 :], b"", gzip.compress(good)):
        (train / "00000.tar").write_bytes(content)
        assert f"{train / '00000.tar'} cannot be read as a tar file" in refused("captioned", "train", shards)
    shard(train / "00000.tar", {"a.jpg": small_sets.picture(0)})
    assert f"a.jpg in {train / '00000.tar'} has no caption" in refused("captioned", "train", shards)
    shard(train / "00000.tar", {"a.jpg": small_sets.picture(0), "a.json": b"{"})
    assert f"a.jpg in {train / '00000.tar'} has no caption" in refused("captioned", "train", shards)
    shard(train / "00000.tar", {"a.jpg": small_sets.picture(0)[:300], "a.txt": b"a square"})
    source = ImageDataset("captioned", "train", shards, 8)
    with pytest.raises(UserError, match=r"a.jpg in .*00000.tar cannot be read as an image"):
        source.take(np.array([0]))
    (train / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001.tar cannot be read as an image \(.*No such file"):
        source.take(np.array([1]))
    shard(train / "00000.tar", {"a.txt": b"a square"})
    assert "there are no images (.png, " in refused("captioned", "train", shards)

    assert f"there is no folder {shards / 'val'}" in refused("captioned", "val", shards)
    (tmp_path / "train").mkdir()
    assert "there are no tar files and no images" in refused("captioned", "train", tmp_path)
    (tmp_path / "train/a.jpg").write_bytes(small_sets.picture(0))
    assert f"{tmp_path / 'train/a.jpg'} has no caption" in refused("captioned", "train", tmp_path)
    (tmp_path / "train/captions.tsv").write_text("a.jpg\ta square\nb.jpg a circle\n")
    assert f"line 2 of {tmp_path / 'train/captions.tsv'} has no tab" in refused("captioned", "train", tmp_path)
    (tmp_path / "train/captions.tsv").write_text("b.jpg\ta square\n")
    with pytest.raises(UserError, match=r"b.jpg cannot be read as an image \(.*No such file"):
        ImageDataset("captioned", "train", tmp_path, 8).take(np.array([0]))


def test_aircraft(tmp_path):
    data = tmp_path / "fgvc-aircraft-2013b/data"
    assert f"{data / 'variants.txt'} does not exist" in refused("fgvc_aircraft", "val", tmp_path)
    (data / "images").mkdir(parents=True)
    (data / "variants.txt").write_text("707-320\nF-16A/B\nHawk T1\n")
    (data / "images_variant_test.txt").write_text("0000001 Hawk T1\n0000002 707-320\n")
    for i in (1, 2):
        (data / f"images/000000{i}.jpg").write_bytes(small_sets.picture(i))
    source = ImageDataset("fgvc_aircraft", "val", tmp_path, 16)
    assert source.names == ("707-320", "F-16A/B", "Hawk T1")
    found = load_all(source)
    np.testing.assert_array_equal(found["label"], [2, 0])
    np.testing.assert_allclose(found["image"][0], seen(1, 16), atol=0.01)
    (data / "images_variant_test.txt").write_text("0000001 Concorde\n")
    assert "names the variant 'Concorde'" in refused("fgvc_aircraft", "val", tmp_path)
