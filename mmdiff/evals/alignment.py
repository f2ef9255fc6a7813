"""What is measured of images and texts in one space of vectors: towers, and DiffDis, which denoises a text's vector beside an image."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.data import scenes
from mmdiff.data.sources import whole
from mmdiff.data.towers import Towers
from mmdiff.evals import classifiers, conditional, retrieval
from mmdiff.evals import pictures as drawings
from mmdiff.evals.accuracy import accuracy, confusion, eliminated
from mmdiff.evals.base import Clock, Findings, Picture, costs, draw_samples, example_keys, in_batches
from mmdiff.evals.frechet import frechet_ratio
from mmdiff.evals.scenes import ASKED, grid, trained_judge
from mmdiff.nets.dual import DualStream, look, naming
from mmdiff.processes import Gaussian, Given, Joint

AMONG = 200  # captions that a scene is retrieved among
SPLITS = ("test", "held_out")


def scene_retrieval(vectors: np.ndarray, captions: np.ndarray, said: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`r1`, the share of scenes whose best caption says the right digit, colour and place; and Recall@K both ways for the caption itself.

    The scenes are taken `AMONG` at a time, and each is compared with the captions of those.

    Args:
      vectors: of the images [n, D]. captions: of their captions [n, D]. said: the attributes of the scenes, [n] each.
    """
    found = []
    for start in range(0, len(vectors) - AMONG + 1, AMONG):
        part = slice(start, start + AMONG)
        scores = retrieval.scores(vectors[part], captions[part])
        one = {name: said[name][part] for name in scenes.ATTRIBUTES}
        best = scores.argmax(1)
        right = np.logical_and.reduce([one[name][best] == one[name] for name in ASKED])
        same = np.logical_and.reduce([one[name][:, None] == one[name] for name in scenes.ATTRIBUTES])
        found.append({"r1": float(right.mean()), **retrieval.recalls(scores, same)})
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def held_out_retrieval(vectors: np.ndarray, encode: Any, said: Mapping[str, np.ndarray]) -> float:
    """The share of scenes for which, among `AMONG` captions, the best says the right digit, colour and place: each with all ten digits.

    Where a combination is held out, colour and place give the digit away (`data.scenes`): captions of held-out scenes alone would be no
    test of it. So the candidates are the captions of a few scenes, `AMONG` / 10, with every digit in its place.

    Args:
      vectors: of the images [n, D]. encode: texts -> vectors [m, D]. said: the attributes of the scenes, [n] each.
    """
    digits, right = len(scenes.DIGITS), []
    size = AMONG // digits
    for start in range(0, len(vectors) - size + 1, size):
        one = {name: said[name][start : start + size] for name in scenes.ATTRIBUTES}
        all_digits = {name: np.repeat(column, digits) for name, column in one.items()} | {"digit": np.tile(np.arange(digits), size)}
        best = retrieval.scores(vectors[start : start + size], encode(scenes.captions(all_digits))).argmax(1)
        right.append(np.logical_and.reduce([all_digits[name][best] == one[name] for name in ASKED]))
    return float(np.concatenate(right).mean())


def prompts(attribute: str, wordings: int) -> list[list[str]]:
    """Captions that differ in one attribute alone, for each of its values: the classes, in the same wordings each."""
    said = whole(scenes.Scenes("train", count=wordings))
    return [scenes.captions(said | {attribute: np.full(wordings, value)}) for value in range(len(scenes.ATTRIBUTES[attribute]))]


def zero_shot(vectors: np.ndarray, encode: Any, said: Mapping[str, np.ndarray], attributes: Sequence[str] = ASKED) -> dict[str, float]:
    """Accuracy of every attribute by the classes' vectors, each the mean of 100 captions that say it, without what all of them share.

    The captions of all classes say the same of the other attributes; left in, that would drown what tells the classes apart.
    """
    found = {}
    for name in attributes:
        wordings = prompts(name, 100)
        means = np.asarray(encode(sum(wordings, [])), np.float64).reshape(len(wordings), 100, -1).mean(1)
        found[name] = accuracy(retrieval.scores(vectors, means - means.mean(0)).argmax(1), said[name])
    return found


