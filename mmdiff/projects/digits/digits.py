"""The digits: 1,797 real handwritten digits of 8 x 8 pixels with 17 grey levels, which come with scikit-learn.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (UCI repository, 1998), its test part, as in
`sklearn.datasets.load_digits`. 43 people wrote them; every pixel counts the inked cells, 0..16, of a 4 x 4 block.

Nothing is downloaded, and TensorFlow is used neither to prepare the data set nor to read it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import pathlib
import tempfile

import numpy as np
import tensorflow_datasets as tfds

from mmdiff.data import bpe
from mmdiff.data.sources import ArraySource, fingerprint
from mmdiff.errors import UserError

LEVELS = 17  # values 0..16
CLASSES = 10
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {name}" for name in NAMES)
SIZES = {"train": 1097, "validation": 200, "test": 500}
# SHA-256 of each split's images and labels (uint8, in order): a damaged copy, or other digits, are noticed at once.
_FINGERPRINTS = {
    "train": "e8e007b3440f1af3a2fb10acf555d7f350d57c35c7cd341a655f60d0cfb23bfa",
    "validation": "40f9138f15cdea422cc07cd8ed97025a975233bf771164a8b41862d1cf904c8e",
    "test": "232a536553cbee5136690ce67258ce36d81d13c447ab8ade225131579a2f62dd",
}


def split_rows(
    labels: np.ndarray, test: int = SIZES["test"], validation: int = SIZES["validation"] // CLASSES
) -> dict[str, np.ndarray]:
    """The fixed stratified split: ascending row numbers, {"train": the rest, "validation": `validation` of each class, "test": [test]}.

    Class c gives its proportional share N_c * test / N of the test rows, rounded by the largest remainder. Its rows in an order that
    the raw words of Philox-4x64 with the key (0, 0) decide, hence no library's version: first the test's, then those for validation.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    share = counts * test / len(labels)
    quota = np.floor(share).astype(np.int64)
    quota[np.argsort(quota - share, kind="stable")[: test - quota.sum()]] += 1
    shuffled = np.argsort(np.random.Philox(key=np.zeros(2, np.uint64)).random_raw(len(labels)), kind="stable")
    of_class = [shuffled[labels[shuffled] == c] for c in range(len(counts))]
    chosen = {
        "validation": np.concatenate([rows[n : n + validation] for rows, n in zip(of_class, quota)]),
        "test": np.concatenate([rows[:n] for rows, n in zip(of_class, quota)]),
    }
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate(list(chosen.values())))
    return {"train": rest, **{split: np.sort(rows) for split, rows in chosen.items()}}


class Digits(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder `digits`: image uint8 [8, 8, 1] with values 0..16, label 0..9, splits train, validation and test (`SIZES`)."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {
        "1.0.0": "1,297 training and 500 test digits, stratified by class.",
        "2.0.0": "20 digits of each class leave the training split for a validation split; the test split is the same.",
    }

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits of 8x8 pixels with values 0..16, from scikit-learn, in a fixed stratified split.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,  # the stored order is the order of the rows
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits  # slow to import, and needed only once

        digits = load_digits()
        rows = split_rows(digits.target)
        return {split: self._generate_examples(digits, rows[split]) for split in SIZES}

    def _generate_examples(self, digits, rows):
        for key, row in enumerate(rows):
            yield key, {"image": digits.images[row].astype(np.uint8)[..., None], "label": int(digits.target[row])}


def digits_source(split: str, data_dir: str | os.PathLike | None = None) -> ArraySource:
    """One split of the digits in memory: image float32 [n, 8, 8, 1] in [-1, 1] (v/8 - 1 for v = 0..16), label int32 [n].

    The first call prepares the TFDS data set `digits` (two seconds); it may be made by several processes at once, and a damaged
    copy is replaced.

    Args:
      split: "train" (1,097), "validation" (200: 20 of each class) or "test" (500).
      data_dir: where TFDS keeps data sets; by default $TFDS_DATA_DIR, else ~/.cache/mmdiff/tfds.

    Raises:
      UserError: an unknown split, or a data_dir that cannot be written.
    """
    if split not in SIZES:
        raise UserError(f"the digits have no split {split!r}: choose one of {', '.join(SIZES)}.")
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/.cache/mmdiff/tfds"
    return _load(split, pathlib.Path(data_dir).expanduser().absolute())


