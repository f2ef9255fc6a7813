"""What is measured of digit scenes and captions in one space of vectors: two towers, and DiffDis, which denoises a caption's vector."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmdiff.data import media
from mmdiff.data.sources import load_all
from mmdiff.data.tower_cache import Towers
from mmdiff.evals import plots, retrieval
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.alignment import STEPS_AND_SEEDS, Aligner
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, best, finite, in_batches, sample_batched
from mmdiff.projects.scenes import scenes
from mmdiff.projects.scenes.captioned_scenes import ASKED, CaptionedScenes, trained_judge

AMONG = 200  # captions that a scene is retrieved among
SPLITS = ("test", "held_out")
HELD_OUT = f"the same for scenes of held-out combinations, among the captions of {AMONG // 10} of them with all ten digits each"


def splits_of(experiment) -> tuple[str, ...]:
    """The splits that are measured: nothing is chosen on held-out combinations."""
    return SPLITS if experiment.split == "test" else (experiment.split,)


def scene_retrieval(vectors: np.ndarray, captions: np.ndarray, labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`r1`, the share of scenes whose best caption says the right digit, colour and place; and Recall@K both ways for the caption itself.

    The scenes are taken `AMONG` at a time, and each is compared with the captions of those.

    Args:
      vectors: of the images [n, D]. captions: of their captions [n, D]. labels: the attributes of the scenes, [n] each.
    """
    found = []
    for start in range(0, len(vectors) - AMONG + 1, AMONG):
        part = slice(start, start + AMONG)
        scores = retrieval.scores(vectors[part], captions[part])
        one = {name: labels[name][part] for name in scenes.ATTRIBUTES}
        right = np.logical_and.reduce([one[name][:, None] == one[name] for name in ASKED])  # equal captions are equally right
        same = np.logical_and.reduce([one[name][:, None] == one[name] for name in scenes.ATTRIBUTES])
        found.append({"r1": retrieval.recall(scores, right, 1), **retrieval.recalls(scores, same)})
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def held_out_retrieval(vectors: np.ndarray, encode: Any, labels: Mapping[str, np.ndarray]) -> float:
    """The share of scenes for which, among `AMONG` captions, the best says the right digit, colour and place: each with all ten digits.

    Where a combination is held out, colour and place give the digit away (`scenes`): captions of held-out scenes alone would be no
    test of it. So the candidates are the captions of a few scenes, `AMONG` / 10, with every digit in its place.

    Args:
      vectors: of the images [n, D]. encode: texts -> vectors [m, D]. labels: the attributes of the scenes, [n] each.
    """
    digits, right = len(scenes.DIGITS), []
    size = AMONG // digits
    for start in range(0, len(vectors) - size + 1, size):
        one = {name: labels[name][start : start + size] for name in scenes.ATTRIBUTES}
        all_digits = {name: np.repeat(column, digits) for name, column in one.items()} | {"digit": np.tile(np.arange(digits), size)}
        relevant = np.logical_and.reduce([one[name][:, None] == all_digits[name] for name in ASKED])
        right.append(retrieval.recall(retrieval.scores(vectors[start : start + size], encode(scenes.captions(all_digits))), relevant, 1))
    return float(np.mean(right))


def prompts(attribute: str, wordings: int) -> list[list[str]]:
    """Captions that differ in one attribute alone, for each of its values: the classes, in the same wordings each."""
    labels = load_all(scenes.Scenes("train", count=wordings))
    return [scenes.captions(labels | {attribute: np.full(wordings, value)}) for value in range(len(scenes.ATTRIBUTES[attribute]))]


def zero_shot(vectors: np.ndarray, encode: Any, labels: Mapping[str, np.ndarray], attributes: Sequence[str] = ASKED) -> dict[str, float]:
    """Accuracy of every attribute by the classes' vectors, each the mean of 100 captions that say it, without what all of them share.

    The captions of all classes say the same of the other attributes; left in, that would drown what tells the classes apart.
    """
    found = {}
    for name in attributes:
        wordings = prompts(name, 100)
        means = np.asarray(encode(sum(wordings, [])), np.float64).reshape(len(wordings), 100, -1).mean(1)
        found[name] = accuracy(best("scores", retrieval.scores(vectors, means - means.mean(0))), labels[name])
    return found


