"""MiniLM with its real weights, where they are: similar sentences have similar vectors."""

import jax
import numpy as np
import pytest
import real_weights

from mmdiff.encoders import open_encoder, open_tokenizer

SENTENCES = (
    "a small red seven on a blue background", "a large green three", "the stock market fell sharply today",
    "a little seven, painted red, in front of something blue")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return real_weights.minilm(tmp_path_factory.mktemp("minilm"))


def test_cosines_of_sentences_are_those_of_the_published_network(folder):
    encoder, tokenizer = open_encoder("sentence_bert", folder), open_tokenizer("sentence_bert", folder, length=32)
    ids = tokenizer.encode(SENTENCES)
    vectors = jax.jit(encoder.net.apply, static_argnames="method")({"params": encoder.params}, ids, tokenizer.mask(ids), method="encode")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosines = vectors[:1] @ vectors[1:].T
    np.testing.assert_allclose(cosines[0, :2], [0.381064, 0.021904], atol=2e-6)
    assert cosines[0, 2] > 0.7  # a paraphrase
