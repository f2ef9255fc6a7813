"""What the program that is being traced is meant for. The numbers do not depend on it, the way to compute them does."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

_target: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar("target", default=None)
_axes: contextvars.ContextVar[Mapping[str, int]] = contextvars.ContextVar("axes", default={})  # noqa: B039 (never changed)
_place: contextvars.ContextVar[Callable] = contextvars.ContextVar("place", default=lambda x: x)


@contextlib.contextmanager
def compiling_for(
    platform: str, devices: int = 1, place: Callable[[jax.Array], jax.Array] = lambda x: x, axes: Mapping[str, int] | None = None
) -> Iterator[None]:
    """What is traced inside is meant for so many devices of `platform` ("cpu", "gpu", "tpu"), which need not be here.

    `place` spreads activations [B, ...] over them (see `placed`), `axes` says in how many each axis of the mesh splits (see `split`).
    """
    tokens = [(var, var.set(value)) for var, value in ((_target, (platform, devices)), (_place, place), (_axes, axes or {}))]
    try:
        yield
    finally:
        for var, token in tokens:
            var.reset(token)


def placed(tree: Any) -> Any:
    """Activations [B, ...], spread over the devices as `compiling_for` says.

    Networks say it of what enters a layer. In a scanned layer the compiler sees split weights and no batch: left alone, it splits
    the activations as the weights are, and every device works on all examples.
    """
    return jax.tree.map(_place.get(), tree)


def split(axis: str) -> int:
    """In how many parts the mesh of `compiling_for` splits along an axis: "tensor" the heads, "seq" the tokens; 1 without one."""
    return _axes.get().get(axis, 1)


def platform() -> str:
    """The platform of `compiling_for`, else the default one."""
    return (_target.get() or (jax.default_backend(),))[0]


def one_cpu() -> bool:
    """True for a program of one CPU device: nothing is sharded, and XLA's CPU compiler wants some things said its way."""
    return (_target.get() or (jax.default_backend(), 1)) == ("cpu", 1)