def digits_tokens(split: str, data_dir: str | os.PathLike | None = None) -> ArraySource:
    """The same digits as tokens: tokens int32 [n, 64], the values 0..16 in raster order, and label int32 [n].

    The arguments and errors are those of `digits_source`.
    """
    arrays = digits_source(split, data_dir).arrays
    tokens = np.rint((arrays["image"] + 1) * 8).astype(np.int32)
    return ArraySource({"tokens": tokens.reshape(len(tokens), -1), "label": arrays["label"]})


@functools.cache
def _load(split: str, data_dir: pathlib.Path) -> ArraySource:
    version = data_dir / Digits.name / str(Digits.VERSION)
    if version.exists():
        try:
            return _read(split, data_dir)
        except Exception as error:  # TFDS and ArrayRecord raise many kinds for a copy that is partial or damaged
            logging.warning("the copy of the digits in %s is not usable (%s): recreating it.", version, error)
    # Made, read and checked in a folder of this process's own, then moved into place: no reader ever meets a partial copy, and
    # of two processes that do this at the same time both have their data, whoever comes first with the move.
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".digits-", ignore_cleanup_errors=True) as own:
            own = pathlib.Path(own)
            _prepare(own)
            source = _read(split, own)
            with contextlib.suppress(OSError):
                os.rename(version, own / "replaced")
            with contextlib.suppress(OSError):
                version.parent.mkdir(exist_ok=True)
                os.rename(own / version.relative_to(data_dir), version)
            return source
    except OSError as error:
        raise UserError(f"cannot keep the digits in {data_dir} ({error}): set TFDS_DATA_DIR to a folder you can write to.") from error


def _prepare(data_dir: pathlib.Path) -> None:
    tfds.disable_progress_bar()  # nothing is downloaded: not worth ten lines of progress
    with contextlib.redirect_stdout(io.StringIO()):
        Digits(data_dir=str(data_dir), file_format="array_record").download_and_prepare()


def _read(split: str, data_dir: pathlib.Path) -> ArraySource:
    examples = tfds.data_source(Digits.name, split=split, data_dir=str(data_dir), download=False)
    examples = [examples[i] for i in range(len(examples))]
    image = np.stack([example["image"] for example in examples])
    label = np.array([example["label"] for example in examples], np.int32)
    found = hashlib.sha256(image.tobytes() + label.astype(np.uint8).tobytes()).hexdigest()
    if found != _FINGERPRINTS[split]:
        raise ValueError(f"the {split} split has the fingerprint {found[:12]}, not {_FINGERPRINTS[split][:12]}")
    arrays = {"image": image.astype(np.float32) / 8 - 1, "label": label}
    for array in arrays.values():
        array.flags.writeable = False  # one copy serves every caller
    return ArraySource(arrays)


@functools.cache
def caption_tokenizer() -> bpe.Tokenizer:
    """The tokenizer of `captioned`'s ten captions."""
    return bpe.train(CAPTIONS, 8)


def captioned(source: ArraySource, vectors: np.ndarray) -> ArraySource:
    """The examples of a source of digits with the ids of their `CAPTIONS`, "text" int32 [n, 8], and `vectors[label]`, "query" [n, D]."""
    label = source.arrays["label"]
    ids = caption_tokenizer().encode(CAPTIONS)
    arrays = {**source.arrays, "text": ids[label], "query": np.asarray(vectors, np.float32)[label]}
    return ArraySource(arrays, fingerprint(source))


def random_prompts(size: int) -> np.ndarray:
    """A fixed unit vector for each digit, [10, size]: random directions, nearly at right angles."""
    vectors = np.random.Generator(np.random.Philox(0)).standard_normal((10, size))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
