"""Sets of images with a few examples, stored as the real ones are: TFDS's array records, the folders of COCO and CUB-200, tar files."""

import contextlib
import functools
import gzip
import io
import json
import pathlib
import tarfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 200)}
HEIGHT, WIDTH = 48, 80


def picture(i, kind="JPEG"):
    """A file's content: a square of one colour on grey, its place changing with i."""
    pixels = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    pixels[8 : 8 + 4 * (i % 5) + 8, 20:60] = list(COLOURS.values())[i % 3]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def captions(i, count=5):
    return [f"A {list(COLOURS)[i % 3]} square, seen {words}" for words in ("once", "twice", "again", "here", "there", "now")][:count]


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders below share."""

    FEATURES: dict = {}
    COUNTS: dict = {}

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.FEATURES), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        starts = np.cumsum([0, *self.COUNTS.values()])
        return {split: self._generate_examples(int(start), count) for (split, count), start in zip(self.COUNTS.items(), starts)}

    def _generate_examples(self, start, count):
        for i in range(count):
            yield i, self.example(start + i)


class ImageNet(Tiny, skip_registration=True):
    name = "imagenet2012"
    VERSION = tfds.core.Version("5.1.0")
    COUNTS = {"train": 6, "validation": 3}
    FEATURES = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
        "file_name": tfds.features.Text(),
    }

    def example(self, i):
        return {"image": io.BytesIO(picture(i)), "label": 7 * i, "file_name": f"{i}.jpg"}


class Coco(Tiny, skip_registration=True):
    name = "coco_captions"
    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014")]
    COUNTS = {"train": 6, "val": 1, "restval": 2, "test": 1}
    FEATURES = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
        "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), "is_crowd": np.bool_}),
    }

    def example(self, i):
        said = captions(i, 4 + i % 3)  # some have fewer than five, some more
        objects = [{"bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0), "is_crowd": False}] * (i % 2)
        said = [{"text": text, "id": 10 * i + j} for j, text in enumerate(said)]
        return {"image": io.BytesIO(picture(i)), "image/filename": f"{i}.jpg", "image/id": i, "captions": said, "objects": objects}


def prepare(builder, folder):
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder(data_dir=str(folder), file_format="array_record").download_and_prepare()


def coco(folder, counts=(("train", 3), ("val", 2))):
    """The official archives of 2014: images and their captions in lists of their own, the captions in no order."""
    folder, i = pathlib.Path(folder), 0
    (folder / "annotations").mkdir(parents=True)
    for split, count in counts:
        (folder / f"{split}2014").mkdir()
        listed = {"info": {"year": 2014}, "licenses": [], "images": [], "annotations": []}
        for i in range(i, i + count):
            name = f"COCO_{split}2014_{i:012d}.jpg"
            (folder / f"{split}2014" / name).write_bytes(picture(i))
            listed["images"].append({"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH})
            said = enumerate(captions(i, 4 + i % 3))
            listed["annotations"] += [{"image_id": i, "id": 10 * i + j, "caption": f"{text}\n"} for j, text in said]
        i += 1
        listed["annotations"].reverse()
        (folder / f"annotations/captions_{split}2014.json").write_text(json.dumps(listed))
    return folder


def karpathy(folder, counts=(("train", 3), ("restval", 1), ("val", 2), ("test", 3)), name="coco"):
    """Karpathy's list of COCO or "flickr30k" with the images it names, which have five captions, or as many more as they are many."""
    folder, listed, i = pathlib.Path(folder), {"dataset": name, "images": []}, 0
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts:
        for i in range(i, i + count):
            part = f"{'train' if split == 'train' else 'val'}2014"
            file = {"filepath": part, "filename": f"COCO_{part}_{i:012d}.jpg"} if name == "coco" else {"filename": f"{i}.jpg"}
            path = folder / file.get("filepath", "flickr30k-images") / file["filename"]
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(picture(i))
            said = [{"raw": f"{text} \n", "tokens": text.lower().split(), "imgid": i} for text in captions(i, 5 + i % 2)]
            listed["images"].append({**file, "split": split, "imgid": i, "sentences": said})
        i += 1
    (folder / f"dataset_{name}.json").write_text(json.dumps(listed))
    return folder


def cub200(folder):
    """Four classes, one of them for testing, with two images each and ten captions (an image of the first class has two)."""
    folder = pathlib.Path(folder)
    names = ["001.Albatross", "002.Auklet", "003.Wren", "004.Wagtail"]
    for i, name in enumerate(names):
        for part in ("CUB_200_2011/images", "text_c10"):
            (folder / part / name).mkdir(parents=True)
        for j in range(2):
            (folder / "CUB_200_2011/images" / name / f"bird_{j}.jpg").write_bytes(picture(2 * i + j))
            lines = [f"{line}, take {k}" for k in range(2) for line in captions(2 * i + j)][: 2 if i + j == 0 else 10]
            (folder / "text_c10" / name / f"bird_{j}.txt").write_text("\n".join(lines) + "\n")
    (folder / "trainvalclasses.txt").write_text("\n".join([names[0], names[1], names[3]]) + "\n")
    (folder / "testclasses.txt").write_text(names[2] + "\n")
    return folder


