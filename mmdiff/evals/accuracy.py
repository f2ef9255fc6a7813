r"""Two ways to read a class off a joint diffusion model, and their accuracy.

Both are generic: they know the names of the modalities and the interface of a process, not which process it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
      target: the modality to be read.
      shape: the shape of one example of every modality.

    Returns process.clean's belief about the target: probabilities [B, ..., K] if it is categorical.
    """
    process = process.bound(params)
    xt = sampling.start(process, keys, shape, given)
    t = {name: jnp.full(keys.shape[0], 0.0 if name in given else 1.0) for name in shape}
    return process.clean(apply(params, *process.inputs(xt, t)), xt, t)[target]


def denoising_losses(
    process: Joint,
    apply: Callable,
    params: Any,
    keys: jax.Array,
    given: Mapping[str, jax.Array],
    target: str,
    classes: int,
    shape: Mapping[str, tuple[int, ...]],
    draws: int,
) -> jax.Array:
    r"""The expected denoising loss of `given` under every class, for a diffusion classifier (Li et al. 2023, arXiv:2303.16203).

        L[b, k] = mean_j sum_{m in given} loss_m(x0_m, t_j, noise_j | target = k at t = 0),     j = 0..draws-1

    with one time and one noise per (example, j), the same for all classes: their differences, which decide, have far less
    variance than the losses. Times are stratified, t_j ~ U[j / draws, (j + 1) / draws]. Modalities that are neither given nor
    the target are absent (t = 1).

    Returns float32 [B, classes]; the diffusion classifier answers argmin_k L[b, k]. It costs draws * classes network calls.
    """
    process, count = process.bound(params), keys.shape[0]
    blank = jax.tree.map(jnp.zeros_like, process.prior(keys, shape))

    def losses(total, j):
        own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, j)
        time = (j + jax.vmap(jax.random.uniform)(fold(own, "time"))) / draws
        t = {name: time if name in given else jnp.full(count, 0.0 if name == target else 1.0) for name in shape}

        def of_class(k):
            x0 = {**blank, **given, target: jnp.full_like(blank[target], k)}
            noised = process.corrupt(fold(own, "corrupt"), x0, t)
            loss = process.loss(apply(params, *process.inputs(noised.xt, noised.t)), noised)
            return sum(loss[name] for name in given)

        return total + jax.vmap(of_class, out_axes=1)(jnp.arange(classes)), None

    return jax.lax.scan(losses, jnp.zeros((count, classes)), jnp.arange(draws))[0] / draws


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """The share of equal entries."""
    predicted, true = np.asarray(predicted), np.asarray(true)
    if predicted.shape != true.shape or not predicted.size:
        raise ValueError(f"accuracy: needs as many predictions as labels, at least one, got {predicted.shape} and {true.shape}.")
    return float(np.mean(predicted == true))


def confusion(predicted: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 [classes, classes]: row = true class, column = predicted class."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (np.asarray(true), np.asarray(predicted)), 1)
    return counts
