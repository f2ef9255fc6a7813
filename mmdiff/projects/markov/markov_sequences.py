"""Everything that is measured of class-conditional sequences whose law is known: each metric of the samples with that of real data."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from mmdiff.data.sources import load_all
from mmdiff.evals.accuracy import accuracy
from mmdiff.evals.evaluator import Clock, EvalResult, best, sample_batched
from mmdiff.evals.likelihood import held_out_bits
from mmdiff.projects.markov.markov_chains import Chains


@dataclasses.dataclass(frozen=True)
class MarkovSequences:
    """The metrics of a model of the sequences of `projects.markov.markov_chains`, given their class.

    There is one sample for every held-out sequence, of its class, so that both sets have one size and one law of classes and each metric
    `x` of the samples can be read against `x_data`.

    Attributes:
      chains: what the data were sampled from.
      bound_steps: T, the steps of the chain whose likelihood is bounded; T + 1 network calls for every held-out sequence.
      tokens, label: the names of the two modalities.
      batch: examples in a call of the network or the sampler.
    """

    chains: Chains
    bound_steps: int
    tokens: str = "tokens"
    label: str = "label"
    batch: int = 500

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        sample_key, bound_key = jax.random.split(key)
        found = self.samples(experiment, params, sample_key, int(config.sample.steps), float(config.sample.guidance))
        test = load_all(experiment.test_data())
        real, _ = self._measure(test[self.tokens], test[self.label])
        clock = Clock()
        clock.start("bits_per_dim", f"bounding the likelihood of {len(test[self.label])} sequences, {self.bound_steps + 1} calls each")
        bits = held_out_bits(experiment, params, bound_key, test, self.tokens, self.bound_steps, self.batch)
        clock.stop()
        entropy = float(self.chains.entropy[test[self.label]].mean() / self.chains.length)
        metrics = {f"{name}_data": value for name, value in real.items()}
        metrics |= {"entropy": entropy, "bits_per_dim": float(bits.mean()), "bits_per_dim_limit": real["nll"] / math.log(2)}
        definitions = {f"{name}_data": f"the same for the {len(bits)} held-out sequences" for name in real}
        definitions["entropy"] = "the exact expectation of nll_data, nats per token"
        definitions["bits_per_dim"] = (
            f"upper bound on -log2 p(tokens | label) per token by the chain of {self.bound_steps} steps, one draw at every step; "
            f"{len(bits)} held-out sequences, standard error {bits.std() / math.sqrt(len(bits)):.4f}"
        )
        definitions["bits_per_dim_limit"] = "the same for the chains themselves: nll_data in bits"
        settings = {"bound_steps": self.bound_steps, "evaluation_seconds": clock.seconds}
        return found | EvalResult(metrics, definitions, settings=settings)

    def samples(self, experiment, params, key, steps: int, guidance: float) -> EvalResult:
        """What depends on the sampler: metrics, definitions and settings of one set of samples."""
        asked = load_all(experiment.test_data())[self.label]
        clock = Clock()
        clock.start("conditional_samples", f"sampling {len(asked)} examples by label in {steps} steps")
        options = {"batch": self.batch, "steps": steps, "guidance": guidance}
        tokens = sample_batched(experiment, params, key, {self.label: asked}, len(asked), **options)[self.tokens]
        clock.stop()
        metrics, definitions = self._measure(tokens, asked)
        settings = {"sample_steps": steps, "guidance": guidance, "samples": len(asked), "evaluation_seconds": clock.seconds}
        return EvalResult(metrics, definitions, settings=settings)

    def _measure(self, tokens: np.ndarray, labels: np.ndarray) -> tuple[dict[str, float], dict[str, str]]:
        """Metrics of sequences [n, L] that are said to be of the classes `labels`, and their definitions."""
        chains, count = self.chains, len(tokens)
        log_p = chains.log_likelihood(tokens)
        own = log_p[np.arange(count), labels]
        metrics = {
            "correspondence": accuracy(best("log p(sample | label)", log_p), labels),
            "nll": float(-own.mean() / chains.length),
            "bigram_distance": bigram_distance(chains, tokens, labels),
            "order_gain": float(chains.order_gain(tokens, labels).mean()),
        }
        definitions = {
            "correspondence": f"share of {count} label-conditioned samples to which Bayes' rule with the true chains gives their label",
            "nll": "mean -log p(sample | its label) under the true chains, nats per token: lower than the data's is too safe, not better",
            "bigram_distance": "total variation between the samples' pairs of neighbours and the true law of pairs, mean over the classes",
            "order_gain": "what the order of eight chunks of a sample is worth under its chain, nats per sample: 0 for shuffled ones",
        }
        return metrics, definitions


def bigram_distance(chains: Chains, tokens: np.ndarray, labels: np.ndarray) -> float:
    """`1/2 sum_ab |f_c(a, b) - pi_c[a] P_c[a, b]|`, f_c the frequencies of neighbours in the sequences [n, L] of class c; mean over c.

    Frequencies of finitely many pairs are never exact: compare with that of as many real sequences.
    """
    counts = np.zeros_like(chains.transition)
    np.add.at(counts, (labels[:, None], tokens[:, :-1], tokens[:, 1:]), 1)
    there = np.unique(labels)
    frequencies = counts[there] / counts[there].sum((1, 2), keepdims=True)
    return float(np.abs(frequencies - chains.bigrams[there]).sum((1, 2)).mean() / 2)
