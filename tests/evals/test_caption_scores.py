"""BLEU and CIDEr-D by the values of pycocoevalcap's own scorers, and CLIP's score."""

import numpy as np
import pytest

from mmdiff.errors import UserError
from mmdiff.evals.caption_scores import bleu, cider_d, clip_score, tokens

CAPTIONS = ["a man rides a horse", "two cats sleep on a sofa", "a red bus on the street"]
REFERENCES = [
    ["a man rides a brown horse", "a person is riding a horse"],
    ["two cats sleep on a sofa"],
    ["a bus drives down the street", "the red bus is on a street"],
]


def test_captions_with_published_values():
    assert bleu(CAPTIONS, REFERENCES, str.split) == pytest.approx((0.942873144, 0.835767715, 0.710876795, 0.641507252), abs=1e-9)
    mean, each = cider_d(CAPTIONS, REFERENCES, str.split)
    assert mean == pytest.approx(5.439309247, abs=1e-9)
    assert each == pytest.approx([3.787116, 10, 2.530812], abs=1e-6)


def test_captions_that_are_their_references():
    own = [[caption] for caption in CAPTIONS]
    assert bleu(CAPTIONS, own) == pytest.approx((1,) * 4, abs=1e-6)
    assert cider_d(CAPTIONS, own)[0] == pytest.approx(10)
    assert cider_d(CAPTIONS[:1], own[:1])[0] == 0  # every n-gram is in every image


def test_what_captions_lack():
    assert bleu(["a cat"], [["a cat sleeps here"]])[0] == pytest.approx(np.exp(-1), rel=1e-6)  # half as long
    assert bleu([""], [["a cat"]]) == (0.0,) * 4
    assert cider_d(["", "a dog"], [["a cat"], ["a dog"]])[1][0] == 0
    assert bleu(["the the the the"], [["the cat", "the dog"]])[0] == pytest.approx(0.25, rel=1e-6)  # counts are clipped


def test_tokens_are_words_without_punctuation():
    assert tokens("Two dogs' toys -- it’s (really) 3 o'clock; they can't!") == [
        "two", "dogs", "toys", "it", "'s", "really", "3", "o'clock", "they", "ca", "n't"]  # fmt: skip
    assert bleu(["A man rides a horse."], [["a man, rides a horse"]]) == pytest.approx((1,) * 4, abs=1e-6)


def test_clip_score_of_known_angles():
    image = np.array([[3.0, 4.0]])
    assert clip_score(image, image) == pytest.approx(2.5)
    assert clip_score(image, -image) == 0
    assert clip_score(image, np.array([[2.0, 0.0]]), weight=100) == pytest.approx(60)


@pytest.mark.parametrize("call, sentence", [
    (lambda: bleu(CAPTIONS, REFERENCES[:2]), "there are 3 and 2"),
    (lambda: cider_d([], []), "there are 0 and 0"),
    (lambda: bleu(["a"], ["a cat"]), "the references of image 0 must be a list of one or more captions, not 'a cat'"),
    (lambda: clip_score(np.ones((2, 3)), np.ones((1, 3))), r"not \[1, 3\] for \[2, 3\]"),
    (lambda: clip_score(np.ones((2, 3)), np.array([[1, 1, 1], [np.nan, 0, 0]])), "1 of 2 pairs, first 1"),
])  # fmt: skip
def test_bad_captions_and_vectors_are_sentences(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
