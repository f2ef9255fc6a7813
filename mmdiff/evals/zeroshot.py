"""Zero-shot classification by prompts: DiffDis' twelve data sets, as CLIP is measured on them, and their evaluator.

    TFDS name                 images     measured                  TFDS name                       images     measured
    cifar10                   10,000     top-1                     oxford_flowers102                6,149     mean per class
    cifar100                  10,000     top-1                     food101 (validation)            25,250     top-1
    caltech101                 6,084     mean per class            oxford_iiit_pet                  3,669     mean per class
    dtd                        1,880     top-1                     cars196                          8,041     top-1
    eurosat/rgb (all)         27,000     top-1                     sun397/standard-part1-120k      19,850     top-1
    (fgvc_aircraft)            3,333     mean per class            imagenet2012 (validation)       50,000     top-1

of the test sets where nothing else is said. DIR/SET, with DIR the folder where TFDS keeps data sets, has a set as TFDS prepares it, or in
folders of its classes: DIR/SET/CLASS/NAME.png, or these in DIR/SET/test. FGVC-Aircraft is not in TFDS: its official archive is read
(mmdiff/data/image_datasets.py says what lies where). One's own images lie in folders of their classes, FOLDER/CLASS/NAME.png.

The prompts are our own, fewer than CLIP's (18 for the CIFARs, 34 for Caltech101, 80 for ImageNet, ...), and so are the classes' names,
those of TFDS or of the folders in plain words: metrics are comparable with each other, less so with published ones. In their place stand

    DIR/SET/classes.txt, FOLDER/classes.txt      a name on every line, by label: in the order of the folders' names
    DIR/SET/prompts.txt, FOLDER/prompts.txt      a prompt on every line, with the name as {}: "a photo of a {}."

ImageNet needs names, for TFDS stores WordNet's ids. A class' vector is the mean of its prompts' unit vectors, normalised, as CLIP's.

    python -m mmdiff eval --config ... --workdir ... --zeroshot all                         or --zeroshot cifar10,food101
    python -m mmdiff eval --config ... --workdir ... --zeroshot all --zeroshot-dir DIR      where TFDS keeps data sets elsewhere
    python -m mmdiff eval --config ... --workdir ... --zeroshot ./pets --prompts FILE       one's own images, and prompts

set config.eval.zeroshot, zeroshot_dir and zeroshot_prompts, which a config hands to `asked`. A joint model of images and texts without
vectors is classified by as in `diffusion_classifier`.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from mmdiff import files
from mmdiff.data.image_datasets import Absent, ImageDataset
from mmdiff.data.sources import Source, Subset
from mmdiff.errors import UserError
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import Clock, EvalResult, best, example_keys, say
from mmdiff.evals.retrieval import class_vectors, mean_per_class, scores

CLASSES, PROMPTS = "classes.txt", "prompts.txt"
TEXTS = 2000  # prompts that are encoded at once

PHOTO = ("a photo of a {}.",)
PHOTOS = (
    *PHOTO, "a photo of the {}.", "a picture that shows a {}.", "a {} seen from nearby.", "a {} in the distance.",
    "a bright photo of a {}.", "a dark photo of a {}.", "a photo of one {} among other things.")
COARSE = (*PHOTOS, "a very small picture of a {}.", "a blurred photo of a {}.", "a photo of a {} in coarse pixels.")
DEPICTED = (
    *PHOTOS, "a drawing of a {}.", "a painting of a {}.", "a {} made of lines.", "a toy in the shape of a {}.", "a {} as a comic.",
    "a figure of a {}.")


@dataclasses.dataclass(frozen=True)
class Task:
    """How a data set is classified: its prompts, and whether CLIP's protocol takes the mean of its classes' accuracies."""

    templates: tuple[str, ...]
    per_class: bool = False


TASKS: Mapping[str, Task] = {
    "cifar10": Task(COARSE),
    "cifar100": Task(COARSE),
    "caltech101": Task(DEPICTED, per_class=True),
    "dtd": Task((
        "a photo of a {} texture.", "a photo of a {} surface.", "a {} pattern.", "a thing that looks {}.",
        "something {} seen from nearby.")),
    "eurosat": Task(("a satellite photo of {}.", "{} seen from above.", "land from the air: {}.")),
    "fgvc_aircraft": Task(("a photo of a {}, a type of aircraft.", "an aeroplane: the {}."), per_class=True),
    "oxford_flowers102": Task(("a photo of a {}, a type of flower.",), per_class=True),
    "food101": Task(("a photo of {}, a type of food.",)),
    "oxford_iiit_pet": Task(("a photo of a {}, a type of pet.",), per_class=True),
    "cars196": Task((*PHOTO, "a photo of a {}, a type of car.", "a {} on the road.", "a {} for sale.", "the car is a {}.")),
    "sun397": Task((*PHOTO, "a photo of the place: {}.")),
    "imagenet2012": Task((*DEPICTED, "a blurred photo of a {}.", "a {} in its usual place.", "many of them: {}.", "a part of a {}.")),
}
OWN = Task(PHOTO)


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Top-1 and mean-per-class accuracy on those data sets that are on disk; the others are named in `settings`.

        ZeroShot(jax.jit(aligner.function(10, cached=True)), lambda params, texts: towers.encode(texts), "tfds", 256)

    Attributes:
      encode_image: `(params, keys [n], {"image": float32 [n, size, size, 3] in [-1, 1]}) -> vectors [n, D]`, jitted.
      encode_text: `(params, texts) -> vectors [n, D]`.
      data_dir: where the data sets are. size: the side of an image, of which the central square is seen.
      count: images of each set, evenly spread over it; by default all.
      batch: images of a call of `encode_image`, always that many.
      names: of the data sets, or one's own folders.
      prompts: in the place of the sets' own.

    Raises:
      UserError: no set that is on disk with names of its classes, one that cannot be read, or names that are not as many as its classes.
    """

    encode_image: Callable
    encode_text: Callable
    data_dir: str | os.PathLike
    size: int
    count: int | None = None
    batch: int = 250
    names: Sequence[str] = tuple(TASKS)
    prompts: Sequence[str] = ()
    by: ClassVar[str] = "the vectors of prompts"
    most_prompts: ClassVar[int | None] = None

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        if getattr(experiment, "split", "test") != "test":
            return EvalResult({}, settings={"zero_shot_not_run": "these are test sets: nothing is chosen on them"})
        sets, not_run, chosen = {}, {}, []
        for name in self.names:
            folder = files.expand(self.data_dir) / name if name in TASKS else files.expand(name)
            if (source := self._source(name, folder)) is None:
                not_run[name] = "not on disk"
            elif names := class_names(source.names, folder):
                called = name if name in TASKS else re.sub(r"\W+", "_", folder.absolute().name)
                if called in sets:
                    raise UserError(f"two of the data sets {', '.join(self.names)} are called {called}: rename one folder.")
                own = read_prompts(folder / PROMPTS) if os.path.lexists(folder / PROMPTS) else ()
                templates = (self.prompts or own or TASKS.get(name, OWN).templates)[: self.most_prompts]
                if name in TASKS:
                    chosen.append(f"{name}_{'mean_per_class' if TASKS[name].per_class else 'top1'}")
                sets[called] = (Subset(source, self.count) if self.count else source), names, templates
            else:
                not_run[name] = f"names of classes are missing: write them into {folder / CLASSES}"
        if not sets:
            raise UserError(
                f"none of the data sets {', '.join(self.names)} can be classified: in {self.data_dir} they are missing or have no names of "
                "their classes (mmdiff/data/image_datasets.py and mmdiff/evals/zeroshot.py say what lies where).")
        if not_run:
            say(f"not run for want of data or names (data/image_datasets.py, evals/zeroshot.py say what lies where): {', '.join(not_run)}")
        clock, metrics, definitions = Clock(), {}, {}
        for name, (source, names, templates) in sets.items():
            clock.start(name, f"classifying {len(source):,} images of {name}, {len(names)} classes")
            predicted, true = self._classify(params, key, source, self._classes(params, names, templates))
            share = f"share of {len(source):,} images of {name} whose class is predicted, among {len(names)} by {self.by}"
            metrics |= {f"{name}_top1": accuracy(predicted, true), f"{name}_mean_per_class": mean_per_class(predicted, true)}
            definitions |= {f"{name}_top1": share, f"{name}_mean_per_class": "the mean over the classes of that share"}
        clock.stop()
        if chosen:
            metrics["zero_shot"] = float(np.mean([metrics[each] for each in chosen]))
            definitions["zero_shot"] = f"the mean over {len(chosen)} of {len(TASKS)} data sets: {', '.join(chosen)}"
        settings = {
            "zero_shot_images": {name: len(source) for name, (source, _, _) in sets.items()},
            "zero_shot_prompts": {name: len(templates) for name, (_, _, templates) in sets.items()},
            "zero_shot_not_run": not_run,
            "zero_shot_seconds": clock.seconds,
        }
        return EvalResult(metrics, definitions, {}, settings)

    def _source(self, name: str, folder: pathlib.Path) -> ImageDataset | None:
        """The images of a set, None if it is not on disk."""
        if name not in TASKS:
            return ImageDataset("classes", "val", folder, self.size)
        try:
            return ImageDataset(name, "val", self.data_dir, self.size)
        except Absent:
            there = files.is_folder(folder) and files.images(folder)  # not a TFDS set that is half prepared
            return ImageDataset("classes", "val", folder, self.size) if there else None

    def _classes(self, params: Any, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """The classes' unit vectors [classes, D]."""
        part = max(1, TEXTS // len(templates))
        encode = functools.partial(self.encode_text, params)
        return np.concatenate([class_vectors(encode, names[i : i + part], templates) for i in range(0, len(names), part)])

    def _classify(self, params: Any, key: jax.Array, source: Source, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The predicted and the true labels [n]; only `batch` images are in memory."""
        count, predicted, true = len(source), [], []
        keys = example_keys(key, count)
        for start in range(0, count, self.batch):
            rows = np.arange(start, min(start + self.batch, count))
            found = source.take(rows)
            predicted.append(best("scores", self._scores(params, keys[rows], found["image"], candidates)))
            true.append(found["label"])
        return np.concatenate(predicted), np.concatenate(true)

    def _scores(self, params: Any, keys: jax.Array, images: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Of images the score of each class [n, classes]."""
        rows = np.minimum(np.arange(self.batch), len(images) - 1)  # what the last batch lacks repeats the last image
        return scores(self.encode_image(params, keys[rows], {"image": images[rows]}), candidates)[: len(images)]


def asked(options: Any, encode_image: Callable, encode_text: Callable, size: int) -> tuple[ZeroShot, ...]:
    """The evaluators that a config's `eval` section asks for: one for zeroshot = "all", "cifar10,food101" or a folder, none for "".

    Args:
      options: the section: zeroshot, zeroshot_dir ("" is where TFDS keeps data sets), zeroshot_prompts (a file, "" for the sets' own),
        zeroshot_images (of each set, 0 for all) and batch.
      encode_image, encode_text, size: as in `ZeroShot`.

    Raises:
      UserError: unknown names, a folder or file that does not exist, or one without prompts.
    """
    if not options.zeroshot:
        return ()
    return (ZeroShot(encode_image, encode_text, size=size, batch=options.batch, **selected(options)),)


def selected(options: Any) -> dict[str, Any]:
    """The fields data_dir, names, prompts and count of a `ZeroShot` that options ask for, as in `asked`."""
    names = tuple(TASKS) if options.zeroshot == "all" else tuple(dict.fromkeys(name.strip() for name in options.zeroshot.split(",")))
    for name in names:
        if name not in TASKS and not (name and files.is_folder(files.expand(name))):
            near = difflib.get_close_matches(name, TASKS, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(
                f"there is no zero-shot data set or folder {name!r}{hint}: config.eval.zeroshot is all, some of {', '.join(TASKS)}, or "
                "a folder with a folder of images for each class.")
    folder = options.zeroshot_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if not TASKS.keys().isdisjoint(names) and not pathlib.Path(folder).expanduser().is_dir():
        raise UserError(
            f"there is no folder {folder}: name the one with the zero-shot data sets, --zeroshot-dir DIR (config.eval.zeroshot_dir; "
            "mmdiff/data/image_datasets.py says what is in it).")
    prompts = getattr(options, "zeroshot_prompts", "")  # config files of before have neither this nor zeroshot_images
    try:
        prompts = read_prompts(prompts) if prompts else ()
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')} (--prompts, config.eval.zeroshot_prompts).") from error
    return {"data_dir": folder, "names": names, "prompts": prompts, "count": int(getattr(options, "zeroshot_images", 0)) or None}


def read_prompts(path: str | os.PathLike) -> tuple[str, ...]:
    """The prompts of a file, one on every line that is not empty.

    Raises:
      UserError: a file that cannot be read, has none, or one without the place of the class' name.
    """
    found = tuple(files.read_names(path))
    for line in found or [""]:
        if "{}" not in line:
            what = f"has the prompt {line[:80]!r} without the place of the class" if found else "has no prompts"
            raise UserError(f"{path} {what}: write one on every line, with the class as {{}}, 'a photo of a {{}}.'.")
    return found


def class_names(stored: Sequence[str], folder: pathlib.Path) -> list[str]:
    """The names of a set's classes by label: those of its classes.txt, else what is stored in plain words; none if these are ids.

    Raises:
      UserError: a classes.txt with more or fewer names than classes; two classes of one name, which no prompt tells apart.
    """
    path = folder / CLASSES
    if os.path.lexists(path):
        names = [line.strip() for line in files.read_lines(path) if line.strip()]
        if len(names) != len(stored):
            raise UserError(f"{path} has {len(names)} names for {len(stored)} classes: it has one on every line, by label.")
    else:
        names = [] if all(re.fullmatch(r"n\d{8}", each) for each in stored) else [plain(each) for each in stored]
    if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise UserError(f"several classes are called {', '.join(map(repr, twice))}: write names that differ into {path}.")
    return names


def plain(name: str) -> str:
    """A class' name as TFDS stores it in words: "/b/bakery/shop" (SUN397), "AnnualCrop" (EuroSAT), "apple_pie"."""
    if name.startswith("/"):
        name = name[3:].replace("/", " ")
    if name.isalpha():
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return name.replace("_", " ").strip()
