"""Images with several captions each: retrieval both ways, by beliefs or by likelihood, and captions of images against theirs.

A source of them has all captions of an image in a row, `source.of_image` examples (5 of COCO and Flickr30k). An image counts as found if
the text that was asked with is one of its captions, a text if it is one of the image's: Recall@K as it is published for these sets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from mmdiff import sampling
from mmdiff.data import image_datasets
from mmdiff.errors import UserError
from mmdiff.evals import plots
from mmdiff.evals.accuracy import denoising_losses
from mmdiff.evals.caption_scores import ORDERS, bleu, cider_d
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, example_keys, finite, in_batches, predict_batched
from mmdiff.evals.retrieval import recalls

SHOWN = 24


@dataclasses.dataclass(frozen=True)
class CaptionedImages:
    """The first images of a source: `images`, the arrays [n, ...] of one example of each, `texts`, those of all, `each` of one image."""

    images: Mapping[str, np.ndarray]
    texts: Mapping[str, np.ndarray]
    each: int

    @classmethod
    def of(cls, source: Any, most: int) -> CaptionedImages:
        each = getattr(source, "of_image", 1)
        count = min(most, len(source) // each)
        found = source.take(np.arange(count * each))
        return cls({name: array[::each] for name, array in found.items()}, found, each)

    def __len__(self):
        return len(next(iter(self.images.values())))

    @property
    def relevant(self) -> np.ndarray:
        """Which text [n * each] is of which image [n]."""
        return np.repeat(np.eye(len(self), dtype=bool), self.each, axis=1)

    def __str__(self):
        return f"{len(self):,} images with {self.each} caption{'s' * (self.each > 1)} each"


@dataclasses.dataclass(frozen=True)
class BeliefRetrieval:
    """Recall@1, 5 and 10 both ways by one network call for each image and each text: the belief about the other, and what is nearest to it.

    The belief about the text given the image is its mean; of all texts the one with the least squared distance to it is found. Likewise
    the belief about `target`, a vector of the image, given the text.

    Attributes:
      target: what is predicted of an image. given: what a text is predicted from.
      text: the text's vectors.
      most: images at most. batch: examples in a network call.
    """

    target: str = "image"
    given: Sequence[str] = ("image",)
    text: str = "text"
    most: int = 5000
    batch: int = 64

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        data, keys, clock = CaptionedImages.of(experiment.test_data(), self.most), jax.random.split(key), Clock()
        clock.start("belief_retrieval", f"beliefs about {data}, one call for each image and each text")
        given = {name: data.images[name] for name in self.given}
        texts = predict_batched(experiment, params, keys[0], given, self.text, self.batch)
        images = predict_batched(experiment, params, keys[1], {self.text: data.texts[self.text]}, self.target, self.batch)
        clock.stop()
        by_image = recalls(nearness(texts, data.texts[self.text]), data.relevant)
        by_text = recalls(nearness(data.images[self.target], images), data.relevant)
        metrics = {name: (by_image if name.startswith("image_to_text") else by_text)[name] for name in by_image}
        text = f"Recall of {data}: what is nearest to the belief given the image, or given the text, by one network call"
        definitions = dict.fromkeys(metrics, text)
        return EvalResult(metrics, definitions, {}, {"retrieval_images": len(data), "evaluation_seconds": clock.seconds})


@dataclasses.dataclass(frozen=True)
class LikelihoodRetrieval:
    """Recall@1, 5 and 10 both ways by likelihood: the loss of the image given every text, and of the text given every image.

    Every image is compared with every text, `draws` network calls each: n images with k captions cost 2 n^2 k draws calls.

    Attributes:
      image, text: the modalities; all others are absent.
      most: images at most, the first ones. draws: noisy copies, the same for all candidates. batch: examples in a network call.
    """

    image: str = "image"
    text: str = "text"
    most: int = 100
    draws: int = 4
    batch: int = 64

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        data, clock, found = CaptionedImages.of(experiment.test_data(), self.most), Clock(), {}
        images, texts = data.images[self.image], data.texts[self.text]
        rows, columns = np.divmod(np.arange(len(images) * len(texts)), len(texts))  # of every pair
        ways = {"image_to_text": (self.image, self.text, rows), "text_to_image": (self.text, self.image, columns)}
        for number, (way, (known, candidate, own)) in enumerate(ways.items()):
            clock.start(f"{way}_likelihood", f"losses of the {known} given each {candidate}, {data}, {self.draws} calls a pair")
            of_own = example_keys(jax.random.fold_in(key, number), max(len(images), len(texts)))[own]  # the same noise for all candidates
            pairs = {self.image: _Rows(images, rows), self.text: _Rows(texts, columns)}
            function = _pair_losses(
                experiment.process, experiment.apply, tuple(sorted(experiment.shape.items())), known, candidate, self.draws)
            score = -in_batches(function, params, of_own, pairs, self.batch).reshape(len(images), len(texts))
            found |= {name: value for name, value in recalls(score, data.relevant).items() if name.startswith(way)}
        clock.stop()
        metrics = {f"{name}_likelihood": value for name, value in found.items()}
        text = f"Recall of {data} by the least denoising loss of what is given, {self.draws} draws, under every candidate"
        definitions = dict.fromkeys(metrics, text)
        settings = {"likelihood_images": len(data), "likelihood_draws": self.draws, "evaluation_seconds": clock.seconds}
        return EvalResult(metrics, definitions, {}, settings)


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """CIDEr-D and BLEU of captions that the model gives images, the most certain id first, against all captions of each image.

    Attributes:
      set, images: the set that the cache was made of (`image_datasets`) and its folder: captions are compared with those that people wrote.
        Without a folder they are compared with these as the tokenizer writes them: cut at its length, in lower case.
      steps: network calls for a caption; 0 is one for each id.
      image, text: the modalities. most: images at most. batch: in a network call.
    """

    set: str = ""
    images: str = ""
    steps: int = 0
    image: str = "image"
    text: str = "text"
    most: int = 5000
    batch: int = 64

    better = MappingProxyType({"CIDEr-D": "max"})

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        data, modality, clock = CaptionedImages.of(experiment.test_data(), self.most), experiment.modalities[self.text], Clock()
        written = self._written(experiment.split, data, modality.tokenizer) if self.images else modality.show(data.texts[self.text])
        references = [list(dict.fromkeys(written[i * data.each : (i + 1) * data.each])) for i in range(len(data))]
        steps, images = self.steps or modality.shape[0], data.images[self.image]
        clock.start("captions", f"captions of {len(data):,} images, {steps} calls each")
        read = captioner(experiment.process, experiment.apply, tuple(sorted(experiment.shape.items())), steps, self.image, self.text)
        captions = modality.show(in_batches(read, params, example_keys(key, len(data)), images, self.batch))
        clock.stop()
        metrics = {"CIDEr-D": cider_d(captions, references)[0]}
        metrics |= {f"BLEU-{n + 1}": value for n, value in zip(range(ORDERS), bleu(captions, references))}
        what = "captions that people wrote" if self.images else "captions as the tokenizer writes them"
        definitions = dict.fromkeys(metrics, f"of captions, {steps} calls each, against all {what}: {data}; words as mmdiff splits them")
        shown = plots.grid(experiment.modalities[self.image].show(images[:SHOWN]), 6, captions[:SHOWN])
        figures = {"Captions": Figure(shown, "Of the first images of the set, none chosen.")}
        return EvalResult(metrics, definitions, figures, {"caption_steps": steps, "evaluation_seconds": clock.seconds})

    def _written(self, split: str, data: CaptionedImages, tokenizer: Any) -> list[str]:
        """The captions of the set, as people wrote them, in the order of the cache."""
        name = image_datasets.test_split(self.set) if split == "test" else "val"
        records = image_datasets.records_of(self.set, name, self.images)
        written = [said[i % len(said)] for record in records.get(range(min(len(data), len(records))))
                   for said in [record["captions"]] for i in range(data.each)]  # fmt: skip
        if not np.array_equal(tokenizer.encode(written), data.texts[self.text]):
            raise UserError(
                f"the captions of {self.set} in {self.images} are not those of the cache, or it left damaged images out: name the folder "
                "that it was made of by --config.eval.references=FOLDER, or leave that out for captions as the tokenizer writes them.")
        return written


def retrievals(options: Mapping[str, Any]) -> tuple[LikelihoodRetrieval, ...]:
    """The retrieval by likelihood of a config's section `eval`, {"likelihood": {"most", "draws"}, "batch"}; none of 0 images."""
    likelihood = options["likelihood"]
    return (LikelihoodRetrieval(**likelihood, batch=options["batch"]),) if likelihood["most"] else ()


