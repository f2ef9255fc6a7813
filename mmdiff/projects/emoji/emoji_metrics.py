"""What is measured of a joint model of emoji and their captions: both ways, together, there and back, by independent classifiers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.evals import plots
from mmdiff.evals.accuracy import accuracy, denoising_losses
from mmdiff.evals.captioned_images import captioner
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, example_keys, in_batches, sample_batched
from mmdiff.evals.retrieval import mean_per_class, recall
from mmdiff.projects.emoji.emoji import CATEGORIES, LENGTH, TONES, Emoji, emoji_source, evenly, parsed
from mmdiff.projects.emoji.emoji_classifiers import ToneClassifier, category_classifier

SHOWN = 40


@dataclasses.dataclass(frozen=True)
class EmojiMetrics:
    """The metrics and figures of a model of image and text, of one split's held-out pairs and names and of training captions.

    * `sampled_tone`: pictures of captions of held-out pairs of a name and a tone have that tone, by the colour of the skin.
    * `sampled_category`: pictures of training captions have their category, by a network that was trained on real pictures.
    * `read_tone`, `read_name`: the caption of a picture of a held-out pair says its tones, its name.
    * `read_name_train`: that of a training picture says its name. `read_category`: that of a held-out name is a training name, of its
      category.
    * `pair_tone`: in pairs that were sampled together the picture has the tone of the caption.
    * `cycle_name`: the caption of a picture that was sampled for a training caption says its name.
    * `image_to_text_r1`, `text_to_image_r1`: Recall@1 among training pairs, by the loss of the image given every text, and of the text.
    * `absent_text_difference`: the most by which a permuted text changes the image's output while it is absent.

    A caption is predicted from a picture in 16 calls, the most certain token first; it counts as the tokenizer writes it, cut after 16 ids.

    Attributes:
      file: of `emoji_source`.
      most: examples of every metric.
      candidates: of retrieval; 0 leaves it out. draws: noisy copies of each.
      category_classifier_steps: of its training; 0 leaves it out.
      batch: examples in a call of the network or the sampler.
    """

    file: str
    most: int = 200
    candidates: int = 100
    draws: int = 4
    category_classifier_steps: int = 600
    batch: int = 50

    better = MappingProxyType({name: "max" for name in ("sampled_tone", "read_tone", "read_name", "read_name_train", "pair_tone")})

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        train, held = emoji_source("train", self.file), emoji_source(experiment.split, self.file)
        show, clock, tone_of = experiment.modalities["text"].show, Clock(), ToneClassifier(train)
        keys = iter(jax.random.split(key, 12))
        sample = functools.partial(sample_batched, experiment, params, batch=self.batch, steps=steps, guidance=guidance)
        caption = captioner(experiment.process, experiment.apply, tuple(sorted(experiment.shape.items())), LENGTH)
        metrics, texts, figures = {}, {}, {}

        def read(images):
            images = np.asarray(images, np.float32)
            return in_batches(caption, params, example_keys(next(keys), len(images)), images, self.batch)

        def say(name, value, text):
            metrics[name], texts[name] = float(value), text

        clock.start("text_to_image", "sampling pictures of held-out captions")
        single = evenly(np.array([row for row, tones in enumerate(held.tones) if len(tones) == 1]), self.most)
        asked, tones = held.take(single), np.array([held.tones[row][0] for row in single])
        made = np.clip(sample(next(keys), {"text": asked["text"]}, len(single))["image"], -1, 1)
        of_made = tone_of(made)
        say("sampled_tone", accuracy(of_made, tones),
            f"share of {len(single)} pictures sampled for captions of held-out pairs of a name and a tone that have this tone, the nearest "
            f"of the five mean skin colours (the most frequent tone: {_largest(tones.tolist()):.3f})")
        say("sampled_tone_real", accuracy(tone_of(asked["image"]), tones), "the same of the real pictures of these captions")
        figures["Text to image, held-out pairs"] = _figure(experiment, made, show(asked["text"]), of_made != tones)

        each = max(1, self.most // len(CATEGORIES))
        balanced = np.concatenate([evenly(np.flatnonzero(train.categories == c), each) for c in range(len(CATEGORIES))])
        captioned = train.take(balanced)
        again = np.clip(sample(next(keys), {"text": captioned["text"]}, len(balanced))["image"], -1, 1)
        if self.category_classifier_steps:
            clock.start("category_classifier", "training the classifier of categories")
            category_of, image = category_classifier(train, self.category_classifier_steps), experiment.modalities["image"]
            plain = np.array([row for row, tones in enumerate(held.tones) if not tones])
            say("sampled_category", mean_per_class(category_of(image.show(again)), train.categories[balanced]),
                f"mean over categories of the share of {len(balanced)} pictures sampled for training captions that have their category, "
                f"by a network trained on real pictures (chance {1 / len(CATEGORIES):g})")
            say("sampled_category_real", mean_per_class(category_of(image.show(held.take(plain)["image"])), held.categories[plain]),
                f"the same of {len(plain)} real pictures of held-out names")

        clock.start("image_to_text", "reading pictures")
        self._measure_reading(say, figures, read, experiment, train, held)
        found = [parsed(text)[1] for text in show(read(again))]
        say("cycle_name", np.mean([one == other for one, other in zip(found, _names(show, captioned["text"]))]),
            f"share of the {len(balanced)} pictures sampled for training captions that are read as their names")

        clock.start("pairs", "sampling pairs")
        pairs = sample(next(keys), {}, self.most)
        said = [parsed(text)[0] for text in show(pairs["text"])]
        one = np.array([row for row, tones in enumerate(said) if tones is not None and len(tones) == 1], int)
        images = np.clip(pairs["image"], -1, 1)
        if len(one):
            read_tones, said_tones = tone_of(images[one]), np.array([said[row][0] for row in one])
            chance = sum(np.mean(read_tones == tone) * np.mean(said_tones == tone) for tone in range(len(TONES)))
            say("pair_tone", accuracy(read_tones, said_tones),
                f"share of {len(one)} pairs sampled together, those of {self.most} whose captions say one tone, whose pictures have it "
                f"(if the same tones met by chance: {chance:.3f})")
        figures["Pairs"] = _figure(experiment, images, show(pairs["text"]))

        clock.start("absent", "permuting an absent text")
        say("absent_text_difference", self.absent_text_difference(experiment, params, next(keys), train),
            "the most by which another text changes the image's output while it is absent, at t = 1")
        if self.candidates:
            clock.start("retrieval", f"losses of {self.candidates} pairs, both ways")
            self._retrieve(say, experiment, params, next(keys), train)
        clock.stop()
        settings = {
            "sample_steps": steps, "guidance": guidance, "examples": self.most, "retrieval_draws": self.draws,
            "category_classifier_steps": self.category_classifier_steps, "evaluation_seconds": clock.seconds}
        return EvalResult(metrics, texts, figures, settings)

    def _measure_reading(self, say, figures, read, experiment, train: Emoji, held: Emoji):
        show = experiment.modalities["text"].show
        toned = evenly(np.array([row for row, tones in enumerate(held.tones) if tones]), self.most)
        examples = held.take(toned)
        said = [parsed(text) for text in show(read(examples["image"]))]
        right = np.array([tones == held.tones[row] for (tones, _), row in zip(said, toned)])
        named = [name == own for (_, name), own in zip(said, _names(show, examples["text"]))]
        tones, names = ([each[row] for row in toned] for each in (held.tones, held.names))
        say("read_tone", right.mean(), f"share of {len(toned)} pictures of held-out pairs of a name and its tones, one or two, whose "
            f"captions, read in {LENGTH} calls, say exactly these (the most frequent tones: {_largest(tones):.3f})")
        say("read_name", np.mean(named), f"the same of their names (the most frequent one: {_largest(names):.3f})")
        words = [f"{' and '.join(TONES[tone] for tone in tones or ())} {name}" for tones, name in said]
        figures["Image to text, held-out pairs"] = _figure(experiment, examples["image"], words, ~(right & named))

        seen = evenly(np.arange(len(train)), self.most)
        examples = train.take(seen)
        found = [parsed(text)[1] for text in show(read(examples["image"]))]
        say("read_name_train", np.mean([one == other for one, other in zip(found, _names(show, examples["text"]))]),
            f"share of {len(seen)} training pictures whose captions say their names")

        plain = evenly(np.array([row for row, tones in enumerate(held.tones) if not tones]), self.most)
        known = dict(zip(_names(show, train.take(np.arange(len(train)))["text"]), train.categories.tolist()))
        found = np.array([known.get(parsed(text)[1], -1) for text in show(read(held.take(plain)["image"]))])
        say("read_category", accuracy(found, held.categories[plain]), f"share of {len(plain)} pictures of held-out names whose captions "
            f"are training names, of their category (the largest category: {_largest(held.categories[plain].tolist()):.3f})")
        say("read_known", np.mean(found >= 0), "share of them whose captions are training names at all")

    def absent_text_difference(self, experiment, params, key, train: Emoji) -> float:
        """The most by which the output for eight noisy pictures changes with their texts, which are absent."""
        batch = train.take(np.arange(min(8, len(train))))
        process, count = experiment.process.bind(params), len(batch["text"])
        t = {"image": jnp.linspace(0.1, 0.9, count), "text": jnp.ones(count)}

        @jax.jit
        def output(text):
            noised = process.corrupt(example_keys(key, count), {"image": batch["image"], "text": text}, t)
            return experiment.apply(params, *process.inputs(noised.xt, noised.t))["image"]

        return float(jnp.abs(output(batch["text"]) - output(batch["text"][::-1].copy())).max())

    def _retrieve(self, say, experiment, params, key, train: Emoji):
        first = dict(zip(map(bytes, train.take(np.arange(len(train)))["text"]), range(len(train))))  # of equal captions one
        rows = evenly(np.array(sorted(first.values())), self.candidates)
        found = train.take(rows)
        for number, (name, given, target) in enumerate((("image_to_text_r1", "image", "text"), ("text_to_image_r1", "text", "image"))):

            def losses(params, keys, examples, given=given, target=target):
                candidates = jnp.broadcast_to(found[target], (len(keys), *found[target].shape))
                return denoising_losses(
                    experiment.process, experiment.apply, params, keys, {given: examples}, target, candidates, experiment.shape, self.draws)

            own = example_keys(jax.random.fold_in(key, number), len(rows))
            loss = in_batches(losses, params, own, found[given], max(1, self.batch // len(rows)))
            say(name, recall(-loss, np.eye(len(rows), dtype=bool), 1), f"share of {len(rows)} training pairs whose {target} gives the "
                f"{given} the least denoising loss, {self.draws} draws, of all of theirs (chance {1 / len(rows):g})")


def evaluators_of(file: str, options: Mapping[str, Any]) -> dict[str, tuple[EmojiMetrics, ...]]:
    """The `evaluators` and `in_loop` of an experiment whose config has a section `eval`: the options above, and in_loop with what is
    other there."""
    of_both = {"file": file, **{name: value for name, value in options.items() if name != "in_loop"}}
    return {"evaluators": (EmojiMetrics(**of_both),), "in_loop": (EmojiMetrics(**{**of_both, **options.get("in_loop", {})}),)}


def _names(show: Callable, text: np.ndarray) -> list[str]:
    """The names in captions as the tokenizer writes them."""
    return [parsed(each)[1] for each in show(text)]


def _largest(values: Sequence[Any]) -> float:
    """The share of the most frequent value: what a guess would reach."""
    return max(map(values.count, set(values))) / len(values)


def _figure(experiment, images: np.ndarray, words: Sequence[str], wrong: np.ndarray | None = None) -> Figure:
    shown = experiment.modalities["image"].show(images[:SHOWN])
    return Figure(
        plots.grid(shown, 8, list(words[:SHOWN]), wrong=None if wrong is None else wrong[:SHOWN]),
        "The first ones, none chosen" + ("." if wrong is None else "; in red what is wrong."))
