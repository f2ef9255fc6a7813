"""What is measured of a model of short texts: bits per character, beside what simple models need, and its samples."""

from __future__ import annotations

import collections
import dataclasses
import functools
import lzma
import math
from collections.abc import Sequence

import jax
import numpy as np

from mmdiff.data.sources import load_all
from mmdiff.evals import plots
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, example_keys, in_batches, sample_batched
from mmdiff.evals.likelihood import along, continuous_time, line, total

ORDER = 5  # of the n-grams
END = "\n"  # of a text, which counts as a character, and what stands before it


@dataclasses.dataclass(frozen=True)
class TextMetrics:
    """The metrics of a model whose one modality is a `Texts`.

    Attributes:
      draws: times of the bound's integral, and so many network calls and one for every held-out text.
      samples: how many are sampled.
      batch: examples in a call of the network or the sampler.
      text: the modality's name.
    """

    draws: int = 32
    samples: int = 500
    batch: int = 100
    text: str = "text"

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        bound_key, sample_key = jax.random.split(key)
        show, clock = experiment.modalities[self.text].show, Clock()
        train, test = (load_all(data())[self.text] for data in (experiment.train_data, experiment.test_data))
        known, held_out = show(train), show(test)
        clock.start("bits_per_character", f"bounding the likelihood of {len(test)} texts, {self.draws + 1} calls each")
        bits = in_batches(
            self._bits(experiment), params, example_keys(bound_key, len(test)), {self.text: test}, self.batch)
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        clock.start("samples", f"sampling {self.samples} texts in {steps} steps")
        options = {"batch": self.batch, "steps": steps, "guidance": guidance}
        sampled = show(sample_batched(experiment, params, sample_key, {}, self.samples, **options)[self.text])
        clock.start("baselines", "counting n-grams")
        lengths = np.array([len(text) + 1 for text in held_out])
        mean = bits.sum() / lengths.sum()
        error = np.std(bits - mean * lengths) / (math.sqrt(len(bits)) * lengths.mean())
        words = {word for text in known for word in text.split()}
        grams = Ngrams(known, ORDER)
        metrics = {
            "bits_per_character": float(mean),
            "bits_per_character_unigram": Ngrams(known, 1).bits(held_out),
            "bits_per_character_5gram": grams.bits(held_out),
            "bits_per_character_xz": xz_bits(known, held_out),
            "sample_bits_5gram": grams.bits(sampled),
            "known_words": _share(words, sampled), "known_words_data": _share(words, held_out),
            "copied": float(np.isin(sampled, known).mean()),
        }
        clock.stop()
        counted = f"{len(held_out)} held-out texts of {lengths.sum()} characters, an end each included"
        definitions = {
            "bits_per_character": f"upper bound on -log2 p(ids) in continuous time, {self.draws} stratified times a text, over the "
            f"characters; {counted}; standard error {error:.4f}",
            "bits_per_character_unigram": "the same of the training text's frequencies of characters",
            "bits_per_character_5gram": "the same of its 5-grams of characters, interpolated with shorter ones (Witten and Bell)",
            "bits_per_character_xz": "what xz (LZMA2, preset 9) needs more for the training text with the held-out one behind it",
            "sample_bits_5gram": f"what those 5-grams need for {self.samples} samples: below that of the held-out texts is too safe",
            "known_words": f"share of the words of {self.samples} samples that occur in the training text",
            "known_words_data": "the same of the held-out texts",
            "copied": "share of the samples that are a training text as a whole",
        }
        settings = {"sample_steps": steps, "guidance": guidance, "samples": self.samples, "evaluation_seconds": clock.seconds}
        figures = {"Samples": Figure(_written(sampled[:30]), f"The first of them, none chosen; {steps} steps.")}
        return EvalResult(metrics, definitions, figures, settings)

    def _bits(self, experiment):
        """The bound of texts in bits, [n]."""
        path = along(experiment.process, line())

        def bits(params, keys, x0):
            nats = continuous_time(experiment.process, experiment.apply, params, keys, x0, path, self.draws)
            return total(nats) / math.log(2)

        return bits


class Ngrams:
    r"""Frequencies of characters after the n - 1 before them, interpolated with those of shorter contexts (Witten and Bell 1991):

        p(c | h) = (count(h c) + kinds(h) p(c | h')) / (count(h) + kinds(h)),

    h' the context without its first character, kinds(h) how many different characters follow it; below the shortest all are as likely.

    >>> round(Ngrams(["abab", "abab"], 3).bits(["abab"]), 3)
    0.47
    """

    def __init__(self, texts: Sequence[str], order: int):
        self._order, self._counts = order, collections.defaultdict(collections.Counter)
        for text in texts:
            line = END * (order - 1) + text + END
            for i in range(order - 1, len(line)):
                for size in range(order):
                    self._counts[line[i - size : i]][line[i]] += 1
        self._characters = len({character for text in texts for character in text}) + 1

    def bits(self, texts: Sequence[str]) -> float:
        """Mean -log2 p of the characters of texts, their ends included."""
        lines = [END * (self._order - 1) + text + END for text in texts]
        places = [(line[i - self._order + 1 : i], line[i]) for line in lines for i in range(self._order - 1, len(line))]
        p = functools.cache(self._p)
        return -sum(math.log2(p(*place)) for place in places) / len(places)

    def _p(self, context: str, character: str) -> float:
        shorter = self._p(context[1:], character) if context else 1 / self._characters
        found = self._counts.get(context, {})
        return (found.get(character, 0) + len(found) * shorter) / (sum(found.values()) + len(found)) if found else shorter


def xz_bits(train: Sequence[str], texts: Sequence[str]) -> float:
    """What a compressor that has read the training text needs for a character of `texts`, their ends included."""
    before, behind = ("".join(text + END for text in each).encode() for each in (train, texts))
    size, whole = (len(lzma.compress(each, preset=9)) for each in (before, before + behind))
    return 8 * (whole - size) / sum(len(text) + 1 for text in texts)


def _share(words: set[str], texts: Sequence[str]) -> float:
    found = [word in words for text in texts for word in text.split()]
    return float(np.mean(found)) if found else 0.0


def _written(texts: Sequence[str]) -> str:
    """The texts, one below the other."""
    return plots.svg(1000, 20 * len(texts) + 10, [plots.label(10, 20 * i + 20, text, anchor="start") for i, text in enumerate(texts)])
