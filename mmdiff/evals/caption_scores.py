r"""Captions: BLEU-1 to 4 and CIDEr-D against references, and CLIP's score against the image.

The formulas are those of the COCO caption evaluation (pycocoevalcap). Its tokenizer is a Java program; `tokens` is another, hence scores
are comparable under the same tokenizer only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from mmdiff.errors import UserError

ORDERS = 4  # n-grams of 1 to 4 words
LENGTH_SIGMA = 6.0  # of CIDEr-D's penalty
SUFFIXES = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))\b")
WORDS = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|[^\W_]+(?:[-'][^\W_]+)*")


def tokens(caption: str) -> list[str]:
    """Words in lower case, as in the Penn Treebank "n't", "'s" and the like apart; hyphens stay within words; punctuation is left out.

    >>> tokens("A man's T-shirt isn't red, is it?")
    ['a', 'man', "'s", 't-shirt', 'is', "n't", 'red', 'is', 'it']
    """
    return WORDS.findall(SUFFIXES.sub(r" \1", caption.lower().replace("’", "'")))


def bleu(
    captions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Callable[[str], list[str]] = tokens
) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of a whole corpus (Papineni et al. 2002): clipped counts, and of the references the closest length (the shorter).

    Args:
      captions: one for each image. references: one or more for each image.
      tokenize: caption -> words.

    Raises:
      UserError: other counts than this, no caption.
    """
    matched, possible, length, reference_length = [0] * ORDERS, [0] * ORDERS, 0, 0
    for words, others in _tokenized(captions, references, tokenize):
        length += len(words)
        reference_length += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        counts = _ngrams(words)
        most: Counter = Counter()
        for other in others:
            most |= _ngrams(other)
        for ngram, count in counts.items():
            possible[len(ngram) - 1] += count
            matched[len(ngram) - 1] += min(count, most[ngram])
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's
    ratio = (length + tiny) / (reference_length + small)
    penalty, product, found = math.exp(min(0.0, 1 - 1 / ratio)) if length else 0.0, 1.0, []
    for n in range(ORDERS):
        product *= (matched[n] + tiny) / (possible[n] + small)
        found.append(product ** (1 / (n + 1)) * penalty)
    return tuple(found)


def cider_d(
    captions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Callable[[str], list[str]] = tokens
) -> tuple[float, np.ndarray]:
    """CIDEr-D (Vedantam et al. 2015), times 10 as always: (the mean, the score of each caption).

    How common n-grams are is counted on the references of these images: scores of other sets of images are not comparable, and of one
    image it is 0. Arguments and errors are those of `bleu`.
    """
    rows = list(_tokenized(captions, references, tokenize))
    frequency = Counter(ngram for _, others in rows for ngram in set().union(*map(_ngrams, others)))
    total = math.log(len(rows))

    def vectors(words):
        found = [{} for _ in range(ORDERS)]
        for ngram, count in _ngrams(words).items():
            found[len(ngram) - 1][ngram] = count * (total - math.log(max(1, frequency[ngram])))
        return found, [math.sqrt(sum(x * x for x in vector.values())) for vector in found], max(0, len(words) - 1)

    scores = []
    for words, others in rows:
        own, norms, bigrams = vectors(words)
        score = 0.0
        for other in map(vectors, others):
            similar = 0.0
            for mine, theirs, norm, their_norm in zip(own, other[0], norms, other[1], strict=True):
                if norm and their_norm:
                    dot = sum(min(x, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0) for ngram, x in mine.items())
                    similar += dot / (norm * their_norm)
            score += similar * math.exp(-((bigrams - other[2]) ** 2) / (2 * LENGTH_SIGMA**2)) / ORDERS
        scores.append(10 * score / len(others))
    return float(np.mean(scores)), np.array(scores)


def clip_score(images: np.ndarray, texts: np.ndarray, weight: float = 2.5) -> float:
    """The mean of weight max(cos, 0) between CLIP's vectors of images and of their captions, both [n, d].

    Hessel et al. 2021 have the weight 2.5, ViT-B/32 and captions that begin with "A photo depicts "; tables of text-to-image models often
    100, or 1, ViT-L/14 and no such words. State network, weight and words.

    >>> clip_score(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[3.0, 0.0], [0.0, -1.0]]))
    1.25

    Raises:
      UserError: two shapes, vectors that are not finite or zero.
    """
    images, texts = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    if images.shape != texts.shape or images.ndim != 2 or not len(images):
        raise UserError(f"the CLIP score takes as many vectors of texts as of images, not {list(texts.shape)} for {list(images.shape)}.")
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(wrong):
        raise UserError(f"CLIP score: {len(wrong):,} of {len(images):,} pairs, first {wrong[0]}, have vectors of zeros, NaN or infinity.")
    return float(weight * np.maximum((images * texts).sum(1) / lengths, 0).mean())


def _ngrams(words: Sequence[str]) -> Counter:
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _tokenized(captions, references, tokenize):
    if len(captions) != len(references) or not len(captions):
        raise UserError(f"captions and references must be of the same images: there are {len(captions):,} and {len(references):,}.")
    for i, (caption, others) in enumerate(zip(captions, references, strict=True)):
        if isinstance(others, str) or not others:
            raise UserError(f"the references of image {i} must be a list of one or more captions, not {others!r:.60}.")
        yield tokenize(caption), [tokenize(other) for other in others]
