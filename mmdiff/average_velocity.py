r"""Average velocities: networks that take a step of a flow in one call (MeanFlow; Geng et al. 2025, in the form of improved MeanFlow).

With z_t = (1 - t) x_0 + t eps and v the velocity of its flow, the average over [s, t] and what it obeys, s held fixed, are

    u(z, t, s) = 1 / (t - s) int_s^t v(z_r, r) dr,    z_s = z_t - (t - s) u,    u = v - (t - s) du/dt,    du/dt = v grad_z u + d_t u.

Thus `u + (t - s) sg[du/dt]` has the velocity as its target, as u(z, t, t) has. A joint model needs three things for it, and no loss, term
or step of its own: times with ends, a network that takes them, and `averaged`:

    when = times.spans("image", 0.5, rule)
    net = nets.MMDiT(..., spans=("image",), time_scale=6.0)
    loss = losses.diffusion(process, losses.averaged(net.apply, "image", process), when)
    grid = sampling.staircase(2, ("label", "image"))
    pairs = sampling.sample(process, net.apply, params, keys, grid, shape, jumps=("image",))  # two calls

One modality moves at a time: what a call reveals of a discrete one depends on where the others stand when it begins, so a call that also
moves them draws the product of the two laws. One after the other, an exact average and an exact belief give the exact joint law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.errors import UserError
from mmdiff.guidance import dropped
from mmdiff.processes.aggregate import Aggregate
from mmdiff.processes.base import Joint, Process, bcast
from mmdiff.processes.gaussian import Gaussian, LearnedSigma
from mmdiff.spans import end_of, forward_mode, velocity_of


def averaged(apply: Callable, name: str, process: Joint, w: float | Callable = 1.0, drop: Sequence[str] = ()) -> Callable:
    r"""The network to train average velocities of a modality with: its output for it is `u + (t - s) sg[du/dt]`, the others are u's.

    The tangent of du/dt is the network's own velocity: u(z, t, t), or the output "NAME/velocity" of a network that has one (`nets.MiT`),
    which guidance shifts, too, and which needs a term of its own. Costs a forward pass and the tangents of another one more than `apply`:
    about 5/3 of a training step. Where s = t the output is that of `apply`.

    Args:
      apply: `(params, net_x, net_t) -> out` of a network with `spans=(name,)`.
      name: a modality with `Gaussian(flow(), velocity)`, or others whose step is x_t - (t - s) u.
      process: the joint process.
      w: trains the field of classifier-free guidance, v_u + w (v_c - v_u), for examples to which all of `drop` are given (t = 0): from
        their output `sg[(1 - 1/w) (v_c - v_u)]` is subtracted. Sampling then needs no guidance. Costs another forward pass. A number, or a
        function of the times (see `interval`).
      drop: the modalities that guidance drops, as in `guided`.

    Raises UserError for a process whose steps are none of average velocities, and for times without ends (see `times.spans`).

    >>> from mmdiff import schedules
    >>> from mmdiff.processes import velocity
    >>> process = Joint(image=Gaussian(schedules.flow(), velocity))
    >>> def apply(params, x, t):  # the exact average where all data are 0: z_t is a straight line to it
    ...     return {"image": x["image"] / t["image"][:, None]}
    >>> x, t = {"image": jnp.full((1, 2), 0.5)}, {"image": jnp.full(1, 0.5), "image/end": jnp.full(1, 0.25)}
    >>> averaged(apply, "image", process)(None, x, t)["image"].tolist()
    [[1.0, 1.0]]
    """
    check_average(process, name)
    drop = dropped(drop, process)
    guided = bool(drop) and (callable(w) or w != 1)
    if not callable(w) and not (1 <= w < np.inf and (drop or w == 1)):
        raise UserError(f"averaged: guidance in training has a weight of 1 (none) or more and modalities to drop, not {w} and {drop}.")

    def field(out):
        return out.get(velocity_of(name), out[name])

    def apply_averaged(params, x, t):
        end = end_of(name)
        if end not in t:
            raise UserError(f"averaged: the times do not say where a step of {name!r} ends: use times.spans({name!r}, ...).")
        frozen, instant, shift = jax.lax.stop_gradient(params), {**t, end: t[name]}, 0.0
        v = field(apply(frozen, x, instant))
        if guided:
            null_x, null_t = ({condition: null(condition) for condition in drop} for null in (
                lambda condition: process.null_like(condition, x[condition]), lambda condition: jnp.ones_like(t[condition])))
            unconditional = field(apply(frozen, {**x, **null_x}, {**instant, **null_t}))
            known = jnp.stack([t[condition] == 0 for condition in drop]).all(0)
            scale = jnp.where(known, 1.0 - 1.0 / (w(t) if callable(w) else w), 0.0)
            shift = bcast(scale, v) * (v - unconditional)

        def average(z, time):
            out = apply(params, {**x, name: z}, {**t, name: time})
            return out[name], out

        with forward_mode():
            u, slope, out = jax.jvp(average, (x[name], t[name]), (v.astype(x[name].dtype), jnp.ones_like(t[name])), has_aux=True)
        more = {key: value - jax.lax.stop_gradient(shift) for key, value in out.items() if key == velocity_of(name)}
        return {**out, **more, name: u + jax.lax.stop_gradient(bcast(t[name] - t[end], slope) * slope - shift)}

    return apply_averaged


def check_average(process: Process, name: Any) -> None:
    """Raises UserError unless a step of the modality from t to s is x_t - (t - s) u for whatever u the network predicts."""
    part = process.parts.get(name) if isinstance(process, Joint) else None
    if part is None:
        raise UserError(f"average velocities are of a modality of a Joint, one of {sorted(getattr(process, 'parts', ()))}, not {name!r}.")
    fits = isinstance(part, Gaussian) and not isinstance(part, LearnedSigma) and part.eta == 0 and part.data_std is None
    if fits:
        t = np.linspace(0.0, 1.0, 9, dtype=np.float32)[1:]
        with jax.ensure_compile_time_eval():
            rows = jax.jit(lambda t: (*part.schedule(t), *part.predict(part.schedule, t)))(t)
            alpha, sigma, p, q = (np.asarray(row) for row in rows)
        rows = (p, p[-1]), (q, q[-1]), (alpha, 1 + p * t), (sigma, q * t)
        fits = all(np.allclose(row, wanted, atol=1e-5) for row, wanted in rows)
    if not fits or isinstance(process, Aggregate) and process.added and name == process.target:
        raise UserError(
            f"average velocities of {name!r} need steps x_t - (t - s) u: let it be Gaussian(schedules.flow(), velocity), with eta=0, no "
            "data_std, and nothing added to its mean.")
