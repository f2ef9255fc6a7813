"""What is measured of emoji and captions in one space of vectors, by DiffDis, which denoises a caption's vector, or by two towers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmdiff.data.bpe import Tokenizer
from mmdiff.data.named_encoders import TextStates
from mmdiff.errors import UserError
from mmdiff.evals import retrieval
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import Clock, EvalResult, best
from mmdiff.projects.emoji.emoji import TONES, Emoji, caption, emoji_source, evenly

VECTOR = "query"


@dataclasses.dataclass(frozen=True)
class SentenceVectors:
    """A published encoder of sentences in the place of `Towers`: captions, as the tokenizer writes them, -> unit vectors [n, size].

    Attributes:
      tokenizer: of the captions' ids.
      encoder: what makes vectors of sentences, its modality `VECTOR`.
    """

    tokenizer: Tokenizer
    encoder: TextStates
    _known: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)  # the same captions are asked for often

    def check(self, size: int) -> None:
        """Raises UserError unless vectors have this size."""
        if (found := self.encode(["a"]).shape[1]) != size:
            raise UserError(f"{self.encoder.path} has vectors of {found} numbers: set config.query.size to that.")

    def texts(self, ids: np.ndarray) -> tuple[None, np.ndarray]:
        """Ids int [n, length] -> (no states, vectors [n, size])."""
        texts = self.tokenizer.decode(ids)
        new = sorted(set(texts) - set(self._known))
        if new:
            self._known.update(zip(new, self.encoder.encode(new)[VECTOR]))
        return None, np.stack([self._known[text] for text in texts])

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> vectors [n, size], of what of them is trained on: long ones are cut."""
        return self.texts(self.tokenizer.encode(list(texts)))[1]

    def fingerprint(self) -> str | None:
        """Of the network and its own tokenizer; None where none is named."""
        return self.encoder.fingerprint()


@dataclasses.dataclass(frozen=True)
class EmojiAlignment:
    """The metrics of pictures' vectors beside those of captions: tones and names of held-out pairs, categories, and retrieval.

    * `aligned_tone`, `aligned_name`: the vector of a picture of a held-out pair of a name and one tone is nearest, among the captions of
      its name in five tones, to that of its own tone; among those of its tone and all names, to that of its own name.
    * `aligned_category`: that of a picture of a held-out name is nearest to that of a training caption of its category.
    * `aligned_image_to_text_r1`, `aligned_text_to_image_r1`: Recall@1 among training pairs.

    Attributes:
      file: of `emoji_source`.
      image_vectors: `(params, key, images) -> [n, size]`. text_vectors: `(params, texts) -> [n, size]`.
      most: pictures of each metric. candidates: of retrieval, 0 for none.
    """

    file: str
    image_vectors: Callable[[Any, Any, np.ndarray], np.ndarray]
    text_vectors: Callable[[Any, Sequence[str]], np.ndarray]
    most: int = 200
    candidates: int = 100

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        train, held = emoji_source("train", self.file), emoji_source(experiment.split, self.file)
        metrics, definitions, clock = {}, {}, Clock()
        clock.start("alignment", "comparing the vectors of pictures with those of captions")

        def scores(source: Emoji, rows: np.ndarray, texts: Sequence[str]) -> np.ndarray:
            images = self.image_vectors(params, key, source.take(rows)["image"])
            return retrieval.scores(images, self.text_vectors(params, texts))

        def say(name, value, text):
            metrics[name], definitions[name] = float(value), text

        rows = evenly(np.array([row for row, tones in enumerate(held.tones) if len(tones) == 1]), self.most)
        names = sorted({name for name, tones in zip(train.names, train.tones) if tones})
        tones, own = np.array([held.tones[row][0] for row in rows]), np.array([names.index(held.names[row]) for row in rows])
        found = scores(held, rows, [caption(name, (tone,)) for name, tone in itertools.product(names, range(len(TONES)))])
        found, number = found.reshape(len(rows), len(names), len(TONES)), np.arange(len(rows))
        say("aligned_tone", accuracy(best("tones", found[number, own]), tones),
            f"share of {len(rows)} pictures of held-out pairs of a name and a tone whose vector is nearest, of this name's captions in "
            f"{len(TONES)} tones, to that of this tone (chance {1 / len(TONES):g})")
        say("aligned_name", accuracy(best("names", found[number, :, tones]), own),
            f"the same among the captions of this tone and {len(names)} names (chance {1 / len(names):.3f})")

        rows = evenly(np.array([row for row, tones in enumerate(held.tones) if not tones]), self.most)
        known = dict(zip(train.names, train.categories.tolist()))
        nearest = best("names", scores(held, rows, list(known)))
        of_nearest = np.array([*known.values(), -1])[nearest]  # where several are as near, none is
        say("aligned_category", accuracy(of_nearest, held.categories[rows]),
            f"share of {len(rows)} pictures of held-out names whose vector is nearest to that of a training name of their category (the "
            f"largest category: {np.bincount(held.categories[rows]).max() / len(rows):.3f})")

        if self.candidates:
            texts = [caption(name, tones) for name, tones in zip(train.names, train.tones)]
            rows = evenly(np.unique(texts, return_index=True)[1], self.candidates)
            found = scores(train, rows, [texts[row] for row in rows])
            for name, value in retrieval.recalls(found, np.eye(len(rows), dtype=bool), (1,)).items():
                say(f"aligned_{name}", value, f"{len(rows)} training pairs, each compared with all (chance {1 / len(rows):g})")
        clock.stop()
        return EvalResult(metrics, definitions, {}, {"evaluation_seconds": clock.seconds})