@dataclasses.dataclass(frozen=True)
class Aligner:
    """A `DualStream` read by its second task: images -> unit vectors of their texts, denoised from noise.

    Attributes:
      net: the network. Without `two_way` an image is looked at once, and each further step costs one token.
      query: the vector's process.
      size: of the vector. shape: of an image.
    """

    net: DualStream
    query: Gaussian
    size: int
    shape: tuple[int, ...]

    def __call__(
        self, params, key, images: np.ndarray | None, *, count: int = 0, steps: int = 10, seeds: int = 1, guidance: float = 1.0,
        batch: int = 250, cached: bool | None = None,
    ) -> np.ndarray:
        """Vectors [n, size] of images [n, ...], or of `count` absent ones (None)."""
        given = {} if images is None else {"image": images}
        function = self.function(steps, seeds, guidance, not self.net.two_way if cached is None else cached)
        return in_batches(function, params, example_keys(key, count if images is None else len(images)), given, batch)

    @functools.cache  # the same function for the same options, so that jax compiles it once
    def function(self, steps: int, seeds: int = 1, guidance: float = 1.0, cached: bool = False):
        """`(params, keys, given) -> vectors`, to be jitted; `cached` looks at the images once."""
        options = dict(steps=steps, seeds=seeds)

        def beside_cache(params, keys, given):
            images = given.get("image", jnp.zeros((len(keys), *self.shape)))
            hidden = jnp.ones(len(keys))
            plain = naming(self.net, look(self.net, params, images, None if given else hidden))
            network = plain
            if given and guidance != 1:
                bare = naming(self.net, look(self.net, params, images, hidden))

                def network(params, x, t):
                    return jax.tree.map(lambda u, c: u + guidance * (c - u), bare(params, x, t), plain(params, x, t))

            return retrieval.align(Joint(query=self.query), network, params, keys, {}, {"query": (self.size,)}, **options)

        def beside_images(params, keys, given):
            apply = functools.partial(self.net.apply, tasks=("name",))
            shape = {"image": self.shape, "query": (self.size,)}
            process, scale = Joint(image=Given(0.0), query=self.query), guidance if given else 1.0
            return retrieval.align(process, apply, params, keys, given, shape, guidance=scale, drop={"image": 0.0}, **options)

        return beside_cache if cached else beside_images


READINGS = {"1": (1, 1), "2": (2, 1), "5": (5, 1), "10": (10, 1), "50": (50, 1), "1_of_4": (1, 4), "1_of_8": (1, 8)}  # steps, seeds