@functools.lru_cache(maxsize=4)
def captioner(process: Any, apply: Callable, shapes: tuple, steps: int, image: str = "image", text: str = "text") -> Callable:
    """`(params, keys, images) -> ids`: captions of images, the most likely id of the place that is most certain first.

    Args:
      process, apply: of the model. shapes: of its modalities, `tuple(sorted(shape.items()))`. steps: network calls.
      image, text: what is given and what is sampled; others are absent.
    """
    transforms = [sampling.only(text, sampling.confidence(process.parts[text])), sampling.only(text, sampling.temperature(0))]
    shape, grid = dict(shapes), sampling.uniform_grid(steps)
    absent = [name for name in shape if name not in (image, text)]

    def read(params, keys, images):
        return sampling.sample(process, apply, params, keys, grid, shape, given={image: images}, absent=absent, transforms=transforms)[text]

    return read


def nearness(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Minus the squared distances [n, m] of arrays [n, ...] and [m, ...], in float64.

    >>> nearness(np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0]]))
    array([[-0., -5.]])
    """
    some, others = (np.asarray(finite("vectors", array), np.float64).reshape(len(array), -1) for array in (some, others))
    return -((some**2).sum(1)[:, None] - 2 * some @ others.T + (others**2).sum(1))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of an array, some of them several times, that are taken when they are needed."""

    array: np.ndarray
    rows: np.ndarray

    def __getitem__(self, some):
        return self.array[self.rows[some]]


@functools.lru_cache(maxsize=4)
def _pair_losses(process: Any, apply: Callable, shapes: tuple, known: str, candidate: str, draws: int) -> Callable:
    """`(params, keys, pairs) -> [n]`: the loss of what is known of each pair, given the other."""
    shape = dict(shapes)

    def losses(params, keys, pairs):
        given, others = {known: pairs[known]}, pairs[candidate][:, None]
        return denoising_losses(process, apply, params, keys, given, candidate, others, shape, draws)[:, 0]

    return losses
