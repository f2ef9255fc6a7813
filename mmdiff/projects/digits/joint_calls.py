"""Quality of joint samples against network calls, for samplers that differ in more than their steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from mmdiff.data.sources import load_all
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import EvalResult, sample_batched, say
from mmdiff.evals.frechet import frechet_ratio
from mmdiff.projects.digits import classifiers


@dataclasses.dataclass(frozen=True)
class JointCalls:
    """Two metrics of joint image-label samples, with the same keys for every sampler: name -> (as `Experiment.sample`, steps).

    * `joint_agreement_NAME`: the share of samples to which an SVM trained on the real training images gives the label sampled with them;
    * `joint_frechet_ratio_NAME`: of as many samples as there are training images, as `conditional.measure` computes it.
    """

    samplers: Mapping[str, tuple[Callable, int]]
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        train, test = load_all(experiment.train_data()), load_all(experiment.test_data())
        count, quantize = len(train["image"]), experiment.modalities["image"].quantize
        classifier = classifiers.svm(train["image"], train["label"])
        metrics, definitions = {}, {}
        for name, (sample, steps) in self.samplers.items():
            say(f"sampling {count} joint samples, {name.replace('_', ' ')}")
            other = dataclasses.replace(experiment, sample=sample)
            found = sample_batched(other, params, key, {}, count, batch=self.batch, steps=steps, guidance=float(config.sample.guidance))
            images = quantize(found["image"])
            metrics[f"joint_agreement_{name}"] = accuracy(classifiers.predict(classifier, images), found["label"])
            metrics[f"joint_frechet_ratio_{name}"] = frechet_ratio(images, test["image"], train["image"])
            definitions[f"joint_agreement_{name}"] = f"share of {count} joint samples with the label that an SVM gives their image"
            definitions[f"joint_frechet_ratio_{name}"] = (
                f"squared Fréchet distance (raw pixels) of {count} joint samples to the held-out images, over that of the training images")
        return EvalResult(metrics, definitions)