@dataclasses.dataclass(frozen=True)
class DigitAlignment:
    """The figures and pictures of DiffDis on digits: naming by the denoised vector, drawing, and what the two make of each other.

    Attributes:
      aligner: the naming task.
      prompts: the classes' vectors [10, D].
      stages: of the diffusion classifier, `evals.accuracy.eliminated`, for `slow` test images.
      per_class: samples of a class for `conditional_agreement`, and of those that best-of-`choose` picks.
      batch: examples of a network call.
    """

    aligner: Aligner
    prompts: np.ndarray
    stages: tuple[tuple[int, int], ...] = ((4, 5), (12, 2), (34, 1))
    slow: int = 200
    per_class: int = 100
    choose: int = 4
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> Findings:
        train, test = whole(experiment.train_data()), whole(experiment.eval_data())
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        keys = jax.random.split(key, 8)
        clock, figures, labels = Clock(), {}, test["label"]
        align = functools.partial(self.aligner, params, batch=self.batch)

        def named(vectors):
            return retrieval.scores(vectors, self.prompts).argmax(1)

        clock.start("alignment", f"naming {len(labels)} images from noise, {', '.join(READINGS)} steps")
        kept = named(align(keys[0], test["image"], steps=10))
        figures["alignment_accuracy"] = accuracy(kept, labels)
        for name, (n, seeds) in READINGS.items():
            figures[f"alignment_accuracy_{name}"] = accuracy(named(align(keys[0], test["image"], steps=n, seeds=seeds)), labels)
        figures["alignment_accuracy_guided"] = accuracy(named(align(keys[0], test["image"], steps=10, guidance=3.0)), labels)
        figures["alignment_accuracy_dropped"] = accuracy(named(align(keys[1], None, count=len(labels), steps=10)), labels)
        shuffled = np.random.Generator(np.random.Philox(0)).permutation(labels)
        figures["alignment_accuracy_shuffled"] = accuracy(kept, shuffled)

        clock.start("diffusion_classifier", f"naming {self.slow} images by the drawing task's losses")
        ids = {int(label): test["text"][row] for row, label in enumerate(labels)}
        texts = jnp.asarray([ids[label] for label in range(10)])

        def by_loss(params, keys, given):
            candidates = jnp.broadcast_to(texts, (len(keys), *texts.shape))
            shape, options = experiment.shape, self.stages
            return eliminated(experiment.process, experiment.apply, params, keys, given, "text", candidates, shape, options)

        slow = {"image": test["image"][: self.slow]}
        read = in_batches(by_loss, params, example_keys(keys[2], self.slow), slow, self.batch // 10)
        figures["diffusion_classifier_accuracy"] = accuracy(read, labels[: self.slow])
        figures["readouts_agree"] = accuracy(read, kept[: self.slow])

        clock.start("drawing", "drawing digits of captions")
        asked = conditional.labels_to_ask(train["label"], 10, self.per_class)
        quantize = experiment.modalities["image"].quantize
        draw = functools.partial(draw_samples, experiment, params, batch=self.batch, steps=steps)
        drawn = quantize(draw(keys[3], {"text": np.asarray(texts)[asked]}, len(asked), guidance=guidance)["image"])
        found = conditional.judge(
            drawn, asked, (train["image"], train["label"]), (test["image"], labels), 10, self.per_class)
        figures |= found.figures
        figures["round_trip"] = accuracy(named(align(keys[4], drawn[found.rows], steps=10)), asked[found.rows])

        clock.start("best", f"drawing {self.choose} of each caption, unguided, and keeping what names it best")
        wanted = np.repeat(np.arange(10), self.per_class)
        many = np.tile(wanted, self.choose)
        plain = quantize(draw(keys[5], {"text": np.asarray(texts)[many]}, len(many), guidance=1.0)["image"])
        score = retrieval.scores(align(keys[6], plain, steps=1, seeds=4), self.prompts)[np.arange(len(many)), many]
        best = score.reshape(self.choose, -1).argmax(0) * len(wanted) + np.arange(len(wanted))
        for name, rows in (("unguided_agreement", slice(len(wanted))), (f"best_of_{self.choose}_agreement", best)):
            figures[name] = accuracy(classifiers.predict(found.classifier, plain[rows]), wanted)

        clock.start("costs", "timing")
        ways = {}
        few = {"image": jnp.asarray(test["image"][:100])}
        for n in (1, 10, 50):
            ways[f"{n}"] = (self.aligner.function(n), few, 100)
            if not self.aligner.net.two_way:
                ways[f"{n}_cached"] = (self.aligner.function(n, cached=True), few, 100)
        ways["diffusion_classifier"] = (by_loss, {"image": few["image"][:25]}, 25)
        seconds = costs(params, keys[7], ways)
        figures |= {f"milliseconds_{name}": 1e3 * value for name, value in seconds.items()}
        figures["diffusion_classifier_cost"] = seconds["diffusion_classifier"] / seconds["10"]
        clock.stop()

        show, words = experiment.modalities["image"].show, [str(label) for label in range(10)]
        sampler = f"{steps} steps, guidance {guidance:g}"
        pictures = {
            **conditional.pictures(show(drawn), asked, show(test["image"]), labels, words, found, sampler),
            "Image to label": Picture(
                drawings.matrix(confusion(kept, labels, 10), words, "true", "named"), "The alignment branch, 10 steps from noise."),
            "Named": Picture(
                drawings.grid(show(test["image"][:40]), 10, [str(label) for label in kept[:40]], wrong=(kept != labels)[:40]),
                "Held-out digits with the names that the alignment branch gives them; wrong ones in red."),
        }
        notes = {
            "alignment_accuracy": f"share of {len(labels)} held-out digits whose denoised vector (10 steps from noise) is nearest to the "
            "right prompt; _1, _2, ... other numbers of steps, _1_of_8 the mean of 8 seeds of one step, _guided at guidance 3",
            "alignment_accuracy_dropped": "the same without an image: chance is 0.1",
            "alignment_accuracy_shuffled": "the same answers against permuted labels: chance is 0.1",
            "diffusion_classifier_accuracy": f"by elimination, {self.stages} (draws, candidates kept), {self.slow} held-out digits",
            "readouts_agree": "share of them that both read-outs name alike",
            "round_trip": "share of drawn digits that the alignment branch names as they were asked for",
            f"best_of_{self.choose}_agreement": f"the SVM's agreement with the best of {self.choose} unguided samples by the alignment "
            "branch's score; unguided_agreement with the first",
            "diffusion_classifier_cost": "its seconds per image over those of 10 steps of alignment without a cache",
            **found.notes,
        }
        settings = {"sample_steps": steps, "guidance": guidance, **found.settings, "evaluation_seconds": clock.seconds}
        return Findings(figures, notes, pictures, settings)


@dataclasses.dataclass(frozen=True)
class PairRetrieval:
    """Recall@K both ways of images and their texts' vectors, "image" and "query" of the evaluation data.

    Attributes:
      aligner: the naming task. count: pairs, each compared with all. batch: examples of a network call.
    """

    aligner: Aligner
    count: int = 1000
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> Findings:
        source = experiment.eval_data()
        count = min(self.count, len(source))
        data, clock = source.take(np.arange(count)), Clock()
        clock.start("alignment", f"denoising the texts' vectors of {count} images")
        texts = np.asarray(data["query"], np.float64)
        texts = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
        vectors = self.aligner(params, key, data["image"], steps=10, batch=self.batch)
        clock.stop()
        figures = retrieval.recalls(retrieval.scores(vectors, texts), texts @ texts.T > 1 - 1e-6)
        notes = {name: f"10 steps from noise; {count} images and their texts; equal texts are right, too" for name in figures}
        return Findings(figures, notes, {}, {"candidates": count, "evaluation_seconds": clock.seconds})


@dataclasses.dataclass(frozen=True)
class SceneAlignment:
    """The figures and pictures of DiffDis on digit scenes: retrieval by the denoised vector, drawing, writing, and the round trip.

    Attributes:
      aligner: the naming task. towers: frozen, the vectors' and the baseline's.
      size: the side of the canvas.
      count: scenes of each split, and samples of each set of captions.
      choose: of how many samples the alignment branch picks one.
      batch: examples of a network call.
    """

    aligner: Aligner
    towers: Towers
    size: int = 16
    count: int = 1000
    choose: int = 4
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> Findings:
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        keys = jax.random.split(key, 8)
        clock, figures = Clock(), {}
        align = functools.partial(self.aligner, params, batch=self.batch)
        data = {split: whole(scenes.Scenes(split, self.size, self.count)) for split in SPLITS}
        captions = self.towers.texts(data["test"]["text"])[1]

        clock.start("alignment", f"retrieving captions of {self.count} scenes of each split")
        def found(split, vectors):
            if split == "held_out":
                return held_out_retrieval(vectors, self.towers.encode, data[split])
            return scene_retrieval(vectors, captions, data[split])["r1"]

        for split in SPLITS:
            suffix = "" if split == "test" else f"_{split}"
            images, said = data[split]["image"], data[split]
            vectors = align(keys[0], images, steps=10)
            figures[f"retrieval_r1{suffix}"] = found(split, vectors)
            figures |= {f"{name}_accuracy{suffix}": value for name, value in zero_shot(vectors, self.towers.encode, said).items()}
            figures[f"towers_retrieval_r1{suffix}"] = found(split, self.towers.images(images))
            for name, (n, seeds) in READINGS.items():
                figures[f"retrieval_r1_{name}{suffix}"] = found(split, align(keys[0], images, steps=n, seeds=seeds))
            figures[f"retrieval_r1_guided{suffix}"] = found(split, align(keys[0], images, steps=10, guidance=2.0))
            if split == "test":
                recalls = scene_retrieval(vectors, captions, said)
                figures |= {name: value for name, value in recalls.items() if name != "r1"}
        bare = align(keys[1], None, count=self.count, steps=10)
        figures["retrieval_r1_dropped"] = found("test", bare)

        drawn, wanted = {}, {"held_out": data["held_out"], "seen": whole(scenes.Scenes("train", self.size, self.count))}
        draw = functools.partial(draw_samples, experiment, params, batch=self.batch, steps=steps)
        judge = trained_judge(self.size)
        for (name, said), sample_key in zip(wanted.items(), keys[2:4]):
            clock.start(f"drawing, {name}", f"drawing {self.count} scenes of captions ({name})")
            drawn[name] = np.clip(draw(sample_key, {"text": said["text"]}, self.count, guidance=guidance)["image"], -1, 1)
        right = {name: {each: judge(drawn[name])[each] == said[each] for each in scenes.ATTRIBUTES} for name, said in wanted.items()}
        figures["prompt_correctness"] = float(_all(right["held_out"]).mean())
        figures["prompt_correctness_seen"] = float(_all(right["seen"]).mean())
        figures |= {f"{name}_correctness": float(each.mean()) for name, each in right["held_out"].items()}
        real = judge(data["held_out"]["image"])
        figures["prompt_correctness_real"] = float(_all({name: real[name] == data["held_out"][name] for name in real}).mean())
        figures["frechet_ratio"] = frechet_ratio(drawn["seen"], data["test"]["image"], wanted["seen"]["image"])
        texts = self.towers.texts(wanted["seen"]["text"])[1]
        trip = scene_retrieval(align(keys[4], drawn["seen"], steps=10), texts, wanted["seen"])
        figures["round_trip"] = trip["r1"]
        figures["round_trip_held_out"] = found("held_out", align(keys[4], drawn["held_out"], steps=10))

        clock.start("best", f"drawing {self.choose} of each held-out caption, and keeping what the alignment branch likes best")
        many = np.tile(data["held_out"]["text"], (self.choose, 1))
        images = np.clip(draw(keys[5], {"text": many}, len(many), guidance=1.0)["image"], -1, 1)
        vectors = align(keys[4], images, steps=1, seeds=4).reshape(self.choose, self.count, -1)
        asked = self.towers.texts(data["held_out"]["text"])[1]
        best = np.einsum("knd,nd->kn", vectors, asked).argmax(0) * self.count + np.arange(self.count)
        for name, rows in (("prompt_correctness_unguided", slice(self.count)), (f"prompt_correctness_best_of_{self.choose}", best)):
            seen = judge(images[rows])
            figures[name] = float(_all({each: seen[each] == data["held_out"][each] for each in seen}).mean())

        written = {}
        for split in SPLITS if config.times.write else ():
            clock.start(f"writing, {split}", f"writing captions of {self.count} scenes ({split})")
            ids = draw(keys[6], {"image": data[split]["image"]}, self.count, guidance=1.0)["text"]
            written[split] = experiment.modalities["text"].show(ids)
            same = np.array(written[split]) == np.array(scenes.captions(data[split]))
            figures["caption_correctness" if split == "test" else f"caption_correctness_{split}"] = float(same.mean())
        clock.stop()

        sampler = f"{steps} steps, guidance {guidance:g}"
        pictures = {
            "Caption to image": Picture(
                grid(drawn["held_out"], data["held_out"], ~_all(right["held_out"])),
                f"Captions of held-out combinations; {sampler}; the first ones, none chosen. Red: the judge finds another "
                "digit, colour, background, size or position."),
            "Real scenes": Picture(grid(data["test"]["image"], data["test"]), "Test scenes, for comparison."),
        }
        if written:
            shown = np.rint((data["held_out"]["image"][:20] + 1) * 127.5).astype(np.uint8)
            wrong = [one != other for one, other in zip(written["held_out"], scenes.captions(data["held_out"]))]
            pictures["Image to caption"] = Picture(
                drawings.grid(shown, 5, written["held_out"][:20], wrong=wrong[:20]),
                "What masked diffusion writes of held-out scenes; red where a word is wrong.")
        notes = {
            "retrieval_r1": f"share of {self.count} test scenes whose denoised vector (10 steps from noise) is nearest, among {AMONG} "
            f"captions, to one that says the right {', '.join(ASKED)}; _1, _2, ... other numbers of steps, _1_of_8 the mean of 8 seeds",
            "retrieval_r1_held_out": f"the same for scenes of held-out combinations, among the captions of {AMONG // 10} of them with all "
            "ten digits each",
            "towers_retrieval_r1": "the same by the frozen image tower",
            "retrieval_r1_dropped": "the same without the image: chance",
            "prompt_correctness": f"share of {self.count} samples for captions of held-out combinations that show the right "
            f"{', '.join(scenes.ATTRIBUTES)}, all of them, as a judge trained on real training scenes reads them; _seen: for captions "
            "of training scenes; _real: of the real pictures, the ceiling",
            f"prompt_correctness_best_of_{self.choose}": f"of {self.choose} unguided samples that which the alignment branch likes best",
            "round_trip": f"share of scenes drawn of training captions that the alignment branch retrieves among {AMONG}, right "
            f"{', '.join(ASKED)}",
            "caption_correctness": "share of test scenes whose written caption is right, word by word",
            "frechet_ratio": "squared Fréchet distance (raw pixels) of samples for training captions to test scenes, over that of "
            "those captions' own scenes to them",
        }
        settings = {"sample_steps": steps, "guidance": guidance, "candidates": AMONG, "evaluation_seconds": clock.seconds}
        return Findings(figures, notes, pictures, settings)


def _all(right: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.logical_and.reduce([right[name] for name in scenes.ATTRIBUTES])


@dataclasses.dataclass(frozen=True)
class SceneTowers:
    """The figures of two towers trained on digit scenes: retrieval, and the classes of what a scene is made of.

    Attributes:
      net: a `nets.TwoTowers`. size: the side of the canvas. count: scenes of each split. batch: of a network call.
    """

    net: Any
    size: int = 16
    count: int = 1000
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> Findings:
        clock, figures, notes = Clock(), {}, {}
        clock.start("towers", f"comparing {self.count} scenes of each split with captions")
        keys = jax.random.split(key, self.count)
        see, read = (functools.partial(self.net.apply, method=method) for method in ("see", "read"))

        def encode(texts):
            ids = scenes.tokenizer().encode(texts)
            return in_batches(lambda p, k, x: read(p, x)[1], params, jax.random.split(key, len(ids)), ids, self.batch)

        for split in SPLITS:
            data = whole(scenes.Scenes(split, self.size, self.count))
            images = in_batches(lambda p, k, x: see(p, x), params, keys, data["image"], self.batch)
            suffix = "" if split == "test" else f"_{split}"
            if split == "test":
                texts = in_batches(lambda p, k, x: read(p, x)[1], params, keys, data["text"], self.batch)
                found = scene_retrieval(images, texts, data)
                figures |= {"retrieval_r1": found.pop("r1"), **found}
            else:
                figures["retrieval_r1_held_out"] = held_out_retrieval(images, encode, data)
            figures |= {f"{name}_accuracy{suffix}": value for name, value in zero_shot(images, encode, data).items()}
        clock.stop()
        notes["retrieval_r1"] = f"share of {self.count} test scenes whose nearest caption among {AMONG} says the right {', '.join(ASKED)}"
        notes["retrieval_r1_held_out"] = (
            f"the same for scenes of held-out combinations, among the captions of {AMONG // 10} of them with all ten digits each")
        return Findings(figures, notes, {}, {"candidates": AMONG, "evaluation_seconds": clock.seconds})
