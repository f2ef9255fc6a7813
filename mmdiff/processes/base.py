r"""What a process is, and the two that hold no mathematics: `Given` and `Joint`.

A process turns clean data into noisy data and knows the way back. It never sees a network, a parameter or a mesh.
Shapes: B examples; `t`, `s` are float32 [B] with 0 <= s <= t <= 1; `keys` are [B] typed PRNG keys, one per example, so that
what happens to an example depends on nothing but its own key.

Conditioning is time: a modality pinned at t = 0 is a condition (`corrupt` and `step` return it bit for bit, and its loss is
zero), at t = 1 it is absent (a sample of the prior, or a null token).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.errors import UserError
from mmdiff.spans import end_of

Array = jax.Array


@flax.struct.dataclass
class Noised:
    """One corrupted batch: clean `x0`, noisy `xt`, its time `t` [B], and the `noise` that was used (None where there is none).

    Within a loss `batch` holds all entries of the examples and `key` is the step's key, for terms that look beyond one modality; where the
    examples are a micro-batch, `micro` says of which batch.
    """

    x0: Any
    xt: Any
    t: Any
    noise: Any = None
    batch: Any = None
    key: Any = None
    micro: Any = None

    def of(self, name: str) -> Noised:
        """One modality of a joint `Noised`."""
        x0, xt, t, noise = (None if tree is None else tree[name] for tree in (self.x0, self.xt, self.t, self.noise))
        return Noised(x0, xt, t, noise, self.batch, self.key, self.micro and self.micro.of(name))


class Process:
    """The interface. Every method is pure; `...` stands for the dimensions of one example.

    The first six methods are the process; `kl`, `prior_kl`, `elbo_rate` and `decoder` serve the bounds on the likelihood.
    """

    learnt = True  # False for a condition, for which a network needs no output
    shared = False  # True if a part of it is the network itself, so that it has to be bound (`bind`)

    def select(self, batch: Mapping[str, Array]) -> Any:
        """The clean data of this process within a batch: the entry `x0`, or for a `Joint` one entry per modality."""
        return batch["x0"]

    def check(self, x0: Any) -> None:
        """Raises ValueError for clean data that JAX would take silently for something else (a class id out of range). Arrays only."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """The modalities that are never learnt, hence never sampled: unless given they are absent."""
        return ()

    @property
    def null(self) -> Any:
        """What an absent modality (t = 1) always looks like: a scalar or an array of one example's shape. Refused where it is random."""
        raise UserError(
            f"{type(self).__name__} has no null: at t = 1 it is random, so guidance cannot drop it; let the condition be a Given(null), a "
            "Hidden(null) or an absorbing chain.")

    def prior(self, keys: Array, shape: tuple[int, ...]) -> Array:
        """A sample [B, *shape] at t = 1."""
        raise NotImplementedError

    def bind(self, params: Any) -> Process:
        """This process with whatever in it depends on the network's parameters; usually nothing does."""
        return self

    def condition_prior(self, xt: Any, known: Collection[str]) -> Any:
        """A sample of the prior in which the modalities `known` were replaced by their clean data, and what else this changes."""
        return xt

    def corrupt(self, keys: Array, x0: Array, t: Array) -> Noised:
        """A sample of q(x_t | x_0). At t = 0 it is x_0 itself."""
        raise NotImplementedError

    def with_x0(self, noised: Noised, x0: Array) -> Noised:
        """The same x_t as if it had come from another clean x0 (a negative): what depends on x_0 is replaced."""
        return noised.replace(x0=x0)

    def unconditional_inputs(self, x: Any, t: Any, null_x: Any, null_t: Any) -> tuple[Any, Any]:
        """What the network is fed once guidance has replaced modalities of its inputs (x, t) by absent ones: (null_x, null_t), and more."""
        return null_x, null_t

    def inputs(self, xt: Array, t: Array) -> tuple[Array, Array]:
        """What the network is fed for (x_t, t)."""
        return xt, t

    def clean(self, out: Array, xt: Array, t: Array) -> Array:
        """Network output -> belief about x_0: a mean (continuous) or probabilities [B, ..., K] (discrete)."""
        raise NotImplementedError

    def loss(self, out: Array, noised: Noised) -> Array:
        """The process's plain training loss per example, [B]; zero where t = 0."""
        raise NotImplementedError

    def step(self, keys: Array, xt: Array, x0_hat: Array, t: Array, s: Array) -> Array:
        """A sample of q(x_s | x_t, x_0 ~ x0_hat). For s = t it is x_t itself."""
        raise NotImplementedError

    def heun(self, x0_hat: Array, x0_end: Array, t: Array, s: Array) -> Array:
        """The belief whose step from t to s goes along the mean of two slopes: of x0_hat at (x_t, t) and of x0_end where its step arrives.

        Here slopes are linear in the belief with the same coefficients, so the mean of the beliefs. Where s = 0 it is x0_hat itself.
        """
        return jnp.where(bcast(s > 0, x0_hat), 0.5 * (x0_hat + x0_end), x0_hat)

    def kl(self, noised: Noised, x0_hat: Array, s: Array) -> Array:
        """KL(q(x_s | x_t, x_0) || q(x_s | x_t, x0_hat)) in nats, summed over the example: one term of the VLB, [B]."""
        raise NotImplementedError

    def prior_kl(self, x0: Array) -> Array:
        """KL(q(x_1 | x_0) || prior) in nats, summed over the example, [B]."""
        raise NotImplementedError

    def elbo_rate(self, noised: Noised, x0_hat: Array) -> Array:
        """The limit of `kl(noised, x0_hat, t - dt) / dt`: the continuous-time VLB's integrand, [B]."""
        raise NotImplementedError

    def decoder(self, noised: Noised, x0_hat: Array, values: Any = None, later: Array | None = None) -> Array:
        """-log p(x_0 | x_t), the step from t to the data, in nats, summed over the example, [B]: what closes a bound that begins at t.

        `values` and `later` are of continuous data, see `Gaussian`; discrete data have probabilities of their own.
        """
        if values is not None:
            raise UserError(f"a decoder of quantised data belongs to a Gaussian; {type(self).__name__} has no use for the levels.")
        return self.kl(noised, x0_hat, jnp.zeros_like(noised.t))


