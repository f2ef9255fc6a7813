import hashlib
import itertools

import numpy as np
import pytest

from mmdiff.errors import UserError
from mmdiff.projects.markov import markov_chains
from mmdiff.projects.markov.markov_chains import Chains, chains, markov_source

CHAINS = chains()


def tiny(length=5, states=3, classes=2):
    rng = np.random.default_rng(0)
    return Chains(rng.dirichlet(np.ones(states), classes), rng.dirichlet(np.ones(states), (classes, states)), length)


def every(tiny):
    return np.array(list(itertools.product(range(tiny.states), repeat=tiny.length)))


def test_chains_are_stationary_laws():
    assert CHAINS.initial.shape == (10, 16) and CHAINS.transition.shape == (10, 16, 16)
    np.testing.assert_allclose(CHAINS.transition.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(CHAINS.initial.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.einsum("cs,csr->cr", CHAINS.initial, CHAINS.transition), CHAINS.initial, rtol=1e-9)
    assert CHAINS.transition.min() > 0


def test_likelihood_is_the_product_of_transitions_and_sums_to_one():
    chain = tiny()
    tokens = every(chain)
    found = chain.log_likelihood(tokens)
    row = tokens[77]
    expected = chain.initial[1, row[0]] * np.prod([chain.transition[1, a, b] for a, b in zip(row, row[1:])])
    assert np.exp(found[77, 1]) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(np.exp(found).sum(0), 1, rtol=1e-12)
    posterior = chain.posterior(tokens)
    np.testing.assert_allclose(posterior, np.exp(found) / np.exp(found).sum(1, keepdims=True), rtol=1e-9)


def test_entropy_is_the_expected_loss():
    chain = tiny()
    log_p = chain.log_likelihood(every(chain))
    np.testing.assert_allclose(chain.entropy, -(np.exp(log_p) * log_p).sum(0), rtol=1e-12)


def test_order_gain_is_the_mean_over_all_shuffles():
    chain = tiny(length=6)
    rng = np.random.default_rng(1)
    tokens, labels = rng.integers(0, 3, (4, 6)), np.array([0, 1, 1, 0])
    log_p = chain.log_likelihood(tokens)[np.arange(4), labels]
    shuffled = [tokens.reshape(4, 3, 2)[:, list(order)].reshape(4, 6) for order in itertools.permutations(range(3))]
    mean = np.mean([chain.log_likelihood(x)[np.arange(4), labels] for x in shuffled], 0)
    np.testing.assert_allclose(chain.order_gain(tokens, labels, chunks=3), log_p - mean, rtol=1e-9)
    for chunks in (1, 4):
        with pytest.raises(ValueError, match="equal chunks"):
            chain.order_gain(tokens, labels, chunks=chunks)


def test_classes_are_distinguishable_but_overlap():
    data = markov_source("test", 10_000).arrays
    found = CHAINS.posterior(data["tokens"]).argmax(1)
    assert 0.93 < np.mean(found == data["label"]) < 0.97
    own = CHAINS.log_likelihood(data["tokens"])[np.arange(10_000), data["label"]]
    assert -own.mean() == pytest.approx(CHAINS.entropy.mean(), rel=0.003)
    same = chains(own=0.0)
    np.testing.assert_allclose(same.transition, np.broadcast_to(same.transition[:1], same.transition.shape))


def test_samples_follow_the_chains():
    data = markov_source("train", 50_000).arrays
    tokens = data["tokens"][data["label"] == 3]
    first = np.bincount(tokens[:, 0], minlength=16) / len(tokens)
    assert np.abs(first - CHAINS.initial[3]).max() < 0.02
    pairs = np.zeros((16, 16))
    np.add.at(pairs, (tokens[:, :-1], tokens[:, 1:]), 1)
    assert np.abs(pairs / pairs.sum() - CHAINS.bigrams[3]).max() < 0.002


def test_example_i_is_a_function_of_i():
    small, large = (markov_source("train", count).arrays for count in (100, 1000))
    for name in ("tokens", "label"):
        np.testing.assert_array_equal(small[name], large[name][:100])
        assert small[name].dtype == np.int32
    for split in ("validation", "test"):
        assert (markov_source(split, 100).arrays["tokens"] != small["tokens"]).any(1).all()
    np.testing.assert_array_equal(large["label"][:12], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    assert len(markov_source("validation")) == len(markov_source("test")) == 2000


def test_examples_are_pinned_for_all_versions_of_numpy():
    found = markov_source("train", 2).arrays["tokens"][:, :8]
    np.testing.assert_array_equal(found, [[13, 10, 10, 7, 13, 2, 13, 6], [7, 9, 0, 10, 8, 15, 5, 1]])
    tested = markov_source("test").arrays["tokens"]
    assert hashlib.sha256(tested.tobytes()).hexdigest()[:16] == "2755d4c54d4ab5d6"  # as before there was a validation split


def test_refusals():
    with pytest.raises(UserError, match="no split 'valid'.*train, validation, test"):
        markov_source("valid")
    with pytest.raises(UserError, match="one example or more"):
        markov_source("test", 0)
    with pytest.raises(UserError, match="lies in"):
        chains(own=1.5)
    for wrong in (np.zeros((2, 31), int), np.zeros((2, 32)), np.full((2, 32), 16), np.full((2, 32), -1)):
        with pytest.raises(ValueError, match="these chains have"):
            CHAINS.log_likelihood(wrong)


def test_uniforms_reach_both_ends():
    chain = tiny()
    ends = np.array([[0.0] * 5, [1 - 2.0**-53] * 5])
    np.testing.assert_array_equal(chain.sample(np.array([0, 0]), ends), [[0] * 5, [2] * 5])
    assert markov_chains._uniforms("test", (1000,)).max() < 1