def clothes(count):
    """Images uint8 [count, 28, 28] and labels uint8 [count] in Fashion-MNIST's shape: a bar of noise, whose height names the class."""
    rng, labels = np.random.default_rng(count), np.arange(count) % 10
    images = np.zeros((count, 28, 28), np.uint8)
    for image, label in zip(images, labels):
        image[2 * label : 2 * label + 6] = rng.integers(100, 256, (6, 28))
    return images, labels.astype(np.uint8)


def idx(array):
    """An array uint8 as the content of an idx file."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape) + array.tobytes()


def fashion_mnist(folder, train=240, test=40):
    """The four files, of a few made-up clothes; those for training are compressed."""
    for part, count in (("train", train), ("t10k", test)):
        for name, array in zip(("images-idx3", "labels-idx1"), clothes(count)):
            path = pathlib.Path(folder) / f"{part}-{name}-ubyte"
            if part == "train":
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(idx(array), 1))
            else:
                path.write_bytes(idx(array))
    return folder


class FashionMnist(Tiny, skip_registration=True):
    name = "fashion_mnist"
    VERSION = tfds.core.Version("3.0.1")
    COUNTS = {"train": 24, "test": 10}
    FEATURES = {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}

    def _split_generators(self, dl_manager):
        return {split: self._of(*clothes(count)) for split, count in self.COUNTS.items()}

    def _of(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels)):
            yield i, {"image": image[..., None], "label": int(label)}


SKIN = {
    "light": (250, 220, 190), "medium-light": (224, 187, 149), "medium": (186, 141, 104), "medium-dark": (155, 105, 67),
    "dark": (100, 75, 60)}


@functools.cache
def emoji_pairs(bases=10, names=40):
    """[(key, a PNG, what its .json says)]: made-up emoji, ten names with a picture in each tone and in none, one in two tones, too."""
    found = []

    def add(shape, name, category, tones=()):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[8 + shape % 7 : 56, 8:56] = (240, 200, 30, 255) if shape < bases else (30, 5 * shape, 250 - 4 * shape, 255)
        for place, tone in enumerate(tones):
            pixels[20:50, 12 + 20 * place : (52 if len(tones) == 1 else 30 + 20 * place)] = (*SKIN[tone], 255)
        pixels[50:54, 4 + shape : 9 + shape] = (30, 60, 200, 255)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        said = {"name": name, "short_names": [name], "category": category, "subcategory": ""}
        said["tones"] = [f"{tone} skin tone" for tone in tones]
        found.append((f"{len(found):04x}", stream.getvalue(), said))

    for i in range(bases):
        for tones in ((), *((tone,) for tone in SKIN), *([("light", "dark")] if i == 0 else [])):
            add(i, f"hand {'abcdefghij'[i]}", "People & Body", tones)
    for i in range(names):
        add(bases + i, f"flag {i}", ("Flags", "Objects")[i % 2])
    return tuple(found)


def write_tar(path, content, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, each in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(each)
            tar.addfile(member, io.BytesIO(each))
    return path


def emoji(path, thing="flag"):
    """The tar file of these emoji, or of those of another thing."""
    pairs = [(key, image, said | {"name": said["name"].replace("flag", thing)}) for key, image, said in emoji_pairs()]
    return write_tar(path, {name: each for key, image, said in pairs for name, each in (
        (f"{key}.png", image), (f"{key}.json", json.dumps(said).encode()))})


def python_modules(folder):
    """Modules with documentation strings; `projects.text.docstrings` keeps "c" for validation, and "f", here a package, for the test."""
    same = "What is written the same in all modules counts once."
    long = " ".join(["value"] * 60)
    letters = "".join(np.random.default_rng(0).choice(list("bcdfgjklmqvwxz"), 200))

    def module(path, *texts):
        path.parent.mkdir(parents=True, exist_ok=True)
        functions = "".join(f'def f{i}():\n    """{text}"""\n\n' for i, text in enumerate(texts))
        path.write_text(f'"""A module, in which {path.stem} is described.\n\n{same}\n"""\n\n{functions}')

    for name in ("a", "b"):
        things = ("file", "value", "number", "text", "list")
        module(folder / f"{name}.py", long, *(f"Return the {thing} of the object, or none in {name}." for thing in things))
    module(folder / "c.py", "Set the value of the object.", "Read the text of a file.\n\n    >>> read()")
    module(folder / "f/__init__.py", "Set the number of the object.", f"Return {letters} as it is.")
    module(folder / "f/deeper/g.py", "A text that is nested deep in the package.")
    module(folder / "a_package/tests/test_x.py", "How pytest calls these functions.")
    (folder / "d.py").write_text("this is no Python\n")
    (folder / "e.py").write_text(f"x = {'-' * 100_000}1\n")  # and this too deep for Python
    return folder
