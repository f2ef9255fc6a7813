"""Everything that is measured of class-conditional token images, and what two simple models reach on the same tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from mmdiff.data.sources import load_all
from mmdiff.evals.evaluator import Clock, EvalResult, sample_batched
from mmdiff.evals.likelihood import held_out_bits
from mmdiff.projects.digits import conditional


@dataclasses.dataclass(frozen=True)
class ClassTokenImages:
    """The metrics and figures of a model of token images given a label: `TokenImages` whose tokens are pixels, as the digits' are.

    As many samples are made as there are training images, with their labels, and more of a class that comes up less than `per_class`
    times; see `conditional` for what is measured of them. The bound on the likelihood of the held-out images given their labels
    is compared with models fitted to the training tokens by counting (`independent_bits`, `raster_markov_bits`).

    Attributes:
      bound_steps: T, the steps of the chain whose likelihood is bounded; T + 1 network calls for every held-out image.
      tokens, label: the names of the two modalities; the label has classes 0..classes-1.
      classes: the number of classes.
      per_class: samples of every class that count for `conditional_agreement`.
      batch: examples in a call of the network or the sampler.
    """

    bound_steps: int
    tokens: str = "tokens"
    label: str = "label"
    classes: int = 10
    per_class: int = 100
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        sample_key, bound_key = jax.random.split(key)
        found = self.samples(experiment, params, sample_key, int(config.sample.steps), float(config.sample.guidance))
        train, test = load_all(experiment.train_data()), load_all(experiment.test_data())
        clock = Clock()
        clock.start("bits_per_dim", f"bounding the likelihood of {len(test[self.label])} images, {self.bound_steps + 1} calls each")
        bits = held_out_bits(experiment, params, bound_key, test, self.tokens, self.bound_steps, self.batch)
        clock.stop()
        states = experiment.modalities[self.tokens].states
        pair = train[self.tokens], test[self.tokens]
        labels = train[self.label], test[self.label]
        metrics = {
            "bits_per_dim": float(bits.mean()),
            "bits_per_dim_independent": independent_bits(*pair, states),
            "bits_per_dim_independent_class": by_class(independent_bits, *pair, *labels, states),
            "bits_per_dim_raster_markov": raster_markov_bits(*pair, states),
            "bits_per_dim_raster_markov_class": by_class(raster_markov_bits, *pair, *labels, states),
        }
        definitions = {
            "bits_per_dim": f"upper bound on -log2 p(tokens | label) per token by the chain of {self.bound_steps} steps, one draw at every "
            f"step; {len(bits)} held-out images, standard error {bits.std() / math.sqrt(len(bits)):.3f}",
            "bits_per_dim_independent": "the same, exact, of the training tokens' frequencies at each place (add-one smoothing)",
            "bits_per_dim_raster_markov": "the same, exact, of each token's frequencies given the token before it in raster order",
            "bits_per_dim_independent_class": "independent tokens, counted for each class: this one knows the label, too",
            "bits_per_dim_raster_markov_class": "raster-order Markov, counted for each class",
        }
        settings = {"bound_steps": self.bound_steps, "bound_images": len(bits), "evaluation_seconds": clock.seconds}
        return found | EvalResult(metrics, definitions, settings=settings)

    def samples(self, experiment, params, key, steps: int, guidance: float) -> EvalResult:
        """What depends on the sampler: metrics, definitions, figures and settings of one set of samples."""
        modality, name = experiment.modalities[self.tokens], experiment.modalities[self.label].show
        train, test = load_all(experiment.train_data()), load_all(experiment.test_data())
        images, test_images = (modality.images(data[self.tokens]) for data in (train, test))
        asked = conditional.labels_to_ask(train[self.label], self.classes, self.per_class)
        clock = Clock()
        clock.start("conditional_samples", f"sampling {len(asked)} examples by label in {steps} steps")
        options = {"batch": self.batch, "steps": steps, "guidance": guidance}
        tokens = sample_batched(experiment, params, key, {self.label: asked}, len(asked), **options)[self.tokens]
        sampled = modality.images(tokens)
        clock.start("classifiers", "training the independent classifier")
        real = (images, train[self.label]), (test_images, test[self.label])
        found = conditional.measure(sampled, asked, *real, self.classes, self.per_class)
        clock.stop()
        sampler = f"{steps} steps, guidance {guidance:g}"
        shown, names = modality.show(tokens), name(np.arange(self.classes))
        settings = {"sample_steps": steps, "guidance": guidance, "evaluation_seconds": clock.seconds}
        figures = conditional.figures(shown, asked, modality.show(test[self.tokens]), test[self.label], names, found, sampler)
        return EvalResult({}, figures=figures, settings=settings) | found


def independent_bits(train: np.ndarray, test: np.ndarray, states: int) -> float:
    """Mean -log2 p per token of `test` [m, L] when every place has its own distribution, counted on `train` [n, L] (add-one smoothing)."""
    counts = np.ones((train.shape[1], states))
    places = np.arange(train.shape[1])
    np.add.at(counts, (places, train), 1)
    return float(-np.log2(counts / counts.sum(-1, keepdims=True))[places, test].mean())


def raster_markov_bits(train: np.ndarray, test: np.ndarray, states: int) -> float:
    """The same when every token depends on the one before it, by a table for every place: first-order Markov in raster order."""
    counts = np.ones((train.shape[1] - 1, states, states))
    places = np.arange(train.shape[1] - 1)
    np.add.at(counts, (places, train[:, :-1], train[:, 1:]), 1)
    rest = -np.log2(counts / counts.sum(-1, keepdims=True))[places, test[:, :-1], test[:, 1:]]
    first = independent_bits(train[:, :1], test[:, :1], states)
    return float((first + rest.sum(1).mean()) / train.shape[1])


def by_class(
    bits: Callable, train: np.ndarray, test: np.ndarray, train_labels: np.ndarray, test_labels: np.ndarray, states: int
) -> float:
    """`bits(train, test, states)` counted and measured for every class by itself, averaged over `test`."""
    parts = [bits(train[train_labels == c], test[test_labels == c], states) * np.sum(test_labels == c) for c in np.unique(test_labels)]
    return float(sum(parts) / len(test_labels))
