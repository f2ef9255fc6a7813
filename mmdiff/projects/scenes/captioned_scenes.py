"""What is measured of scenes sampled from captions: whether they show what the caption says, to a judge that saw only real scenes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from mmdiff.data import media
from mmdiff.data.sources import load_all
from mmdiff.evals import plots
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, sample_batched
from mmdiff.evals.frechet import frechet_ratio
from mmdiff.projects.digits import classifiers
from mmdiff.projects.digits.digits import digits_source
from mmdiff.projects.scenes import scenes

ASKED = ("digit", "colour", "position")  # what must be right, all of it, for a correct image


@dataclasses.dataclass(frozen=True)
class CaptionedScenes:
    """The metrics and figures of a model of digit scenes given their captions.

    Two sets of `count` captions: of held-out combinations, and those of training scenes. `prompt_correctness` is the share of samples
    of which all that is `asked` is right. On the validation split other captions of its scenes take the place of the held-out
    combinations, which stay unseen until they are reported.

    Attributes:
      sampled, text: the names of the two modalities.
      decode: sampled examples -> images [n, size, size, 3] in [-1, 1]; by default the `images` of the sampled modality (`TokenImages`).
      asked: the attributes that must be right.
      size: the side of the canvas.
      count: samples for each set of captions.
      batch: examples in a call of the sampler.
    """

    sampled: str = "tokens"
    text: str = "text"
    decode: Callable[[np.ndarray], np.ndarray] | None = None
    asked: tuple[str, ...] = ASKED
    size: int = 16
    count: int = 1000
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        return self.samples(experiment, params, key, int(config.sample.steps), float(config.sample.guidance))

    def samples(self, experiment, params, key, steps: int, guidance: float) -> EvalResult:
        """All of it depends on the sampler."""
        clock = Clock()
        sampled = self.sample(experiment, params, jax.random.split(key), steps, guidance, clock)
        return self.measure(sampled, steps, guidance, clock, experiment.split)

    def sample(self, experiment, params, keys, steps: int, guidance: float, clock: Clock) -> dict[str, tuple[Mapping, np.ndarray]]:
        """"held-out" (or "validation") and "training" -> (the scenes whose captions are given, images sampled for them), a key each."""
        decode = self.decode or experiment.modalities[self.sampled].images
        options = {"batch": self.batch, "steps": steps, "guidance": guidance}
        found = {}
        first = ("held-out", "held_out") if experiment.split == "test" else (experiment.split, experiment.split)
        for (name, split), key in zip((first, ("training", "train")), keys):
            clock.start(f"{name} captions", f"sampling {self.count} scenes for {name} captions in {steps} steps")
            captioned = load_all(scenes.Scenes(split, self.size, self.count))
            sampled = sample_batched(experiment, params, key, {self.text: captioned["text"]}, self.count, **options)[self.sampled]
            found[name] = captioned, np.clip(np.asarray(decode(sampled), np.float32), -1, 1)
        return found

    def right(self, found: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of which scenes all that is asked was `found` as in `labels`: bool [n]."""
        return np.logical_and.reduce([found[name] == labels[name] for name in self.asked])

    def measure(
        self, sampled: Mapping[str, tuple[Mapping, np.ndarray]], steps: int, guidance: float, clock: Clock, split: str = "test"
    ) -> EvalResult:
        """What is found of what `sample` gave for that split."""
        (held, images), (seen, others) = sampled.values()
        kind = "held-out combinations" if split == "test" else f"{split} scenes"
        test = load_all(scenes.Scenes(split, self.size, self.count))
        clock.start("judge", "reading what the samples show")
        judge = trained_judge(self.size)
        read = judge(images)
        right = self.right(read, held)
        metrics = {
            "prompt_correctness": float(right.mean()),
            "prompt_correctness_seen": float(self.right(judge(others), seen).mean()),
            **{f"{name}_correctness": float((read[name] == held[name]).mean()) for name in scenes.ATTRIBUTES},
            "prompt_correctness_real": float(self.right(judge(held["image"]), held).mean()),
            "frechet_ratio": frechet_ratio(others, test["image"], seen["image"]),
        }
        clock.stop()
        definitions = {f"{name}_correctness": f"share of the same samples with the right {name}" for name in scenes.ATTRIBUTES}
        definitions |= {
            "prompt_correctness": f"share of {self.count} samples for captions of {kind} that show the right "
            f"{', '.join(self.asked)}, all of them, as a judge trained on real training scenes reads them",
            "prompt_correctness_seen": f"the same for {self.count} captions of training scenes",
            "prompt_correctness_real": "the same for the real images of these captions: how well the judge reads; "
            "samples, whose digits can be more typical than real ones, may exceed it",
            "frechet_ratio": f"squared Fréchet distance (raw pixels, float64) of the {self.count} samples for training captions to "
            f"{self.count} {split} scenes, over that of those captions' own scenes to them: 1 is the limit",
        }
        shown = {
            "Caption to image": Figure(
                grid(images, held, ~right),
                f"Captions of {kind}; {steps} steps, guidance {guidance:g}; the first ones, none chosen. A caption is red "
                f"where the judge finds another {', '.join(self.asked[:-1])} or {self.asked[-1]}.",
            ),
            "Real scenes": Figure(grid(test["image"], test), f"Scenes of the {split} split, for comparison."),
        }
        settings = {
            "sample_steps": steps,
            "guidance": guidance,
            "samples_per_caption_set": self.count,
            "judge": "colours by the palette, place and digit by scikit-learn SVCs, trained on real training scenes and digits",
            "frechet_features": "raw pixels",
            "evaluation_seconds": clock.seconds,
        }
        return EvalResult(metrics, definitions, shown, settings)


