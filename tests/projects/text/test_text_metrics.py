"""Bits per character: of n-grams with known values, of a compressor, and of a model whose bound is exact."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.data import Texts, bpe
from mmdiff.data.sources import ArraySource
from mmdiff.experiment import Experiment
from mmdiff.processes import Joint, absorbing
from mmdiff.projects.text.text_metrics import Ngrams, TextMetrics, xz_bits


def test_unigrams_are_frequencies_with_a_uniform_rest():
    # 3 a, 1 b, 1 end of 5; 3 kinds, so p(a) = (3 + 3 / 3) / (5 + 3).
    p = {"a": 4 / 8, "b": 2 / 8, "\n": 2 / 8}
    assert sum(p.values()) == 1
    assert Ngrams(["aaab"], 1).bits(["ab"]) == pytest.approx(-sum(map(math.log2, p.values())) / 3)


def test_ngrams_are_distributions_and_longer_ones_know_more():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(["ab", "cd", "e"], 30)) for _ in range(20)]
    grams = Ngrams(texts, 3)
    for context in ("\n\n", "ab", "zz"):  # known ones, and one that never occurred
        assert sum(grams._p(context, each) for each in "abcde\n") == pytest.approx(1)
    assert grams.bits(texts) < Ngrams(texts, 2).bits(texts) < Ngrams(texts, 1).bits(texts)
    assert Ngrams(texts, 2).bits(["zzz"]) > 5  # a character that never occurred is dear, and possible


def test_a_compressor_needs_little_for_what_it_has_read():
    rng = np.random.default_rng(0)
    one, other = (["".join(rng.choice(list("abcdefgh"), 2000))] for _ in range(2))
    assert xz_bits(one, one) < 0.3 and 2.9 < xz_bits(one, other) < 4  # 3 bits for each of eight letters


def test_the_bound_of_a_flat_network_is_that_of_flat_ids():
    texts = ["return the value of x", "return none", "set the value"]
    tokenizer = bpe.train(texts, length=12, size=300)
    source = ArraySource({"text": tokenizer.encode(texts)})
    process = Joint(text=absorbing(tokenizer.size))
    experiment = Experiment(
        process=process, modalities={"text": Texts(tokenizer)}, loss=None, optimizer=None, data=lambda split: source,
        init=lambda key: {}, apply=lambda params, x, t: {"text": jnp.zeros((*x["text"].shape, tokenizer.size))})
    config = SimpleNamespace(sample=SimpleNamespace(steps=3, guidance=1.0))
    metrics = TextMetrics(draws=64, samples=4, batch=3)(experiment, {}, config, jax.random.key(0), 0).metrics
    characters = sum(len(text) + 1 for text in texts)
    assert metrics["bits_per_character"] == pytest.approx(3 * 12 * math.log2(tokenizer.size) / characters, rel=0.02)
    assert metrics["known_words_data"] == 1 and metrics["known_words"] < 0.5 and metrics["copied"] == 0
    assert metrics["bits_per_character_5gram"] < metrics["bits_per_character_unigram"] < metrics["sample_bits_5gram"]
