"""What is measured of DiffDis on digits: classes predicted by the denoised vector, digits sampled, and what the two make of each other."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.data.sources import load_all
from mmdiff.evals import plots, retrieval
from mmdiff.evals.accuracy import accuracy, confusion, eliminated
from mmdiff.evals.alignment import STEPS_AND_SEEDS, Aligner
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, best, costs, example_keys, in_batches, sample_batched
from mmdiff.projects.digits import classifiers, conditional


@dataclasses.dataclass(frozen=True)
class DigitAlignment:
    """The metrics and figures of DiffDis on digits: classes predicted by the denoised vector, samples, and what the two make of each other.

    Attributes:
      aligner: the alignment task.
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

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        train, test = load_all(experiment.train_data()), load_all(experiment.test_data())
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        keys = jax.random.split(key, 8)
        clock, metrics, labels = Clock(), {}, test["label"]
        align = functools.partial(self.aligner, params, batch=self.batch)

        def classify(vectors):
            return best("scores", retrieval.scores(vectors, self.prompts))

        clock.start("alignment", f"classifying {len(labels)} images from noise, {', '.join(STEPS_AND_SEEDS)} steps")
        predicted = {name: classify(align(keys[0], test["image"], steps=n, seeds=seeds)) for name, (n, seeds) in STEPS_AND_SEEDS.items()}
        found_10 = predicted["10"]
        metrics["alignment_accuracy"] = accuracy(found_10, labels)
        metrics |= {f"alignment_accuracy_{name}": accuracy(names, labels) for name, names in predicted.items()}
        metrics["alignment_accuracy_guided"] = accuracy(classify(align(keys[0], test["image"], steps=10, guidance=3.0)), labels)
        metrics["alignment_accuracy_dropped"] = accuracy(classify(align(keys[1], None, count=len(labels), steps=10)), labels)
        shuffled = np.random.Generator(np.random.Philox(0)).permutation(labels)
        metrics["alignment_accuracy_shuffled"] = accuracy(found_10, shuffled)

        clock.start("diffusion_classifier", f"classifying {self.slow} images by the sampling task's losses")
        ids = {int(label): test["text"][row] for row, label in enumerate(labels)}
        texts = jnp.asarray([ids[label] for label in range(10)])

        def by_loss(params, keys, given):
            candidates = jnp.broadcast_to(texts, (len(keys), *texts.shape))
            shape, options = experiment.shape, self.stages
            return eliminated(experiment.process, experiment.apply, params, keys, given, "text", candidates, shape, options)

        slow = {"image": test["image"][: self.slow]}
        by_losses = in_batches(by_loss, params, example_keys(keys[2], self.slow), slow, self.batch // 10)
        metrics["diffusion_classifier_accuracy"] = accuracy(by_losses, labels[: self.slow])
        metrics["readouts_agree"] = accuracy(by_losses, found_10[: self.slow])

        clock.start("sampling", "sampling digits of captions")
        asked = conditional.labels_to_ask(train["label"], 10, self.per_class)
        quantize = experiment.modalities["image"].quantize
        sample = functools.partial(sample_batched, experiment, params, batch=self.batch, steps=steps)
        sampled = quantize(sample(keys[3], {"text": np.asarray(texts)[asked]}, len(asked), guidance=guidance)["image"])
        found = conditional.measure(
            sampled, asked, (train["image"], train["label"]), (test["image"], labels), 10, self.per_class)
        metrics["round_trip"] = accuracy(classify(align(keys[4], sampled[found.rows], steps=10)), asked[found.rows])

        clock.start("best", f"sampling {self.choose} of each caption, unguided, and keeping what is aligned with it best")
        wanted = np.repeat(np.arange(10), self.per_class)
        many = np.tile(wanted, self.choose)
        plain = quantize(sample(keys[5], {"text": np.asarray(texts)[many]}, len(many), guidance=1.0)["image"])
        score = retrieval.scores(align(keys[6], plain, steps=1, seeds=4), self.prompts)[np.arange(len(many)), many]
        chosen = score.reshape(self.choose, -1).argmax(0) * len(wanted) + np.arange(len(wanted))
        for name, rows in (("unguided_agreement", slice(len(wanted))), (f"best_of_{self.choose}_agreement", chosen)):
            metrics[name] = accuracy(classifiers.predict(found.classifier, plain[rows]), wanted)

        clock.start("costs", "timing")
        ways = {}
        few = {"image": jnp.asarray(test["image"][:100])}
        for n in (1, 10, 50):
            ways[f"{n}"] = (self.aligner.function(n), few, 100)
            if not self.aligner.net.two_way:
                ways[f"{n}_cached"] = (self.aligner.function(n, cached=True), few, 100)
        ways["diffusion_classifier"] = (by_loss, {"image": few["image"][:25]}, 25)
        seconds = costs(params, keys[7], ways)
        metrics |= {f"milliseconds_{name}": 1e3 * value for name, value in seconds.items()}
        metrics["diffusion_classifier_cost"] = seconds["diffusion_classifier"] / seconds["10"]
        clock.stop()

        show, words = experiment.modalities["image"].show, [str(label) for label in range(10)]
        sampler = f"{steps} steps, guidance {guidance:g}"
        figures = {
            **conditional.figures(show(sampled), asked, show(test["image"]), labels, words, found, sampler),
            "Image to label": Figure(
                plots.matrix(confusion(found_10, labels, 10), words, "true", "predicted"), "The alignment branch, 10 steps from noise."),
            "Predicted": Figure(
                plots.grid(show(test["image"][:40]), 10, [str(label) for label in found_10[:40]], wrong=(found_10 != labels)[:40]),
                "Held-out digits with the classes that the alignment branch predicts; wrong ones in red."),
        }
        definitions = {
            "alignment_accuracy": f"share of {len(labels)} held-out digits whose denoised vector (10 steps from noise) is nearest to the "
            "right prompt; _1, _2, ... other numbers of steps, _1_of_8 the mean of 8 seeds of one step, _guided at guidance 3",
            "alignment_accuracy_dropped": "the same without an image: chance is 0.1",
            "alignment_accuracy_shuffled": "the same answers against permuted labels: chance is 0.1",
            "diffusion_classifier_accuracy": f"by elimination, {self.stages} (draws, candidates kept), {self.slow} held-out digits",
            "readouts_agree": "share of them for which both predict the same class",
            "round_trip": "share of sampled digits for which the alignment branch predicts the class they were asked for",
            f"best_of_{self.choose}_agreement": f"the SVM's agreement with the best of {self.choose} unguided samples by the alignment "
            "branch's score; unguided_agreement with the first",
            "diffusion_classifier_cost": "its seconds per image over those of 10 steps of alignment without a cache",
        }
        settings = {"sample_steps": steps, "guidance": guidance, "evaluation_seconds": clock.seconds}
        return EvalResult(metrics, definitions, figures, settings) | found