class Judge:
    """Reads the attributes of scenes: images float32 [n, size, size, 3] in [-1, 1] -> {"digit": int [n], "colour": ..., ...}.

    The background is the palette's colour that is nearest to the median pixel. The digit's colour is the one whose mixtures with the
    background fit the image best; the shares in the mixtures are the ink. An SVM on the ink finds size and position, and the SVM on
    raw digits (`classifiers`) reads what stands there, brought back to 8 x 8 pixels. Both saw real training data only.
    """

    TRAINING = 4000  # scenes for the first of the two

    def __init__(self, size: int):
        from sklearn.svm import SVC

        self._size = size
        self._palette = np.array(list(scenes.COLOURS.values())) / 127.5 - 1
        real = scenes.Scenes("train", size, self.TRAINING).take(np.arange(self.TRAINING))
        ink = self._read_colours(real["image"])[2]
        self._where = SVC(C=10.0, gamma="scale").fit(ink.reshape(len(ink), -1), self._class(real["size"], real["position"]))
        digits = digits_source("train").arrays
        self._digit = classifiers.svm(digits["image"], digits["label"])

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        background, colour, ink = self._read_colours(np.asarray(images))
        where = self._where.predict(ink.reshape(len(ink), -1))
        size, position = np.divmod(where, len(scenes.POSITIONS))
        digits = np.empty((len(ink), 8, 8))
        for found in np.unique(where):
            rows = np.flatnonzero(where == found)
            box, enlarge = scenes.footprint(self._size, *divmod(int(found), len(scenes.POSITIONS)))
            back = np.linalg.pinv(enlarge)
            digits[rows] = np.clip(back @ ink[rows][:, box[0], box[1]] @ back.T, 0, 1)
        digit = classifiers.predict(self._digit, 2 * digits - 1)
        return {"digit": digit, "colour": colour, "background": background, "size": size, "position": position}

    def segments(self, images: np.ndarray) -> np.ndarray:
        """The classes of the pixels, as in `paired_scenes`: digit + 1 where more than half is ink, else 0; int [n, size, size]."""
        ink = self._read_colours(np.asarray(images))[2]
        # The colours are rounded, which moves a half, and the scenes have many, by up to 0.005.
        return np.where(ink > 0.505, self(images)["digit"][:, None, None] + 1, 0)

    def _read_colours(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Background [n], colour [n] and ink [n, size, size] in [0, 1]."""
        pixels = images.reshape(len(images), -1, 3).astype(np.float64)
        background = ((np.median(pixels, 1)[:, None] - self._palette) ** 2).sum(-1).argmin(1)
        best = np.full(len(images), np.inf)
        colour, ink = np.zeros(len(images), np.int64), np.zeros(pixels.shape[:2])
        behind = self._palette[background][:, None]
        for number, front in enumerate(self._palette):
            change = front - behind
            other = background != number
            share = np.clip(((pixels - behind) * change).sum(-1) / np.where(other, (change[:, 0] ** 2).sum(-1), 1.0)[:, None], 0, 1)
            error = np.where(other, ((pixels - behind - share[..., None] * change) ** 2).sum((1, 2)), np.inf)
            closer = error < best
            colour[closer], ink[closer], best[closer] = number, share[closer], error[closer]
        return background, colour, ink.reshape(-1, self._size, self._size)

    @staticmethod
    def _class(size: np.ndarray, position: np.ndarray) -> np.ndarray:
        return size * len(scenes.POSITIONS) + position


trained_judge = functools.cache(Judge)  # one serves every setting that is measured


def grid(images: np.ndarray, labels: Mapping[str, np.ndarray], wrong: np.ndarray | None = None):
    """The first 20 scenes [n, size, size, 3] with the captions of their `labels`, `wrong` ones in red."""
    first = slice(20)
    captions = scenes.captions({name: labels[name][first] for name in scenes.ATTRIBUTES})
    return plots.grid(media.to_uint8(images[first]), 5, captions, wrong=wrong)
