"""What is measured of vectors of emoji and captions: by vectors that know everything, and by vectors that know nothing."""

import hashlib
import types

import jax
import numpy as np
import pytest

from mmdiff.data.sources import load_all
from mmdiff.errors import UserError
from mmdiff.projects.emoji.emoji import SPLITS, caption, emoji_source, emoji_tokenizer
from mmdiff.projects.emoji.emoji_alignment import EmojiAlignment, SentenceVectors
from tests.small_sets import emoji


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(emoji(tmp_path_factory.mktemp("emoji") / "emoji64.tar"))


def vector(text):
    """Random, but that flags of one category, even or odd numbers, are near."""
    found = np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)).normal(size=64)
    if text.startswith("flag"):
        found[int(text.split()[-1]) % 2] += 40
    return found


def test_vectors_that_know_everything_are_right_in_all_and_permuted_ones_by_chance(file):
    sources = [emoji_source(split, file) for split in SPLITS]
    images = np.concatenate([load_all(each)["image"] for each in sources])
    captions = [caption(name, tones) for each in sources for name, tones in zip(each.names, each.tones)]

    def knowing(params, key, asked):
        return np.stack([vector(captions[int(np.abs(images - image).sum((1, 2, 3)).argmin())]) for image in asked])

    def texts(params, asked):
        return np.stack([vector(text) for text in asked])

    experiment = types.SimpleNamespace(split="test")
    found = EmojiAlignment(file, knowing, texts, 200, 20)(experiment, {}, None, jax.random.key(0), 0)
    assert dict(found.metrics) == dict.fromkeys(
        ("aligned_tone", "aligned_name", "aligned_category", "aligned_image_to_text_r1", "aligned_text_to_image_r1"), 1.0)
    assert set(found.definitions) == set(found.metrics)
    without = EmojiAlignment(file, knowing, texts, 200, 0)(experiment, {}, None, jax.random.key(0), 0).metrics
    assert without.items() < found.metrics.items() and len(without) == 3  # as config.eval.candidates=0 leaves retrieval out
    alike = EmojiAlignment(file, knowing, lambda params, asked: np.ones((len(asked), 64)), 200, 0)
    assert set(alike(experiment, {}, None, jax.random.key(0), 0).metrics.values()) == {0.0}  # vectors that say nothing are right of none
    other = EmojiAlignment(file, lambda *given: np.roll(knowing(*given), 1, 0), texts, 200, 20)
    assert max(other(experiment, {}, None, jax.random.key(0), 0).metrics.values()) < 0.8


def test_the_vectors_of_an_encoder_of_sentences_are_made_once_and_have_the_size_that_is_asked_for(file):
    tokenizer, asked = emoji_tokenizer(file), []

    def encode(texts):
        asked.extend(texts)
        return {"query": np.stack([vector(text) for text in texts])}

    vectors = SentenceVectors(tokenizer, types.SimpleNamespace(encode=encode, path="minilm", fingerprint=lambda: "f"))
    found = vectors.texts(tokenizer.encode(["hand b", "dark skin, hand c", "hand b"]))[1]
    np.testing.assert_array_equal(found, [vector("hand b"), vector("dark skin, hand c"), vector("hand b")])
    np.testing.assert_array_equal(vectors.encode(["hand b"]), [vector("hand b")])
    cut = tokenizer.encode(["hand b hand c " * 9])
    np.testing.assert_array_equal(vectors.encode(["hand b hand c " * 9]), vectors.texts(cut)[1])
    assert asked.pop() == tokenizer.decode(cut)[0]
    assert sorted(asked) == ["dark skin, hand c", "hand b"] and vectors.fingerprint() == "f"
    with pytest.raises(UserError, match="64 numbers"):
        vectors.check(384)
