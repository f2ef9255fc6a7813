"""Grids of times for `sampling.sample`: decreasing, to 0. All of them are names of `sampling`, too: `sampling.uniform_grid(...)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import schedules
from mmdiff.checks import is_whole
from mmdiff.errors import UserError
from mmdiff.processes.base import fold
from mmdiff.processes.discrete import Discrete


def uniform_grid(steps: int, first: float = 1.0) -> jax.Array:
    """`first, first (1 - 1/N), ..., 0`: N steps. Below 1 (`first` in (0, 1]) `sample` needs a `start`.

    >>> [float(t) for t in uniform_grid(4)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if not is_whole(steps, 1):
        raise UserError(f"a sampler needs at least one step, got {steps}.")
    if not 0 < first <= 1:
        raise UserError(f"a grid of times starts in (0, 1], not at {first}.")
    return first * (steps - jnp.arange(steps + 1, dtype=jnp.result_type(float))) / steps


def spaced_grid(steps: int, chain: int) -> jax.Array:
    """The published spacing of `steps` calls on a chain of T = `chain` steps: of 250 on 1,000 the times 1, 5, 9, ..., 1000, then 0.

    Node i + 1 of T for every i that is `round(j (T - 1) / (N - 1))`, j = 0 .. N - 1: the first node and the last are both called, unlike
    with `uniform_grid`. It is `space_timesteps(chain, [steps])` of improved diffusion (Nichol & Dhariwal 2021), ADM and DiT.

    >>> spaced_grid(3, chain=8).tolist()
    [1.0, 0.625, 0.125, 0.0]
    """
    if not 2 <= steps <= chain:
        raise UserError(f"spaced_grid needs 2 <= steps <= the chain's {chain}, got {steps} steps.")
    nodes, place = [], 0.0
    for _ in range(steps):
        nodes.append(round(place) + 1)  # half to even, and the rounding of repeated addition, as published
        place += (chain - 1) / (steps - 1)
    return jnp.asarray([*reversed(nodes), 0], jnp.result_type(float)) / chain


def hitting_grid(process: Discrete, keys: jax.Array, tokens: int) -> jax.Array:
    """The times at which an absorbing chain takes the tokens of each example, one after the other: [L + 1, B], the last ones 0.

    The masked share sigma(t) at these times is L sorted uniform numbers. With `first_hitting` L network calls sample the model's exact
    law, however its tokens depend on each other (Zheng et al. 2024), where a grid's steps draw several at once, as if independent:

        masks = jnp.full((len(keys), length), process.mask)  # before the first is revealed
        grid = hitting_grid(process, keys, length)
        sample(process, apply, params, keys, grid, (length,), transforms=[first_hitting(process)], start=masks)

    Args:
      process: `absorbing(...)`. keys: [B]. tokens: L, of an example.
    """
    if not is_whole(tokens, 1):
        raise UserError(f"hitting_grid needs at least one token, got {tokens}.")
    process.mask  # refused by a chain that has none
    shares = jax.vmap(lambda key: jnp.sort(jax.random.uniform(key, (tokens,), jnp.result_type(float)), descending=True))(fold(keys, "hits"))

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        below = process.masked(middle.reshape(-1)).reshape(middle.shape) < shares
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    _, times = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(shares), jnp.ones_like(shares)))
    return jnp.append(times.T, jnp.zeros((1, len(keys)), times.dtype), axis=0)


def staircase(steps: int, order: Sequence[str]) -> dict[str, jax.Array]:
    """Times by modality, one after the other from 1 to 0: each in one step, the last one in all that remain, evenly.

    >>> {name: times.tolist() for name, times in staircase(3, ("label", "image")).items()}
    {'label': [1.0, 0.0, 0.0, 0.0], 'image': [1.0, 1.0, 0.5, 0.0]}
    """
    if isinstance(order, str) or not order:
        raise UserError(f"staircase: order is names of modalities, as ('label', 'image'), not {order!r}.")
    if not is_whole(steps, len(order)):
        raise UserError(f"a staircase of {', '.join(order)} needs at least {len(order)} steps, got {steps}.")
    place = jnp.arange(steps + 1, dtype=jnp.result_type(float))
    lengths = [1] * (len(order) - 1) + [steps + 1 - len(order)]
    return {name: jnp.clip((i + length - place) / length, 0.0, 1.0) for i, (name, length) in enumerate(zip(order, lengths))}


def settled_at(time: float) -> Callable[[jax.Array], jax.Array]:
    """A path of `make_sampler`: a modality that is clean once the trajectory is at `time`, `max(t - time, 0) / (1 - time)`.

    Joint samples then settle their label while the image is still mostly noise and can follow it.
    """
    return lambda t: jnp.maximum(t - time, 0.0) / (1 - time)


def karras_grid(
    schedule: schedules.Schedule, steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> jax.Array:
    r"""EDM's N calls in the times of any schedule: sigma / alpha at node i < N is equation 5 of Karras et al. 2022, and node N is t = 0,

        (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,

    with rho = inf the limit, even steps of log-SNR: sigma_max (sigma_min / sigma_max)^(i / (N - 1)).

    With `schedules.edm` of the same numbers the first time is 1. With a schedule that reaches alpha = 0 it is below: EDM then starts at
    x = sigma eps, what `corrupt` makes of zeros,

        grid = karras_grid(schedule, steps)
        sample(process, ..., grid, ..., start=process.corrupt(keys, jnp.zeros((len(keys), *shape)), jnp.full(len(keys), grid[0])).xt)
    """
    if steps < 2 or not 0 < sigma_min < sigma_max or rho <= 0:
        got = f"{steps}, {sigma_min}, {sigma_max}, {rho}"
        raise UserError(f"karras_grid needs steps >= 2, 0 < sigma_min < sigma_max and rho > 0, got {got}.")
    share = np.arange(steps) / (steps - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    wanted = sigma_max * (sigma_min / sigma_max) ** share if np.isinf(rho) else (high + share * (low - high)) ** rho
    kind = np.dtype(jnp.result_type(float))
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):

        def ratio(t):
            alpha, sigma = (np.asarray(c, np.float64) for c in schedule(jnp.asarray(t)))
            return np.where(alpha > 0, sigma / np.where(alpha > 0, alpha, 1.0), np.inf)

        last = float(ratio(np.ones(())))
        if last < sigma_max * (1 - 1e-6):
            raise UserError(f"karras_grid: the schedule's sigma / alpha ends at {last:g}: choose sigma_max below it, not {sigma_max:g}.")
        # The largest t that is not above, by halving; not 0, where `edm` jumps from sigma_min to 0.
        below, above = np.zeros(steps), np.ones(steps)
        for _ in range(80):
            middle = (below + above) / 2
            under = ratio(middle) <= wanted * (1 + 1e-15)
            below, above = np.where(under, middle, below), np.where(under, above, middle)
    times = np.maximum(below, 2.0**-60)
    times = np.where(times > 1 - 1e-12, 1.0, times)
    return jnp.asarray(np.append(times, 0.0).astype(kind))
