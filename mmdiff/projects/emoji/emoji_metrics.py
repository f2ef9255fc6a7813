"""What is measured of a joint model of emoji and their captions: both ways, together, there and back, by independent classifiers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.data.stored_images import values
from mmdiff.evals.accuracy import accuracy, denoising_losses
from mmdiff.evals.captioned_images import captioner
from mmdiff.evals.evaluator import Clock, EvalResult, example_keys, in_batches, sample_batched
from mmdiff.evals.retrieval import recall
from mmdiff.projects.emoji.captioned_emoji import CaptionedEmoji, figure, largest_share, without_tones
from mmdiff.projects.emoji.emoji import LENGTH, TONES, Emoji, emoji_source, evenly, parsed
from mmdiff.projects.emoji.emoji_classifiers import independent_classifiers


@dataclasses.dataclass(frozen=True)
class EmojiMetrics:
    """The metrics and figures of a model of image and text, of one split's held-out pairs and names and of training captions.

    * `sampled_tone`, `sampled_category`: those of `CaptionedEmoji`.
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
        show, clock = experiment.modalities["text"].show, Clock()
        tone_of, _ = independent_classifiers(self.file, self.category_classifier_steps)
        keys = iter(jax.random.split(key, 12))
        sample = functools.partial(sample_batched, experiment, params, batch=self.batch, steps=steps, guidance=guidance)
        caption = captioner(experiment.process, experiment.apply, tuple(sorted(experiment.shape.items())), LENGTH)
        metrics, texts, figures = {}, {}, {}

        def read(images):
            images = np.asarray(images, np.float32)
            return in_batches(caption, params, example_keys(next(keys), len(images)), images, self.batch)

        def say(name, value, text):
            metrics[name], texts[name] = float(value), text

        pictures = CaptionedEmoji(self.file, "image", self.most, self.category_classifier_steps, self.batch)
        made, again = pictures.sample(experiment, sample, (next(keys), next(keys)), clock)
        of_pictures = pictures.measure(experiment, (made, again), clock) | pictures.limits(experiment)

        clock.start("image_to_text", "reading pictures")
        self._measure_reading(say, figures, read, experiment, train, held)
        found = [parsed(text)[1] for text in show(read(values(again)))]
        say("cycle_name", np.mean([one == other for one, other in zip(found, _names(show, pictures.asked(experiment.split)[1].text))]),
            f"share of the {len(again)} pictures sampled for training captions that are read as their names")

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
        figures["Pairs"] = figure(experiment.modalities["image"].show(images), show(pairs["text"]))

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
        return of_pictures | EvalResult(metrics, texts, figures, settings)

    def _measure_reading(self, say, figures, read, experiment, train: Emoji, held: Emoji):
        show = experiment.modalities["text"].show
        toned = evenly(np.array([row for row, tones in enumerate(held.tones) if tones]), self.most)
        examples = held.take(toned)
        said = [parsed(text) for text in show(read(examples["image"]))]
        right = np.array([tones == held.tones[row] for (tones, _), row in zip(said, toned)])
        named = [name == own for (_, name), own in zip(said, _names(show, examples["text"]))]
        tones, names = ([each[row] for row in toned] for each in (held.tones, held.names))
        say("read_tone", right.mean(), f"share of {len(toned)} pictures of held-out pairs of a name and its tones, one or two, whose "
            f"captions, read in {LENGTH} calls, say exactly these (the most frequent tones: {largest_share(tones):.3f})")
        say("read_name", np.mean(named), f"the same of their names (the most frequent one: {largest_share(names):.3f})")
        words = [f"{' and '.join(TONES[tone] for tone in tones or ())} {name}" for tones, name in said]
        figures["Image to text, held-out pairs"] = figure(experiment.modalities["image"].show(examples["image"]), words, ~(right & named))

        seen = evenly(np.arange(len(train)), self.most)
        examples = train.take(seen)
        found = [parsed(text)[1] for text in show(read(examples["image"]))]
        say("read_name_train", np.mean([one == other for one, other in zip(found, _names(show, examples["text"]))]),
            f"share of {len(seen)} training pictures whose captions say their names")

        plain = evenly(without_tones(held), self.most)
        known = dict(zip(_names(show, train.take(np.arange(len(train)))["text"]), train.categories.tolist()))
        found = np.array([known.get(parsed(text)[1], -1) for text in show(read(held.take(plain)["image"]))])
        say("read_category", accuracy(found, held.categories[plain]), f"share of {len(plain)} pictures of held-out names whose captions "
            f"are training names, of their category (the largest category: {largest_share(held.categories[plain].tolist()):.3f})")
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