def fold(keys: Array, data: int | str) -> Array:
    """Independent keys [B] for a numbered or named purpose. Names are hashed (CRC-32), so adding one leaves the others alone."""
    if isinstance(data, str):
        data = zlib.crc32(data.encode())
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def check_time(t: Array) -> None:
    """Raises ValueError for times outside [0, 1], where they are known (not while tracing)."""
    if concrete(t) and (np.any(np.asarray(t) < 0) or np.any(np.asarray(t) > 1) or np.any(np.isnan(np.asarray(t)))):
        raise ValueError(f"times lie in [0, 1] (0 is clean, 1 is noise), got {np.asarray(t)}.")


def concrete(x: Any) -> bool:
    """Whether x has values: false for what jit, grad and vmap trace."""
    return not isinstance(x, jax.core.Tracer)


def per_example(sample, keys: Array, *rest: Array) -> Array:
    """`vmap` of a sampler over examples."""
    return jax.vmap(sample)(keys, *rest)


def bcast(t: Array, x: Array) -> Array:
    """Per-example (or per-token) values with trailing axes added until they broadcast against x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def per_example_sum(x: Array) -> Array:
    return x.reshape(x.shape[0], -1).sum(-1)


def per_example_mean(x: Array) -> Array:
    return x.reshape(x.shape[0], -1).mean(-1)


@dataclasses.dataclass(frozen=True)
class Given(Process):
    """An undiffused condition: present at any t < 1, replaced by `null` at t = 1. It is never learnt and never sampled.

    `null` is the value of an absent condition: a scalar (a null class, a padding token, 0.0) or an array of one example's shape.

    >>> Given(null=10).corrupt(None, jnp.array([3, 7]), jnp.array([0.5, 1.0])).xt.tolist()
    [3, 10]
    """

    null: Any = 0
    learnt = False

    def __post_init__(self):
        with np.errstate(over="ignore"):
            finite = not concrete(self.null) or np.isfinite(np.asarray(self.null).astype(np.float32)).all()
        if not finite:
            raise UserError(f"Given needs a finite null, got {self.null}.")

    def _absent(self, shape, dtype):
        return jnp.broadcast_to(jnp.asarray(self.null, dtype), shape)

    def prior(self, keys, shape):
        return self._absent((keys.shape[0], *shape), jnp.asarray(self.null).dtype)

    def corrupt(self, keys, x0, t):
        check_time(t)
        xt = jnp.where(bcast(t, x0) < 1, x0, self._absent(x0.shape, x0.dtype))
        return Noised(x0=x0, xt=xt, t=t)

    def clean(self, out, xt, t):
        return xt

    def loss(self, out, noised):
        return jnp.zeros_like(noised.t)

    def step(self, keys, xt, x0_hat, t, s):
        return xt

    def heun(self, x0_hat, x0_end, t, s):
        return x0_hat

    def kl(self, noised, x0_hat, s):
        return jnp.zeros_like(noised.t)

    def prior_kl(self, x0):
        return jnp.zeros(x0.shape[0], jnp.float32)

    def elbo_rate(self, noised, x0_hat):
        return jnp.zeros_like(noised.t)


@dataclasses.dataclass(frozen=True, init=False)
class Joint(Process):
    """Several modalities side by side: every argument and result becomes a dict by modality name, `loss` too.

    Each modality has its own time and samples with keys folded with its name. Entries of a dict that are not modalities of this
    process are ignored (a batch may carry more than one loss needs); a missing one is an error that names it. Times may also say where
    steps end (`spans.end_of`), for the network.

        Joint(image=Gaussian(flow(), velocity), label=Categorical(absorbing(10), flow()))

    >>> from mmdiff.processes import absorbing
    >>> process = Joint(label=absorbing(10), hour=absorbing(24))
    >>> x = process.prior(jax.random.split(jax.random.key(0), 2), {"label": (), "hour": ()})
    >>> {name: value.tolist() for name, value in sorted(x.items())}
    {'hour': [24, 24], 'label': [10, 10]}
    """

    parts: Mapping[str, Process]

    def __init__(self, parts: Mapping[str, Process] | None = None, **named: Process):
        parts = dict(parts or {}, **named)
        if not parts:
            raise ValueError("Joint needs at least one modality, as in Joint(image=Gaussian(...)).")
        object.__setattr__(self, "parts", parts)

    def __hash__(self):
        return hash(tuple(self.parts.items()))

    def _map(self, method: str, *trees, keys=None):
        for tree in trees:
            missing = [name for name in self.parts if name not in tree]
            if missing:
                raise KeyError(f"Joint.{method}: no {missing} among {sorted(tree)}; the modalities are {sorted(self.parts)}.")
        results = {}
        for name, part in self.parts.items():
            lead = () if keys is None else (fold(keys, name),)
            results[name] = getattr(part, method)(*lead, *(tree[name] for tree in trees))
        return results

    def select(self, batch):
        missing = [name for name in self.parts if name not in batch]
        if missing:
            raise KeyError(f"the batch has no {missing}: it holds {sorted(batch)} and the process needs {sorted(self.parts)}.")
        return {name: batch[name] for name in self.parts}

    def check(self, x0):
        for name, part in self.parts.items():
            if name in x0:
                try:
                    part.check(x0[name])
                except ValueError as error:
                    raise ValueError(f"modality {name!r}: {error}") from error

    @property
    def conditions(self):
        return tuple(name for name, part in self.parts.items() if not part.learnt)

    def null(self, name: str) -> Any:
        """What the network is fed for the modality `name` where it is absent; a UserError where that is random."""
        if name not in self.parts:
            raise UserError(f"there is no modality {name!r} to drop; the modalities are {sorted(self.parts)}.")
        try:
            return self.parts[name].null
        except UserError as error:
            raise UserError(f"modality {name!r}: {error}") from error

    def null_like(self, name: str, x: Array) -> Array:
        """`null(name)` as an array like x."""
        return jnp.broadcast_to(jnp.asarray(self.null(name), x.dtype), x.shape)

    def prior(self, keys, shape):
        return self._map("prior", shape, keys=keys)

    def corrupt(self, keys, x0, t):
        parts = self._map("corrupt", x0, t, keys=keys)
        x0, xt, time, noise = ({name: getattr(noised, field) for name, noised in parts.items()} for field in ("x0", "xt", "t", "noise"))
        return Noised(x0, xt, time | self._ends(t), noise)

    def with_x0(self, noised, x0):
        parts = {name: self.parts[name].with_x0(noised.of(name), value) for name, value in x0.items() if name in self.parts}
        new = {field: dict(getattr(noised, field)) for field in ("x0", "noise")}
        for name, part in parts.items():
            new["x0"][name], new["noise"][name] = part.x0, part.noise
        return noised.replace(**new)

    def inputs(self, xt, t):
        pairs = self._map("inputs", xt, t)
        return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()} | self._ends(t)

    def clean(self, out, xt, t):
        return self._map("clean", self._outputs(out), xt, t)

    def loss(self, out, noised):
        return self._map("loss", self._outputs(out), self.split(noised))

    def step(self, keys, xt, x0_hat, t, s):
        return self._map("step", xt, x0_hat, t, s, keys=keys)

    def heun(self, x0_hat, x0_end, t, s):
        return self._map("heun", x0_hat, x0_end, t, s)

    def kl(self, noised, x0_hat, s):
        return self._map("kl", self.split(noised), x0_hat, s)

    def prior_kl(self, x0):
        return self._map("prior_kl", x0)

    def elbo_rate(self, noised, x0_hat):
        return self._map("elbo_rate", self.split(noised), x0_hat)

    def _ends(self, t):
        """The times at which steps of the modalities end, where they are among the times: the network is told them."""
        return {end_of(name): t[end_of(name)] for name in self.parts if end_of(name) in t}

    def split(self, noised: Noised) -> dict[str, Noised]:
        """A joint `Noised` as one `Noised` per modality."""
        return {name: noised.of(name) for name in self.parts}

    def _outputs(self, out):
        missing = [name for name, part in self.parts.items() if part.learnt and name not in out]
        if missing:
            raise KeyError(f"the network returned no output for {missing}, only for {sorted(out)}.")
        return {name: out.get(name) for name in self.parts}
