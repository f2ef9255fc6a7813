"""What is measured of emoji sampled from captions, or made of their tokens: whether independent classifiers see what was asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mmdiff.data import media
from mmdiff.data.network_cache import map_batched
from mmdiff.data.stored_images import values
from mmdiff.evals import plots
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, finite, sample_batched
from mmdiff.evals.retrieval import mean_per_class
from mmdiff.projects.emoji.emoji import CATEGORIES, Emoji, check_tokens, emoji_source, evenly
from mmdiff.projects.emoji.emoji_classifiers import independent_classifiers

SHOWN = 40

Sampler = Callable[[jax.Array, dict[str, np.ndarray], int], dict[str, np.ndarray]]  # (key, given, count) -> samples, as `sample_batched`


class Asked(NamedTuple):
    """Some `rows` of a `source`, whose captions pictures are sampled for."""

    source: Emoji
    rows: np.ndarray

    @property
    def text(self) -> np.ndarray:
        """The captions: int32 [n, 16]."""
        return self.source.take(self.rows)["text"]

    @property
    def real(self) -> np.ndarray:
        """The pictures that have these captions: uint8 [n, 32, 32, 3]."""
        return media.to_uint8(self.source.take(self.rows)["image"])

    @property
    def tones(self) -> np.ndarray:
        """Their first tones, -1 where they have none: int [n]."""
        return np.array([next(iter(self.source.tones[row]), -1) for row in self.rows])

    @property
    def categories(self) -> np.ndarray:
        """int [n]."""
        return self.source.categories[self.rows]


@dataclasses.dataclass(frozen=True)
class CaptionedEmoji:
    """The metrics and figures of a model of emoji given their captions.

    * `sampled_tone`: pictures of captions of held-out pairs of a name and a tone have that tone, by the colour of the skin.
    * `sampled_category`: pictures of training captions have their category, by a network that was trained on real pictures.

    `_real` is that of real pictures in their place: of the captions' own, and, since the network knows those that it was trained on, of
    held-out names. `_reconstructed`, of a model of tokens, is that of what their tokenizer makes of the captions' own pictures: the limit.

    Attributes:
      file: of `emoji_source`.
      target: the modality that is sampled, "image", or "tokens" of a cache of these pictures.
      most: pictures of every metric.
      category_classifier_steps: of its training; 0 leaves it out.
      batch: examples in a call of the sampler.
    """

    file: str
    target: str = "image"
    most: int = 200
    category_classifier_steps: int = 600
    batch: int = 50

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        steps, guidance, clock = int(config.sample.steps), float(config.sample.guidance), Clock()
        sample = functools.partial(sample_batched, experiment, params, batch=self.batch, steps=steps, guidance=guidance)
        found = self.measure(experiment, self.sample(experiment, sample, jax.random.split(key), clock), clock) | self.limits(experiment)
        clock.stop()
        settings = {
            "sample_steps": steps, "guidance": guidance, "examples": self.most,
            "category_classifier_steps": self.category_classifier_steps, "evaluation_seconds": clock.seconds}
        return dataclasses.replace(found, settings=settings)

    def asked(self, split: str) -> tuple[Asked, Asked]:
        """Held-out pairs of a name and one tone, of a split, and training pictures, as many of every category."""
        held, train, each = emoji_source(split, self.file), emoji_source("train", self.file), max(1, self.most // len(CATEGORIES))
        of_category = (np.flatnonzero(train.categories == category) for category in range(len(CATEGORIES)))
        return Asked(held, with_one_tone(held, self.most)), Asked(train, np.concatenate([evenly(rows, each) for rows in of_category]))

    def sample(self, experiment, sample: Sampler, keys: Sequence[jax.Array], clock: Clock) -> list[np.ndarray]:
        """Pictures for the captions of both, a key each: uint8 [n, 32, 32, 3]."""
        clock.start("text_to_image", "sampling pictures of captions")
        show = experiment.modalities[self.target].show
        asked = (each.text for each in self.asked(experiment.split))
        return [show(sample(key, {"text": text}, len(text))[self.target]) for key, text in zip(keys, asked)]

    def reconstructed(self, experiment) -> list[np.ndarray]:
        """What the tokens of the pictures that have these captions decode to. UserError for tokens of other pictures."""
        found = []
        for asked, data in zip(self.asked(experiment.split), (experiment.test_data(), experiment.train_data())):
            check_tokens(data, asked.source, self.file)
            found.append(experiment.modalities[self.target].show(data.take(asked.rows)[self.target]))
        return found

    def measure(self, experiment, sampled: Sequence[np.ndarray], clock: Clock) -> EvalResult:
        """What is seen of pictures that were `sample`d for both."""
        clock.start("classifiers", "training the classifier of categories, and reading pictures")
        tone_of, category_of = independent_classifiers(self.file, self.category_classifier_steps)
        (held, seen), (of_held, of_seen), show = self.asked(experiment.split), sampled, experiment.modalities["text"].show
        tones, found = held.tones, tone_of(values(of_held))
        metrics, texts = {"sampled_tone": accuracy(found, tones)}, {"sampled_tone": (
            f"share of {len(tones)} pictures sampled for captions of held-out pairs of a name and a tone that have this tone, the nearest "
            f"of the five mean skin colours (the most frequent tone: {largest_share(tones.tolist()):.3f})")}
        figures = {"Text to image, held-out pairs": figure(of_held, show(held.text), found != tones)}
        if category_of:
            categories, found = seen.categories, category_of(of_seen)
            metrics["sampled_category"] = mean_per_class(found, categories)
            texts["sampled_category"] = (
                f"mean over categories of the share of {len(categories)} pictures sampled for training captions that have their category, "
                f"by a network trained on real pictures (chance {1 / len(CATEGORIES):g})")
            figures["Text to image, training captions"] = figure(of_seen, show(seen.text), found != categories)
        return EvalResult(metrics, texts, figures)

    def limits(self, experiment) -> EvalResult:
        """What is seen of real pictures in the place of sampled ones, and of what a tokenizer makes of them."""
        tone_of, category_of = independent_classifiers(self.file, self.category_classifier_steps)
        held, seen = self.asked(experiment.split)
        names = Asked(held.source, without_tones(held.source))
        metrics = {"sampled_tone_real": accuracy(tone_of(values(held.real)), held.tones)}
        texts = {"sampled_tone_real": "the same of the real pictures of these captions"}
        if category_of:
            metrics["sampled_category_real"] = mean_per_class(category_of(names.real), names.categories)
            texts["sampled_category_real"] = f"the same of {len(names.rows)} real pictures of held-out names"
        if self.target != "image":
            of_held, of_seen = self.reconstructed(experiment)
            metrics["sampled_tone_reconstructed"] = accuracy(tone_of(values(of_held)), held.tones)
            if category_of:
                metrics["sampled_category_reconstructed"] = mean_per_class(category_of(of_seen), seen.categories)
            texts |= dict.fromkeys(
                ("sampled_tone_reconstructed", "sampled_category_reconstructed"),
                "the same of what the tokenizer makes of the real pictures of these captions")
        return EvalResult(metrics, texts)


@dataclasses.dataclass(frozen=True)
class ReconstructedEmoji:
    """What is left of tone and category in the pictures that a tokenizer makes of emoji, and in these (`_real`), held-out ones alone.

    * `reconstructed_tone`: of pairs of a name and a tone, `CaptionedEmoji`'s way of reading it.
    * `reconstructed_category`: of names without tones, the mean over the categories.

    Attributes:
      file, most, category_classifier_steps: as of `CaptionedEmoji`.
    """

    file: str
    most: int = 200
    category_classifier_steps: int = 600

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        held, clock = emoji_source(experiment.split, self.file), Clock()
        clock.start("readings", "reading tone and category of reconstructions")
        tone_of, category_of = independent_classifiers(self.file, self.category_classifier_steps)
        toned, plain = Asked(held, with_one_tone(held, self.most)), Asked(held, without_tones(held))
        reconstruct = jax.jit(lambda images: experiment.apply(params, {"image": images}, {})["reconstruction"])
        metrics, texts = {}, {}

        def made(images):
            return media.to_uint8(finite("reconstructions", map_batched(reconstruct, values(images), 50)))

        for kind, of, shown in (("", "reconstructions", made), ("_real", "pictures", np.asarray)):
            metrics[f"reconstructed_tone{kind}"] = accuracy(tone_of(values(shown(toned.real))), toned.tones)
            texts[f"reconstructed_tone{kind}"] = (
                f"share of {len(toned.rows)} {of} of held-out pairs of a name and a tone that have this tone, by the colour of the skin")
            if category_of:
                metrics[f"reconstructed_category{kind}"] = mean_per_class(category_of(shown(plain.real)), plain.categories)
            texts[f"reconstructed_category{kind}"] = (
                f"mean over categories of the share of {len(plain.rows)} {of} of held-out names whose category a network sees that was "
                f"trained on real pictures (chance {1 / len(CATEGORIES):g})")
        clock.stop()
        settings = {"category_classifier_steps": self.category_classifier_steps, "evaluation_seconds": clock.seconds}
        return EvalResult(metrics, texts, {}, settings)


def with_one_tone(source: Emoji, most: int) -> np.ndarray:
    """At most so many rows of pictures in one tone, evenly spread."""
    return evenly(np.array([row for row, tones in enumerate(source.tones) if len(tones) == 1]), most)


def without_tones(source: Emoji) -> np.ndarray:
    """The rows of pictures without tones."""
    return np.array([row for row, tones in enumerate(source.tones) if not tones])


def largest_share(found: Sequence[Any]) -> float:
    """The share of the most frequent value: what a guess would reach."""
    return max(map(found.count, set(found))) / len(found)


def figure(images: np.ndarray, words: Sequence[str], wrong: np.ndarray | None = None) -> Figure:
    """The first pictures uint8 [n, H, W, 3] with their captions, `wrong` ones in red."""
    return Figure(
        plots.grid(images[:SHOWN], 8, list(words[:SHOWN]), wrong=None if wrong is None else wrong[:SHOWN]),
        "The first ones, none chosen" + ("." if wrong is None else "; in red what is wrong."))
