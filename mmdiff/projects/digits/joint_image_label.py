"""Everything that is measured of a joint model of small images and labels, with one setting of the sampler."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

import jax
import numpy as np

from mmdiff.data.sources import load_all
from mmdiff.evals import plots
from mmdiff.evals.accuracy import accuracy, confusion, denoising_losses
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, best, example_keys, in_batches, predict_batched, sample_batched, states
from mmdiff.projects.digits import classifiers, conditional


@dataclasses.dataclass(frozen=True)
class JointImageLabel:
    """The metrics and figures of a joint image-label model.

    One setting of steps and guidance, that of `config.sample`, serves every metric. The training set's labels are the condition
    of the first samples, one each, so that those have its size and its class frequencies; if a class comes up less than
    `per_class` times, more are sampled. From this one set of label-conditioned samples come

    * `classification_accuracy_score` and `frechet_ratio`: as many samples as there are training images, with their labels;
    * `conditional_agreement`: the first `per_class` of every class.

    `joint_agreement` has samples of its own, `joint` of them. Before a classifier or the Fréchet distance sees a sample, its
    pixels go to the nearest level of the data (`modalities[image].quantize`), where all real images are.

    Attributes:
      image, label: the names of the two modalities; the label has classes 0..classes-1.
      classes: the number of classes.
      per_class: label-conditioned samples of every class that count for `conditional_agreement`.
      joint: joint samples.
      draws: noisy copies of an image in the diffusion classifier, for each class.
      batch: examples in a call of the network or the sampler.
    """

    image: str = "image"
    label: str = "label"
    classes: int = 10
    per_class: int = 100
    joint: int = 1000
    draws: int = 16
    batch: int = 250

    better = MappingProxyType({
        "label_accuracy": "max", "label_accuracy_diffusion_classifier": "max", "joint_agreement": "max", "conditional_agreement": "max",
        "classification_accuracy_score": "max", "frechet_ratio": "min"})

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        images, labels = (load_all(experiment.train_data())[name] for name in (self.image, self.label))
        test_images, test_labels = (load_all(experiment.test_data())[name] for name in (self.image, self.label))
        quantize = experiment.modalities[self.image].quantize
        read_key, loss_key, given_key, joint_key, unconditional_key = jax.random.split(key, 5)
        sample = functools.partial(sample_batched, experiment, params, batch=self.batch, steps=steps, guidance=guidance)
        clock = Clock()

        clock.start("label_accuracy", f"predicting the labels of {len(test_images)} images in one network call each")
        read = best("p(label | image)", predict_batched(experiment, params, read_key, {self.image: test_images}, self.label, self.batch))
        clock.start("diffusion_classifier", f"the same by denoising losses, {self.draws} x {self.classes} calls each")
        read_by_loss = best("minus the denoising losses", -self._losses(experiment, params, loss_key, test_images))

        asked = conditional.labels_to_ask(labels, self.classes, self.per_class)
        clock.start("conditional_samples", f"sampling {len(asked)} examples by label")
        sampled = quantize(sample(given_key, {self.label: asked}, len(asked))[self.image])
        clock.start("joint_samples", f"sampling {self.joint} joint samples")
        joint = sample(joint_key, {}, self.joint)
        joint_images, joint_labels = quantize(joint[self.image]), joint[self.label]
        clock.start("unconditional_samples", "sampling 100 unconditional images")
        unconditional = quantize(sample(unconditional_key, {}, 100, absent=(self.label,))[self.image])
        clock.start("chain", "keeping the states of ten trajectories")
        each = {self.label: np.arange(10, dtype=np.int32) % self.classes}
        chain = states(experiment, params, given_key, each, self.image, steps=steps, guidance=guidance)

        clock.start("classifiers", "training the independent classifier")
        found = conditional.measure(sampled, asked, (images, labels), (test_images, test_labels), self.classes, self.per_class)
        judged_joint = classifiers.predict(found.classifier, joint_images)
        metrics = {
            "label_accuracy": accuracy(read, test_labels),
            "label_accuracy_diffusion_classifier": accuracy(read_by_loss, test_labels),
            "joint_agreement": accuracy(judged_joint, joint_labels),
        }
        clock.stop()

        levels = experiment.modalities[self.image].levels
        settings = {
            "sample_steps": steps,
            "guidance": guidance,
            "test_images": len(test_images),
            "diffusion_classifier_draws": self.draws,
            "joint_agreement_samples": self.joint,
            "generated_pixels": f"clipped and rounded to the data's {levels} levels" if levels else "clipped to [-1, 1]",
            "evaluation_seconds": clock.seconds,
        }
        return found | EvalResult(
            metrics=metrics,
            definitions=self._definitions(len(test_images)),
            figures=self._figures(
                experiment,
                real=(test_images, test_labels, read),
                given=(sampled, asked, found),
                joint=(joint_images, joint_labels, judged_joint),
                unconditional=unconditional,
                chain=chain,
                sampler=f"{steps} steps, guidance {guidance:g}",
            ),
            settings=settings,
        )

    def _losses(self, experiment, params, key, images) -> np.ndarray:
        """The diffusion classifier's losses, [n, classes]."""

        def losses(params, keys, given):
            process, apply, shape = experiment.process, experiment.apply, experiment.shape
            return denoising_losses(process, apply, params, keys, given, self.label, self.classes, shape, self.draws)

        # A network call holds every class of each image.
        size = max(1, self.batch // self.classes)
        return in_batches(losses, params, example_keys(key, len(images)), {self.image: images}, size)

    def _definitions(self, test: int) -> Mapping[str, str]:
        return {
            "label_accuracy": "argmax of p(label | image): image at t = 0, label at t = 1, one network call; "
            f"{test} held-out images",
            "label_accuracy_diffusion_classifier": f"argmin over labels of the image's mean denoising loss at {self.draws} "
            f"stratified times, with the same times and noise for every label; {test} held-out images",
            "joint_agreement": f"share of {self.joint} joint samples to which an SVM trained on the real training images gives the "
            "label sampled with them",
        }

    def _figures(self, experiment, *, real, given, joint, unconditional, chain, sampler: str) -> Mapping[str, Figure]:
        show, name = experiment.modalities[self.image].show, experiment.modalities[self.label].show
        names = name(np.arange(self.classes))
        (images, labels, read), (sampled, asked, found) = real, given
        joint_images, joint_labels, judged_joint = (array[:70] for array in joint)
        result = {
            **conditional.figures(show(sampled), asked, show(images), labels, names, found, sampler),
            "Joint samples": Figure(
                plots.grid(show(joint_images), 10, name(joint_labels), wrong=judged_joint != joint_labels),
                f"Image and label sampled together; {sampler}. A label is red where the SVM sees another one.",
            ),
            "Unconditional images": Figure(plots.grid(show(unconditional), 10), f"Sampled with the label held absent (t = 1); {sampler}."),
            "From noise to image": Figure(
                plots.grid(show(chain), 10), f"States of ten trajectories, a label each, from noise, above, to the image; {sampler}."),
            "Image to label": Figure(
                plots.matrix(confusion(read, labels, self.classes), names, "true label", "label predicted by the model"),
                f"{len(labels)} held-out images, one network call each.",
            ),
        }
        wrong = np.flatnonzero(read != labels)
        if wrong.size:
            words = [f"{true} as {found}" for true, found in zip(name(labels[wrong[:30]]), name(read[wrong[:30]]))]
            result["Misclassified images"] = Figure(
                plots.grid(show(images[wrong[:30]]), 10, words),
                f"True label, then the predicted one: {min(30, wrong.size)} of {wrong.size} mistake(s).",
            )
        return result
