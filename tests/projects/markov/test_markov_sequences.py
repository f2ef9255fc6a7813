import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.data.modalities import Labels
from mmdiff.data.sources import load_all
from mmdiff.data.token_modalities import Sequences
from mmdiff.experiment import Experiment
from mmdiff.processes import Given, Joint, absorbing
from mmdiff.projects.markov.markov_chains import chains, markov_source
from mmdiff.projects.markov.markov_sequences import MarkovSequences, bigram_distance

CONFIG = types.SimpleNamespace(sample=types.SimpleNamespace(steps=4, guidance=1.0))
CHAINS = chains()
TEST = markov_source("test", 1000)


def experiment(shift=0, shuffled=False, sharp=1.0):
    """A model that samples the chain of class label + shift (to the power `sharp`), and believes in independent tokens."""
    first, then = jnp.log(jnp.asarray(CHAINS.initial)) * sharp, jnp.log(jnp.asarray(CHAINS.transition)) * sharp

    def one(key, label):
        keys = jax.random.split(key, 33)
        start = jax.random.categorical(keys[0], first[label])

        def body(last, key):
            following = jax.random.categorical(key, then[label, last])
            return following, following

        tokens = jnp.concatenate([start[None], jax.lax.scan(body, start, keys[1:32])[1]])
        pieces = tokens.reshape(8, 4)
        return (pieces[jax.random.permutation(keys[32], 8)] if shuffled else pieces).reshape(32).astype(jnp.int32)

    def sample(params, keys, given, *, steps, guidance, absent=()):
        return {"tokens": jax.vmap(one)(keys, (given["label"] + shift) % 10), **given}

    def apply(params, x, t):
        return {"tokens": jnp.broadcast_to(params[jnp.minimum(x["label"], 9)][:, None], (len(x["label"]), 32, 16))}

    return Experiment(
        process=Joint(tokens=absorbing(16), label=Given(null=10)),
        init=None,
        apply=apply,
        loss=None,
        optimizer=None,
        train_data=lambda: markov_source("train", 1000),
        validation_data=None,
        test_data=lambda: TEST,
        shape={"tokens": (32,), "label": ()},
        sample=sample,
        modalities={"tokens": Sequences(32, 16), "label": Labels(10)},
    )


def samples(**options):
    return MarkovSequences(CHAINS, bound_steps=1).samples(experiment(**options), None, jax.random.key(0), 4, 1.0).metrics


def test_exact_samples_measure_as_the_data_do():
    params = jnp.log(jnp.asarray(CHAINS.initial, jnp.float32))
    found = MarkovSequences(CHAINS, bound_steps=20)(experiment(), params, CONFIG, jax.random.key(0), 7)
    metrics = found.metrics
    assert set(metrics) == set(found.definitions) and all(isinstance(value, float) for value in metrics.values())
    assert metrics["correspondence"] == pytest.approx(metrics["correspondence_data"], abs=0.03)
    assert 0.92 < metrics["correspondence_data"] < 0.97
    assert metrics["nll"] == pytest.approx(metrics["entropy"], rel=0.01)
    assert metrics["nll_data"] == pytest.approx(metrics["entropy"], rel=0.01)
    assert metrics["bigram_distance"] == pytest.approx(metrics["bigram_distance_data"], rel=0.1)
    assert metrics["order_gain"] == pytest.approx(metrics["order_gain_data"], rel=0.1)
    # The bound of independent tokens in their stationary law: its entropy, above the chains'.
    independent = -(CHAINS.initial * np.log2(CHAINS.initial)).sum(-1).mean()
    assert metrics["bits_per_dim"] == pytest.approx(independent, rel=0.01)
    assert metrics["bits_per_dim"] > metrics["bits_per_dim_limit"] + 0.05
    assert found.settings["samples"] == 1000


def test_another_class_is_found_out():
    metrics = samples(shift=1)
    assert metrics["correspondence"] < 0.03 and metrics["nll"] > CHAINS.entropy.mean() / 32 + 0.1


def test_shuffled_chunks_are_found_out():
    assert abs(samples(shuffled=True)["order_gain"]) < 0.25 < 2.5 < samples()["order_gain"]


def test_safe_samples_are_too_likely_and_far_from_the_law_of_pairs():
    exact, sharp = samples(), samples(sharp=2.0)
    assert sharp["nll"] < exact["nll"] - 0.2 and sharp["bigram_distance"] > 1.5 * exact["bigram_distance"]
    assert sharp["correspondence"] >= exact["correspondence"]


def test_bigram_distance():
    data = markov_source("train", 50_000).arrays
    large, small = (bigram_distance(CHAINS, data["tokens"][:n], data["label"][:n]) for n in (50_000, 500))
    assert large < 0.02 < small
    constant = bigram_distance(CHAINS, np.zeros((1, 32), int), np.array([4]))
    assert constant == pytest.approx(1 - CHAINS.bigrams[4, 0, 0])
    assert len(load_all(TEST)["label"]) == 1000
