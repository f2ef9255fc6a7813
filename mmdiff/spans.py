"""What networks, processes and losses agree on about steps that are taken in one jump: how the end of one is called, and forward mode."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

from mmdiff.errors import UserError

_forward: contextvars.ContextVar[bool] = contextvars.ContextVar("forward_mode", default=False)


def end_of(name: str) -> str:
    """The entry, among times by modality, of the time at which a step of the modality `name` ends.

    >>> end_of("image")
    'image/end'
    """
    return f"{name}/end"


def velocity_of(name: str) -> str:
    """The output, among those by modality, of a network that predicts velocities beside their averages.

    >>> velocity_of("image")
    'image/velocity'
    """
    return f"{name}/velocity"


def check_no_ends(who: str, t: Mapping[str, Any]) -> None:
    """Raises UserError if times say where steps end, for a network that would not hear of it."""
    if ends := [name for name in t if name.endswith(end_of(""))]:
        raise UserError(f"{who} takes no ends of steps, {', '.join(ends)}: average velocities need an MMDiT with spans.")


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """A context: what is traced inside is differentiated in forward mode (`jax.jvp`), which fused kernels refuse; networks use none."""
    token = _forward.set(True)
    try:
        yield
    finally:
        _forward.reset(token)


def in_forward_mode() -> bool:
    """Whether `forward_mode` is on."""
    return _forward.get()