@dataclasses.dataclass(frozen=True)
class SceneAlignment:
    """The metrics and figures of DiffDis on digit scenes: retrieval by the denoised vector, sampling, writing, and the round trip.

    Attributes:
      aligner: the alignment task. towers: frozen, the vectors' and the baseline's.
      captioned: what is measured of sampled scenes; size, count and batch are its.
      choose: of how many samples the alignment branch picks one.
    """

    aligner: Aligner
    towers: Towers
    captioned: CaptionedScenes
    choose: int = 4

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        count, size, batch = self.captioned.count, self.captioned.size, self.captioned.batch
        keys = jax.random.split(key, 8)
        clock, metrics = Clock(), {}
        align = functools.partial(self.aligner, params, batch=batch)
        splits = splits_of(experiment)
        main, last = splits[0], splits[-1]
        data = {split: load_all(scenes.Scenes(split, size, count)) for split in splits}
        captions = {split: self.towers.texts(data[split]["text"])[1] for split in splits}

        def found(split, vectors):
            if split == "held_out":
                return held_out_retrieval(vectors, self.towers.encode, data[split])
            return scene_retrieval(vectors, captions[split], data[split])["r1"]

        clock.start("alignment", f"retrieving captions of {count} scenes of each split")
        for split in splits:
            suffix = "" if split == main else f"_{split}"
            images, labels = data[split]["image"], data[split]
            read = {name: align(keys[0], images, steps=n, seeds=seeds) for name, (n, seeds) in STEPS_AND_SEEDS.items()}
            shares = {name: found(split, vectors) for name, vectors in read.items()}
            metrics[f"retrieval_r1{suffix}"] = shares["10"]
            metrics |= {f"{name}_accuracy{suffix}": value for name, value in zero_shot(read["10"], self.towers.encode, labels).items()}
            frozen = self.towers.images(images)
            metrics[f"towers_retrieval_r1{suffix}"] = found(split, frozen)
            metrics |= {f"retrieval_r1_{name}{suffix}": share for name, share in shares.items()}
            metrics[f"retrieval_r1_guided{suffix}"] = found(split, align(keys[0], images, steps=10, guidance=2.0))
            if split == main:
                every = {"retrieval_r1_all_digits": read["10"], "towers_retrieval_r1_all_digits": frozen}
                metrics |= {name: held_out_retrieval(vectors, self.towers.encode, labels) for name, vectors in every.items()}
                recalls = scene_retrieval(read["10"], captions[split], labels)
                metrics |= {name: value for name, value in recalls.items() if name != "r1"}
        metrics["retrieval_r1_dropped"] = found(main, align(keys[1], None, count=count, steps=10))

        sampled = self.captioned.sample(experiment, params, keys[2:4], steps, guidance, clock)
        measured = self.captioned.measure(sampled, steps, guidance, clock, experiment.split)
        clock.start("round trip", "retrieving the captions of the samples")
        (_, first), (seen, others) = sampled.values()
        trip = scene_retrieval(align(keys[4], others, steps=10), self.towers.texts(seen["text"])[1], seen)
        metrics["round_trip"] = trip["r1"]
        metrics[f"round_trip_{last}"] = found(last, align(keys[4], first, steps=10))

        held = data[last]
        sample = functools.partial(sample_batched, experiment, params, batch=batch, steps=steps, guidance=1.0)
        clock.start("best", f"sampling {self.choose} of each caption ({last}), and keeping what the alignment branch likes best")
        many = np.tile(held["text"], (self.choose, 1))
        images = np.clip(sample(keys[5], {"text": many}, len(many))["image"], -1, 1)
        vectors = align(keys[4], images, steps=1, seeds=4).reshape(self.choose, count, -1)
        chosen = np.einsum("knd,nd->kn", finite("vectors", vectors), captions[last]).argmax(0) * count + np.arange(count)
        judge = trained_judge(size)
        for name, rows in (("unguided", slice(count)), (f"best_of_{self.choose}", chosen)):
            metrics[f"prompt_correctness_{name}"] = float(self.captioned.right(judge(images[rows]), held).mean())

        written = {}
        for split in splits if config.times.image_to_text else ():
            clock.start(f"writing, {split}", f"writing captions of {count} scenes ({split})")
            written[split] = experiment.modalities["text"].show(sample(keys[6], {"image": data[split]["image"]}, count)["text"])
            same = np.array(written[split]) == np.array(scenes.captions(data[split]))
            metrics["caption_correctness" if split == main else f"caption_correctness_{split}"] = float(same.mean())
        clock.stop()

        figures = {}
        if written:
            shown = media.to_uint8(held["image"][:20])
            wrong = [one != other for one, other in zip(written[last], scenes.captions(held))]
            figures["Image to caption"] = Figure(
                plots.grid(shown, 5, written[last][:20], wrong=wrong[:20]),
                f"What masked diffusion writes of scenes ({last}); red where a word is wrong.")
        definitions = {
            "retrieval_r1": f"share of {count} {main} scenes whose denoised vector (10 steps from noise) is nearest, among {AMONG} "
            f"captions, to one that says the right {', '.join(ASKED)}; _1, _2, ... other numbers of steps, _1_of_8 the mean of 8 seeds",
            "retrieval_r1_held_out": HELD_OUT,
            "retrieval_r1_all_digits": f"{main} scenes among the captions of {AMONG // 10} of them with all ten digits each: colours and "
            "place, which tell most of 200 scenes apart, do not help",
            "towers_retrieval_r1": "as retrieval_r1, by the frozen image tower",
            "towers_retrieval_r1_all_digits": "as retrieval_r1_all_digits, by the frozen image tower",
            "retrieval_r1_dropped": "the same without the image: chance",
            f"prompt_correctness_best_of_{self.choose}": f"of {self.choose} unguided samples that which the alignment branch likes best",
            "round_trip": f"share of scenes sampled for training captions that the alignment branch retrieves among {AMONG}, right "
            f"{', '.join(ASKED)}",
            "caption_correctness": f"share of {main} scenes whose written caption is right, word by word",
        }
        return measured | EvalResult(metrics, definitions, figures, {"candidates": AMONG})


