"""The devices that the program being traced is for. The numbers do not depend on them, the way to compute them does."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mmdiff.spans import in_forward_mode

_target: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar("target", default=None)
_axes: contextvars.ContextVar[Mapping[str, int]] = contextvars.ContextVar("axes", default={})  # noqa: B039 (never changed)
_per_device: contextvars.ContextVar[Callable] = contextvars.ContextVar("per_device", default=lambda function, inputs, outputs: function)
_constrain: contextvars.ContextVar[Callable] = contextvars.ContextVar("constrain", default=lambda x: x)


@contextlib.contextmanager
def compiling_for(
    platform: str,
    devices: int = 1,
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,
    axes: Mapping[str, int] | None = None,
    per_device: Callable[..., Callable] = lambda function, inputs, outputs: function,
) -> Iterator[None]:
    """A context: what is traced inside is for so many devices of a platform, which need not be present.

    Args:
      platform: "cpu", "gpu" or "tpu".
      devices: how many.
      constrain: `activations [B, ...] -> the same with a sharding`, see `constrain`.
      axes: the size of every axis of the mesh, see `axis_size`.
      per_device: see `per_device`.

    >>> with compiling_for("tpu", 8, axes={"tensor": 4}):
    ...     platform(), axis_size("tensor"), single_cpu()
    ('tpu', 4, False)
    """
    values = ((_target, (platform, devices)), (_constrain, constrain), (_axes, axes or {}), (_per_device, per_device))
    tokens = [(var, var.set(value)) for var, value in values]
    try:
        yield
    finally:
        for var, token in tokens:
            var.reset(token)


def constrain(tree: Any) -> Any:
    """Activations [B, ...] with the sharding constraint of `compiling_for`.

    Networks apply it to what enters a layer: in a scanned layer the compiler sees sharded weights and no batch; left alone, it shards
    the activations like the weights, and every device computes all examples.
    """
    return jax.tree.map(_constrain.get(), tree)


def per_device(function: Callable, inputs: Sequence[tuple], outputs: Sequence[tuple]) -> Callable:
    """A function of arrays as one of sharded arrays, each device computing it of its own parts: what the compiler cannot split itself.

    Args:
      function: `(*arrays) -> arrays`.
      inputs, outputs: for each array what its dimensions are: "batch", "heads" (or features by head) or None; the first two are split.
    """
    return _per_device.get()(function, inputs, outputs)


def axis_size(axis: str) -> int:
    """The size of an axis of the mesh of `compiling_for`: "tensor" splits heads, "seq" tokens; 1 without a mesh."""
    return _axes.get().get(axis, 1)


def platform() -> str:
    """The platform of `compiling_for`, else the default one."""
    return (_target.get() or (jax.default_backend(),))[0]


def takes_kernels(examples: int) -> bool:
    """Whether kernels for TPUs can be parts of the program, in which each device is known to hold whole examples of a batch of so many."""
    known = _target.get() is not None or jax.device_count() == 1
    shares = axis_size("slices") * axis_size("data") * axis_size("fsdp")
    return platform() == "tpu" and known and axis_size("seq") == 1 and examples % shares == 0


def differentiable(backend: str | None) -> str | None:
    """The backend that a network asks for; within `spans.forward_mode`, which fused kernels refuse, "reference" for all but "xla"."""
    return "reference" if in_forward_mode() and backend != "xla" else backend


def single_cpu() -> bool:
    """True for a program for one CPU device: nothing is sharded, and XLA's CPU compiler needs some hints."""
    return (_target.get() or (jax.default_backend(), 1)) == ("cpu", 1)
