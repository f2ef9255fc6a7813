r"""Alignment: a vector denoised given an image against the vectors of candidate texts, and retrieval in both directions.

    vectors = align(process, apply, params, keys, {"image": images}, shape, steps=10, seeds=4)      [n, D]
    best("scores", scores(vectors, class_vectors(encode, names, templates)))                         zero-shot classes
    recalls(scores(vectors, captions), relevant)                                                     Recall@K both ways

An image is denoised once, whatever the number of candidates. The trajectory starts from noise and never sees a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import sampling
from mmdiff.errors import UserError
from mmdiff.evals.evaluator import finite
from mmdiff.matching import l2_normalize
from mmdiff.processes.base import Joint, fold


def align(
    process: Joint,
    apply: Callable,
    params: Any,
    keys: jax.Array,
    given: Mapping[str, jax.Array],
    shape: Mapping[str, tuple[int, ...]],
    *,
    target: str = "query",
    steps: int = 10,
    seeds: int = 1,
    guidance: float = 1.0,
    drop: Sequence[str] = (),
) -> jax.Array:
    """The unit vectors [n, D] that `target` is denoised to from pure noise with `given`.

    The belief is normalised at every step, after guidance and before the step uses it: a loss of cosines leaves its length free. Over
    seeds the unit vectors are averaged, and the mean normalised: a mean of the answers, where one draw may be any of them.

    Args:
      process, apply, params, keys, given, shape: as in `sampling.sample`. With `nets.with_image_cache` the process is that of the
        target alone and nothing is given.
      steps: network calls a seed. seeds: independent trajectories.
      guidance, drop: as in `sampling.guided`: 1 is none, the paper's w is guidance - 1.
    """
    network = apply if guidance == 1 else sampling.guided(apply, guidance, drop, process)
    grid, transforms = sampling.uniform_grid(steps), [sampling.only(target, unit_belief())]

    def trajectory(seed):
        own = fold(keys, seed)
        return l2_normalize(sampling.sample(process, network, params, own, grid, shape, given=given, transforms=transforms)[target])

    return l2_normalize(jax.lax.map(trajectory, jnp.arange(seeds)).mean(0))


def unit_belief() -> sampling.Transform:
    """A map that gives the belief about a vector length 1."""
    return lambda move: move.corrected(l2_normalize(move.x0))


def scores(vectors: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Cosines [n, m] of vectors [n, D] and candidates [m, D], in float64. Raises UserError if some are not finite.

    >>> scores(np.array([[2.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))
    array([[ 1.,  0., -1.]])
    """
    vectors, candidates = finite("vectors", vectors), finite("candidates", candidates)
    vectors, candidates = (np.asarray(array, np.float64) for array in (vectors, candidates))
    lengths = [np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), 1e-12) for array in (vectors, candidates)]
    return (vectors / lengths[0]) @ (candidates / lengths[1]).T


def ensemble(vectors: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
    """[classes, wordings, D] -> [classes, D]: the mean of the unit vectors of one class' wordings, normalised.

    Args:
      vectors: of the texts.
      names: of the classes, for messages; by default their numbers.

    Raises:
      UserError: vectors that are not finite; a class without a direction, as a text is a vector of zeros or the texts cancel out.
    """
    vectors = np.asarray(finite("texts", vectors), np.float64)
    scale = np.abs(vectors).max(-1, keepdims=True, initial=0)  # so that no square overflows
    vectors = vectors / np.where(scale > 0, scale, 1)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    mean = (vectors / np.where(lengths > 0, lengths, 1)).mean(-2)
    norm = np.linalg.norm(mean, axis=-1, keepdims=True)
    wrong = np.argwhere((lengths == 0).any((-2, -1)) | (norm < 1e-6)[..., 0])  # float32 embeddings leave 1e-8 of opposites
    if len(wrong):
        first = int(wrong[0][-1])
        name = repr(names[first]) if len(names) else str(first)
        why = "a text of it has a vector of zeros" if (lengths[tuple(wrong[0])] == 0).any() else "the vectors of its texts cancel out"
        raise UserError(f"texts: the class {name} has no direction, as {why}: choose other templates, or check the text encoder.")
    return mean / norm


def class_vectors(encode: Callable, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """One unit vector per class [classes, D]: `encode(texts) -> [n, D]` of its name in every template ("a photo of a {}."), averaged.

    >>> def encode(texts):  # a text tower
    ...     return [[1.0, 0.0] if "cat" in text else [0.0, 2.0] for text in texts]
    >>> class_vectors(encode, ["cat", "dog"], ["a photo of a {}.", "a drawing of a {}."])
    array([[1., 0.],
           [0., 1.]])
    """
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise UserError(f"prompt templates hold the class' name as {{}}, 'a photo of a {{}}.', and there is at least one, not {wrong}.")
    texts = [template.replace("{}", name) for name in names for template in templates]
    return ensemble(np.asarray(encode(texts)).reshape(len(names), len(templates), -1), names)


def mean_per_class(predicted: np.ndarray, true: np.ndarray) -> float:
    """The mean over the classes of `true` of the share of each that is predicted.

    >>> mean_per_class([0, 0, 0, 1], [0, 0, 0, 0])
    0.75
    >>> mean_per_class([0, 0, 0, 0], [0, 0, 0, 1])
    0.5
    """
    predicted, true = np.asarray(predicted), np.asarray(true)
    return float(np.mean([np.mean(predicted[true == label] == label) for label in np.unique(true)]))


def recall(scores: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Recall@k: the share of rows with a relevant column among the k best; where scores are equal, its mean over their orders.

    Thus a constant score has the recall of chance, and rows that are given the same candidate twice gain nothing by it.

    >>> relevant = np.eye(2, dtype=bool)
    >>> recall(np.array([[0.9, 0.1], [0.8, 0.3]]), relevant, 1), recall(np.zeros((2, 2)), relevant, 1)
    (0.5, 0.5)

    Args:
      scores: [n, m]. relevant: bool [n, m], at least one in every row.
      k: at least 1.

    Raises:
      UserError: scores that are not finite. ValueError: another shape, or a row without a relevant column.
    """
    scores, relevant = finite("scores", scores), np.asarray(relevant, bool)
    if scores.shape != relevant.shape or scores.ndim != 2 or not relevant.any(1).all() or k < 1:
        raise ValueError(f"recall needs k >= 1, scores and relevant of one shape, a relevant column in every row: {scores.shape}, k {k}.")
    best = np.where(relevant, scores, -np.inf).max(1, keepdims=True)
    above, tied = (scores > best).sum(1), (scores == best).sum(1)
    right = ((scores == best) & relevant).sum(1)
    # Of the places that the better ones leave, the chance that none falls to one of the right among the tied.
    shares = [1.0 - _missed(max(k - a, 0), n, r) for a, n, r in zip(above.tolist(), tied.tolist(), right.tolist())]
    return float(np.mean(shares))


def _missed(places: int, tied: int, right: int) -> float:
    return math.comb(tied - right, places) / math.comb(tied, places) if places < tied else 0.0


def recalls(scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall@K both ways, {"image_to_text_r1": ..., "text_to_image_r1": ...}: rows are images, columns texts.

    An image may have several texts and a text several images: `relevant[i, j]` says which belong together.
    """
    both = {"image_to_text": (scores, relevant), "text_to_image": (np.asarray(scores).T, np.asarray(relevant).T)}
    return {f"{name}_r{k}": recall(*pair, k) for name, pair in both.items() for k in ks}
