"""The evaluator of sampled images by a published network's features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdiff import hosts
from mmdiff.data.encoded_modalities import EncodedLatents
from mmdiff.data.modalities import Images
from mmdiff.data.sources import Subset, load_all
from mmdiff.data.token_modalities import TokenImages
from mmdiff.encoders.published_networks import Encoder
from mmdiff.errors import UserError
from mmdiff.evals.evaluator import Clock, EvalResult, sample_batched, say
from mmdiff.evals.image_sets import open_reference
from mmdiff.evals.sample_metrics import NETWORKS, SPLITS, Collected, K, collect, compare, convention, of_reference, open_network


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
      steps: of the sampler; 0 for config.sample.steps.
      reference: images or statistics in a file, in the place of the held-out images (`image_sets.open_reference`).
      limits: whether training images are measured, too.
    """

    encoder: Mapping[str, str]
    target: str = "image"
    condition: str = ""
    most: int = 500
    batch: int = 64
    steps: int = 0
    reference: str = ""
    limits: bool = True

    @property
    def better(self) -> dict[str, str]:
        """What may say which weights are best: metric -> "min" or "max"."""
        network = NETWORKS[self.encoder["kind"]]
        least = [network.distance, *([f"s{network.distance}"] if network.spatial else []), f"{network.prefix}KID"]
        return dict.fromkeys(least, "min") | dict.fromkeys((f"{network.prefix}{name}" for name in ("IS", "precision", "recall")), "max")

    def prepared(self, experiment, config) -> PreparedSampleMetrics:
        """The evaluator with its network opened and the reference measured: what can be missing is missed here."""
        modality, kind = experiment.modalities[self.target], self.encoder["kind"]
        decoded = isinstance(modality, TokenImages) or isinstance(modality, EncodedLatents) and bool(modality.encoder.path)
        if not decoded and not isinstance(modality, Images):
            raise UserError(f"features of images are measured of images, or of what an autoencoder decodes: {self.target} is neither.")
        encoder = open_network(kind, self.encoder.get("path", ""))
        sets = open_reference(self.reference) if self.reference else None
        test = load_all(Subset(experiment.test_data(), self.most))
        count = len(test[self.target])
        held = of_reference(encoder, *sets) if sets else collect(encoder, _shown(modality, test[self.target]))
        limits, texts = {}, {}
        if self.limits:
            train = load_all(Subset(experiment.train_data(), count))  # as many: distances depend on counts
            limits, texts, _ = compare(kind, collect(encoder, _shown(modality, train[self.target])), held)
            limits = {name: value for name, value in limits.items() if not name.endswith(("_bias", "_std"))}
        given = {self.condition: test[self.condition]} if self.condition else {}
        settings = {**convention(encoder), "decoded": decoded, **({"reference": self.reference} if sets else {})}
        return PreparedSampleMetrics(self, encoder, given, count, held, {name: (limits[name], texts[name]) for name in limits}, settings)

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        say(f"features of {self.encoder['kind']} of what samples are compared with")
        return self.prepared(experiment, config)(experiment, params, config, key, step)


@dataclasses.dataclass(frozen=True)
class PreparedSampleMetrics:
    """`SampleMetrics.prepared`: what is left to do is to sample and to compare."""

    of: SampleMetrics
    encoder: Encoder
    given: Mapping[str, np.ndarray]
    count: int
    reference: Collected
    limits: Mapping[str, tuple[float, str]]
    settings: Mapping[str, Any]

    @property
    def better(self) -> dict[str, str]:
        """`SampleMetrics.better`, as far as the counts and the reference allow them."""
        network, features = NETWORKS[self.encoder.kind], self.reference.features
        missing = set() if self.count >= SPLITS else {f"{network.prefix}IS"}
        if features is None or min(self.count, len(features)) <= K:
            missing |= {f"{network.prefix}{name}" for name in ("precision", "recall", *(["KID"] if features is None else []))}
        if "mu_s" not in self.reference.moments:
            missing.add(f"s{network.distance}")
        return {name: way for name, way in self.of.better.items() if name not in missing}

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        of, kind = self.of, self.encoder.kind
        steps, guidance = of.steps or int(config.sample.steps), float(config.sample.get("guidance", 1.0))
        clock = Clock()
        clock.start("feature_samples", f"{self.count} samples, {steps} steps")
        sampled = sample_batched(experiment, params, key, self.given, self.count, batch=of.batch, steps=steps, guidance=guidance)[of.target]
        clock.start("features", f"features of {kind} of the samples")
        modality = experiment.modalities[of.target]
        metrics, definitions, settings = compare(kind, collect(self.encoder, _shown(modality, sampled)), self.reference)
        clock.stop()
        for name, (value, text) in self.limits.items():
            metrics[f"{name}_real"] = value
            definitions[f"{name}_real"] = f"the same of training images in the place of samples: {text}"
        settings = {**self.settings, **settings, "steps": steps, "guidance": guidance}
        return EvalResult(metrics, definitions, {}, {NETWORKS[kind].distance: settings, "evaluation_seconds": clock.seconds})


def sample_metrics(encoder: Mapping[str, str], **options) -> tuple[SampleMetrics, ...]:
    """The evaluators of a config's `eval.encoder`: none while its kind is ""."""
    return (SampleMetrics(dict(encoder), **options),) if encoder["kind"] else ()


def evaluators_of(options: Mapping[str, Any], **more) -> dict[str, tuple[SampleMetrics, ...]]:
    """The `evaluators` and `in_loop` of an experiment whose config has a section `eval` with encoder, reference, batch, most, and in_loop
    with most and steps; `more` options of all."""
    of_both = {"batch": options["batch"], "reference": options["reference"], **more}
    return {
        "evaluators": sample_metrics(options["encoder"], most=options["most"], **of_both),
        "in_loop": sample_metrics(options["encoder"], limits=False, **of_both, **options["in_loop"])}


def _shown(modality: Images, images: np.ndarray, at_once: int = 1024):
    """This process's part of the images as people see them, some at a time."""
    mine = hosts.part(len(images))
    images = images[mine.start : mine.stop]
    for start in range(0, len(images), at_once):
        shown = modality.show(images[start : start + at_once])
        yield np.broadcast_to(shown, (*shown.shape[:-1], 3))
