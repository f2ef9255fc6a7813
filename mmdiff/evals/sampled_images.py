"""The evaluator of sampled images by a published network's features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mmdiff import hosts
from mmdiff.data.encoded_modalities import EncodedLatents
from mmdiff.data.modalities import Images
from mmdiff.data.sources import Subset, load_all
from mmdiff.data.token_modalities import TokenImages
from mmdiff.errors import UserError
from mmdiff.evals.evaluator import Clock, EvalResult, sample_batched
from mmdiff.evals.sample_metrics import NETWORKS, collect, compare, convention, open_network


@dataclasses.dataclass(frozen=True)
class SampleMetrics:
    """FID and its kin (`sample_metrics`) of samples with the conditions of held-out images, against these images.

    Latents and tokens are decoded, the held-out ones, too: the autoencoder's own errors are on both sides, and no part of the distance.

    What has the suffix `_real` is that of as many training images in the place of the samples: what a perfect model would reach.

    Attributes:
      encoder: {"kind": of `sample_metrics.NETWORKS`, "path": of its weights}; without a path EfficientNet-Lite0's of the extra `features`.
      target: the modality of the images. condition: what samples are given, "" for nothing.
      most: the most held-out images, and as many samples.
      batch: examples in a call of the model.
    """

    encoder: Mapping[str, str]
    target: str = "image"
    condition: str = ""
    most: int = 500
    batch: int = 64

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        modality = experiment.modalities[self.target]
        decoded = isinstance(modality, TokenImages) or isinstance(modality, EncodedLatents) and bool(modality.encoder.path)
        if not decoded and not isinstance(modality, Images):
            raise UserError(f"features of images are measured of images, or of what an autoencoder decodes: {self.target} is neither.")
        kind = self.encoder["kind"]
        encoder = open_network(kind, self.encoder.get("path", ""))
        test = load_all(Subset(experiment.test_data(), self.most))
        count = len(test[self.target])
        train = load_all(Subset(experiment.train_data(), count))  # as many: distances depend on counts
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        clock = Clock()
        clock.start("feature_samples", f"{count} samples, {steps} steps")
        given = {self.condition: test[self.condition]} if self.condition else {}
        sampled = sample_batched(experiment, params, key, given, count, batch=self.batch, steps=steps, guidance=guidance)[self.target]
        clock.start("features", f"features of {kind} of samples, held-out and training images")
        held, made, real = (collect(encoder, _shown(modality, images)) for images in (test[self.target], sampled, train[self.target]))
        metrics, definitions, settings = compare(kind, made, held)
        limits, texts, _ = compare(kind, real, held)
        for name in limits:
            if not name.endswith(("_bias", "_std")):
                metrics[f"{name}_real"] = limits[name]
                definitions[f"{name}_real"] = f"the same of training images in the place of samples: {texts[name]}"
        clock.stop()
        own = {NETWORKS[kind].distance: {**convention(encoder), **settings, "decoded": decoded}}
        return EvalResult(metrics, definitions, {}, {**own, "evaluation_seconds": clock.seconds})


def sample_metrics(encoder: Mapping[str, str], **options) -> tuple[SampleMetrics, ...]:
    """The evaluators of a config's `eval.encoder`: none while its kind is ""."""
    return (SampleMetrics(dict(encoder), **options),) if encoder["kind"] else ()


def _shown(modality: Images, images: np.ndarray, at_once: int = 1024):
    """This process's part of the images as people see them, some at a time."""
    mine = hosts.part(len(images))
    images = images[mine.start : mine.stop]
    for start in range(0, len(images), at_once):
        shown = modality.show(images[start : start + at_once])
        yield np.broadcast_to(shown, (*shown.shape[:-1], 3))