@dataclasses.dataclass(frozen=True)
class SceneTowers:
    """The metrics of two towers trained on digit scenes: retrieval, and the classes of what a scene is made of.

    Attributes:
      net: a `nets.TwoTowers`. size: the side of the canvas. count: scenes of each split. batch: of a network call.
    """

    net: Any
    size: int = 16
    count: int = 1000
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        clock, metrics = Clock(), {}
        clock.start("towers", f"comparing {self.count} scenes of each split with captions")
        keys = jax.random.split(key, self.count)
        encode_image, encode_text = (functools.partial(self.net.apply, method=method) for method in ("encode_image", "encode_text"))

        def encode(texts):
            ids = scenes.tokenizer().encode(texts)
            return in_batches(lambda p, k, x: encode_text(p, x)[1], params, jax.random.split(key, len(ids)), ids, self.batch)

        for split in splits_of(experiment):
            data = load_all(scenes.Scenes(split, self.size, self.count))
            images = in_batches(lambda p, k, x: encode_image(p, x), params, keys, data["image"], self.batch)
            suffix = "_held_out" if split == "held_out" else ""
            if not suffix:
                texts = in_batches(lambda p, k, x: encode_text(p, x)[1], params, keys, data["text"], self.batch)
                found = scene_retrieval(images, texts, data)
                metrics |= {"retrieval_r1": found.pop("r1"), **found}
            else:
                metrics["retrieval_r1_held_out"] = held_out_retrieval(images, encode, data)
            metrics |= {f"{name}_accuracy{suffix}": value for name, value in zero_shot(images, encode, data).items()}
        clock.stop()
        definitions = {
            "retrieval_r1": f"share of {self.count} {experiment.split} scenes whose nearest caption among {AMONG} says the right "
            f"{', '.join(ASKED)}",
            "retrieval_r1_held_out": HELD_OUT,
        }
        return EvalResult(metrics, definitions, {}, {"candidates": AMONG, "evaluation_seconds": clock.seconds})
