"""Zero-shot classification by prompts: DiffDis' twelve data sets, as CLIP is measured on them, and their evaluator.

    TFDS name                 images     measured                  TFDS name                       images     measured
    cifar10                   10,000     top-1                     oxford_flowers102                6,149     mean per class
    cifar100                  10,000     top-1                     food101 (validation)            25,250     top-1
    caltech101                 6,084     mean per class            oxford_iiit_pet                  3,669     mean per class
    dtd                        1,880     top-1                     cars196                          8,041     top-1
    eurosat/rgb (all)         27,000     top-1                     sun397/standard-part1-120k      19,850     top-1
    (fgvc_aircraft)            3,333     mean per class            imagenet2012 (validation)       50,000     top-1

of the test sets where nothing else is said. FGVC-Aircraft is not in TFDS, so its official archive is read;
mmdiff/data/image_datasets.py says what lies where.

The prompts are our own, fewer than CLIP's (18 for the CIFARs, 34 for Caltech101, 80 for ImageNet, ...), and so are the classes' names,
those of TFDS in plain words: metrics are comparable with each other, less so with published ones. A file DATA_DIR/SET/classes.txt,
a name on every line by label, takes the place of the names. ImageNet needs it, for TFDS stores WordNet's ids.

    python -m mmdiff eval --config ... --workdir ... --zeroshot all                         or --zeroshot cifar10,food101
    python -m mmdiff eval --config ... --workdir ... --zeroshot all --zeroshot-dir DIR      where TFDS keeps data sets elsewhere

set config.eval.zeroshot and config.eval.zeroshot_dir, which a config hands to `asked`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmdiff import files
from mmdiff.data.image_datasets import Absent, ImageDataset
from mmdiff.data.sources import Source, Subset
from mmdiff.errors import UserError
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import Clock, EvalResult, best, example_keys, say
from mmdiff.evals.retrieval import class_vectors, mean_per_class, scores

CLASSES = "classes.txt"
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


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Top-1 and mean-per-class accuracy on those data sets that are on disk; the others are named in `settings`.

        ZeroShot(jax.jit(aligner.function(10, cached=True)), lambda params, texts: towers.encode(texts), "tfds", 256)

    Attributes:
      encode_image: `(params, keys [n], {"image": float32 [n, size, size, 3] in [-1, 1]}) -> vectors [n, D]`, jitted.
      encode_text: `(params, texts) -> vectors [n, D]`.
      data_dir: where TFDS keeps data sets. size: the side of an image, of which the central square is seen.
      count: images of each set, evenly spread over it; by default all.
      batch: images of a call of `encode_image`, always that many.
      names: of the data sets.

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

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        if getattr(experiment, "split", "test") != "test":
            return EvalResult({}, settings={"zero_shot_not_run": "these are test sets: nothing is chosen on them"})
        clock, metrics, definitions, not_run, sources = Clock(), {}, {}, {}, {}
        for name in self.names:
            try:
                source = ImageDataset(name, "val", self.data_dir, self.size)
            except Absent:
                not_run[name] = "not on disk"
                continue
            if names := class_names(name, source.names, self.data_dir):
                sources[name] = (Subset(source, self.count) if self.count else source), names
            else:
                not_run[name] = f"names of classes are missing: write them into {pathlib.Path(self.data_dir) / name / CLASSES}"
        if not sources:
            raise UserError(
                f"none of the data sets {', '.join(self.names)} can be classified: in {self.data_dir} they are missing or have no names of "
                "their classes (mmdiff/data/image_datasets.py and mmdiff/evals/zeroshot.py say what lies where).")
        if not_run:
            say(f"not run for want of data or names (data/image_datasets.py, evals/zeroshot.py say what lies where): {', '.join(not_run)}")
        for name, (source, names) in sources.items():
            clock.start(name, f"classifying {len(source):,} images of {name}, {len(names)} classes")
            predicted, true = self._classify(params, key, source, self._classes(params, names, TASKS[name].templates))
            share = f"share of {len(source):,} images of {name} whose class is predicted, among {len(names)} by the vectors of prompts"
            metrics |= {f"{name}_top1": accuracy(predicted, true), f"{name}_mean_per_class": mean_per_class(predicted, true)}
            definitions |= {f"{name}_top1": share, f"{name}_mean_per_class": "the mean over the classes of that share"}
        clock.stop()
        chosen = {name: f"{name}_{'mean_per_class' if TASKS[name].per_class else 'top1'}" for name in sources}
        metrics["zero_shot"] = float(np.mean([metrics[each] for each in chosen.values()]))
        definitions["zero_shot"] = f"the mean over {len(chosen)} of {len(TASKS)} data sets: {', '.join(chosen.values())}"
        settings = {
            "zero_shot_images": {name: len(source) for name, (source, _) in sources.items()},
            "zero_shot_prompts": {name: len(TASKS[name].templates) for name in sources},
            "zero_shot_not_run": not_run,
            "zero_shot_seconds": clock.seconds,
        }
        return EvalResult(metrics, definitions, {}, settings)

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
            rows = np.minimum(np.arange(start, start + self.batch), count - 1)  # what the last batch lacks repeats the last image
            found = source.take(rows)
            predicted.append(best("scores", scores(self.encode_image(params, keys[rows], {"image": found["image"]}), candidates)))
            true.append(found["label"])
        return np.concatenate(predicted)[:count], np.concatenate(true)[:count]


def asked(options: Any, encode_image: Callable, encode_text: Callable, size: int) -> tuple[ZeroShot, ...]:
    """The evaluators that a config's `eval` section asks for: one for zeroshot = "all" or "cifar10,food101", none for "".

    Args:
      options: the section: zeroshot, zeroshot_dir ("" is where TFDS keeps data sets) and batch.
      encode_image, encode_text, size: as in `ZeroShot`.

    Raises:
      UserError: unknown names, or a folder that does not exist.
    """
    if not options.zeroshot:
        return ()
    names = tuple(TASKS) if options.zeroshot == "all" else tuple(dict.fromkeys(name.strip() for name in options.zeroshot.split(",")))
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"there is no zero-shot data set {name!r}{hint}: config.eval.zeroshot is all, or some of {', '.join(TASKS)}.")
    folder = options.zeroshot_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if not pathlib.Path(folder).expanduser().is_dir():
        raise UserError(
            f"there is no folder {folder}: name the one with the zero-shot data sets, --zeroshot-dir DIR (config.eval.zeroshot_dir; "
            "mmdiff/data/image_datasets.py says what is in it).")
    return (ZeroShot(encode_image, encode_text, folder, size, batch=options.batch, names=names),)


def class_names(name: str, stored: Sequence[str], data_dir: str | os.PathLike) -> list[str]:
    """The names of a set's classes by label: those of its classes.txt, else what is stored in plain words; none if these are ids.

    Raises:
      UserError: a classes.txt with more or fewer names than classes.
    """
    path = files.expand(data_dir) / name / CLASSES
    if os.path.lexists(path):
        names = [line.strip() for line in files.read_lines(path) if line.strip()]
        if len(names) != len(stored):
            raise UserError(f"{path} has {len(names)} names for {len(stored)} classes: it has one on every line, by label.")
        return names
    return [] if all(re.fullmatch(r"n\d{8}", each) for each in stored) else [plain(each) for each in stored]


def plain(name: str) -> str:
    """A class' name as TFDS stores it in words: "/b/bakery/shop" (SUN397), "AnnualCrop" (EuroSAT), "apple_pie"."""
    if name.startswith("/"):
        name = name[3:].replace("/", " ")
    if name.isalpha():
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return name.replace("_", " ").strip()
