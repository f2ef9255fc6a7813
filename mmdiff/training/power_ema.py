r"""Averages of the weights whose length is chosen after training (Karras et al. 2024, "Analyzing and improving the training dynamics").

An average with the power-law profile of g weighs the weights of step r, of t, by r^g:

    avg_g(t) = (g + 1) / t^(g+1) int_0^t r^g theta(r) dr,        avg <- b avg + (1 - b) theta,    b = (1 - 1/i)^(g+1)    at step i.

Its width is the deviation of the profile relative to t, width^2 = (g + 1) / ((g + 2)^2 (g + 3)): 0.05 is g = 16.97, 0.10 is 6.94. A run
tracks two widths or so (config.train.ema_widths) and keeps snapshots of them (every config.train.ema_every steps, WORKDIR/snapshots); any
other profile is the combination of snapshots that is nearest to it, in closed form: `combination`. Steps that were skipped do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.checks import short
from mmdiff.errors import UserError


def exponent(width: float) -> float:
    """g of a width.

    >>> round(exponent(0.05), 2), round(exponent(0.1), 2)
    (16.97, 6.94)
    """
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0.001 <= width < 12**-0.5:
        raise UserError(f"the width of an average (config.train.ema_widths) is from 0.001 to 0.288, not {short(width)}.")
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def init(params: Any, widths: Sequence[float]) -> dict[str, Any]:
    """Averages before the first step: width -> a copy of the weights, in float32."""
    for width in widths:
        exponent(width)
    return {f"{width:g}": jax.tree.map(lambda x: x.astype(jnp.float32), params) for width in widths}


def update(averages: Mapping[str, Any], params: Any, taken: jax.Array) -> dict[str, Any]:
    """Averages after step number `taken`, which the first step is 1 of, that gave these weights."""
    found = {}
    for width, average in averages.items():
        share = -jnp.expm1((exponent(float(width)) + 1) * jnp.log1p(-1 / taken.astype(jnp.float32)))  # 1 - b, 1 at first
        found[width] = jax.tree.map(lambda old, new, share=share: old + share * (new.astype(jnp.float32) - old), average, params)
    return found


def combination(steps: Sequence[float], widths: Sequence[float], width: float, at: float) -> np.ndarray:
    """The weights, of sum 1, with which averages of `widths` at `steps` make that of another width at step `at`, in least squares.

    >>> bool(np.allclose(combination([500, 1000, 1000], [0.1, 0.1, 0.05], 0.05, 1000), [0, 0, 1]))
    True
    """
    t, g = np.asarray(steps, np.float64), np.asarray([exponent(each) for each in widths])
    x = np.linalg.solve(_gram(t[:, None], g[:, None], t, g), _gram(t, g, float(at), exponent(width)))
    return x / x.sum()


def _gram(ta, ga, tb, gb):
    """<p_a, p_b> of profiles."""
    ratio = (ta / tb) ** np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * np.maximum(ta, tb))
