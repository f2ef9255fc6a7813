r"""Two ways to classify with a joint diffusion model, and their accuracy.

Both are generic: they know the names of the modalities and the interface of a process, not which process it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import sampling
from mmdiff.processes.base import Joint, fold


def posterior(
    process: Joint,
    apply: Callable,
    params: Any,
    keys: jax.Array,
    given: Mapping[str, jax.Array],
    target: str,
    shape: Mapping[str, tuple[int, ...]],
) -> jax.Array:
    """p(target | given) by one network call: `given` at t = 0, everything else at t = 1.

    At t = 1 a modality is a draw from its prior and says nothing, so the belief about it is conditional on `given` alone. For a
    categorical target that starts from a mask this is the model's exact p(target | given), without sampling.

    Args:
      keys: [B], for the draws from the priors.
      given: clean values [B, ...] by name.
      target: the modality to be predicted.
      shape: the shape of one example of every modality.

    Returns process.clean's belief about the target: probabilities [B, ..., K] if it is categorical.
    """
    process = process.bind(params)
    xt = sampling.sample_prior(process, keys, shape, given)
    t = {name: jnp.full(keys.shape[0], 0.0 if name in given else 1.0) for name in shape}
    return process.clean(apply(params, *process.inputs(xt, t)), xt, t)[target]


def denoising_losses(
    process: Joint,
    apply: Callable,
    params: Any,
    keys: jax.Array,
    given: Mapping[str, jax.Array],
    target: str,
    candidates: int | jax.Array,
    shape: Mapping[str, tuple[int, ...]],
    draws: int,
) -> jax.Array:
    r"""The expected denoising loss of `given` under every candidate, for a diffusion classifier (Li et al. 2023, arXiv:2303.16203).

        L[b, k] = mean_j sum_{m in given} loss_m(x0_m, t_j, noise_j | target = candidate k at t = 0),     j = 0..draws-1

    with one time and one noise per (example, j), the same for all candidates: their differences, which decide, have far less
    variance than the losses. Times are stratified, t_j ~ U[j / draws, (j + 1) / draws]. Modalities that are neither given nor
    the target are absent (t = 1).

    Args:
      candidates: values of the target, [B, K, ...] each example's own, or the number of classes: the labels 0..K-1.

    Returns float32 [B, K]; the diffusion classifier answers argmin_k L[b, k]. It costs draws * K network calls.
    """
    process, count = process.bind(params), keys.shape[0]
    blank = jax.tree.map(jnp.zeros_like, process.prior(keys, shape))
    if isinstance(candidates, int):
        candidates = jnp.broadcast_to(jnp.arange(candidates), (count, candidates))

    def losses(total, j):
        own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, j)
        time = (j + jax.vmap(jax.random.uniform)(fold(own, "time"))) / draws
        t = {name: time if name in given else jnp.full(count, 0.0 if name == target else 1.0) for name in shape}

        def of_candidate(value):
            x0 = {**blank, **given, target: value}
            noised = process.corrupt(fold(own, "corrupt"), x0, t)
            loss = process.loss(apply(params, *process.inputs(noised.xt, noised.t)), noised)
            return sum(loss[name] for name in given)

        return total + jax.vmap(of_candidate, in_axes=1, out_axes=1)(candidates), None

    zeros = jnp.zeros(candidates.shape[:2])
    return jax.lax.scan(losses, zeros, jnp.arange(draws))[0] / draws


def eliminated(
    process: Joint,
    apply: Callable,
    params: Any,
    keys: jax.Array,
    given: Mapping[str, jax.Array],
    target: str,
    candidates: int | jax.Array,
    shape: Mapping[str, tuple[int, ...]],
    stages: Sequence[tuple[int, int]],
) -> jax.Array:
    """The diffusion classifier's answer by elimination (Li et al. 2023, algorithm 2): int [B], the place of the best candidate, or
    -1 where losses are not finite or several are the least.

    Every stage `(draws, keep)` adds so many draws to the mean loss of the candidates that are left and keeps the best; the last one
    keeps 1. It costs the sum of draws * (candidates left) network calls, where `denoising_losses` costs all draws for all of them.

    Args:
      process, apply, params, keys, given, target, candidates, shape: as in `denoising_losses`.
      stages: "keep" falls to 1.

    Raises:
      ValueError: stages that end with several candidates.
    """
    if not stages or stages[-1][1] != 1:
        raise ValueError(f"eliminated: the last of the stages (draws, keep) keeps 1 candidate, not {[*stages][-1:]}.")
    if isinstance(candidates, int):
        candidates = jnp.broadcast_to(jnp.arange(candidates), (keys.shape[0], candidates))
    left = jnp.broadcast_to(jnp.arange(candidates.shape[1]), candidates.shape[:2])
    total, lost = jnp.zeros(left.shape), jnp.zeros(len(left), bool)
    for number, (draws, keep) in enumerate(stages):
        own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(fold(keys, "stage"), number)
        values = jax.vmap(lambda rows, places: rows[places])(candidates, left)
        total = total + draws * denoising_losses(process, apply, params, own, given, target, values, shape, draws)
        lost = lost | ~jnp.isfinite(total).all(1)
        if keep == 1:  # as `evals.evaluator.best`
            lost = lost | ((total == total.min(1, keepdims=True)).sum(1) > 1)
        order = jax.lax.top_k(-total, keep)[1]
        left, total = (jnp.take_along_axis(array, order, axis=1) for array in (left, total))
    return jnp.where(lost, -1, left[:, 0])


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """The share of equal entries; a prediction of -1, no class, is wrong.

    >>> accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 0]))
    0.75
    """
    predicted, true = np.asarray(predicted), np.asarray(true)
    if predicted.shape != true.shape or not predicted.size:
        raise ValueError(f"accuracy: needs as many predictions as labels, at least one, got {predicted.shape} and {true.shape}.")
    return float(np.mean((predicted == true) & (predicted != -1)))


def confusion(predicted: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 [classes, classes]: row = true class, column = predicted class; a prediction of -1, no class, is not counted."""
    counts, predicted, true = np.zeros((classes, classes), np.int64), np.asarray(predicted), np.asarray(true)
    np.add.at(counts, (true[predicted >= 0], predicted[predicted >= 0]), 1)
    return counts
