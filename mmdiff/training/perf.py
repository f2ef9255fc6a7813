"""Limits of a step's speed: the chips' datasheets, FLOPs counted over a jaxpr, memory and roofline of a compiled program."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh

from mmdiff.nets.target import compiling_for
from mmdiff.training import hlo

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's datasheet, in FLOP/s, bytes and bytes/s.

    Attributes:
      name: its common name.
      kinds: a regular expression for `jax.Device.device_kind`.
      flops: dense products with bfloat16 factors (float16 on T4).
      memory: bytes that a program may use.
      bandwidth: of that memory.
      link: of one link to a neighbouring TPU, one way; 0 for what is no TPU.
      network: of the data-centre network, per chip and one way.
      torus: the number of dimensions in which TPUs have neighbours.
      clock: cycles a second of a TPU's cores; 0 for what is no TPU.
    """

    name: str
    kinds: str
    flops: float
    memory: float
    bandwidth: float
    link: float = 0.0
    network: float = 0.0
    torus: int = 0
    clock: float = 0.0


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Memory is what the compiler of libtpu 0.0.52 allows ("exceeds available HBM
# (15.75G)"), a little below the 32, 16, 95 and 32 GiB there. A link's rate is that page's "bidirectional ICI bandwidth per chip" over
# 2 directions and the 4 links of a 2-d torus or 6 of a 3-d one (v5e 400 GB/s, v5p 1200, v6e 3200 Gbit/s one way; v4: 50 GB/s, Jouppi
# et al. 2023, table 4). The network: v5e 2 x 100 Gbit/s and v6e 4 x 200 Gbit/s per host of 8 chips, v5p 50 Gbit/s per chip, v4 taken
# as v5p. Clocks: Jouppi et al. 2023 (v4), those pages (v5p 1.75 GHz, v5e 1.5); v6e: its FLOP/s over the 4 x 256 x 256 x 2 of a cycle.
# NVIDIA: the datasheets of the boards named, halved where they quote sparsity.
CHIPS = (
    Chip("v4", r"TPU v4$", 275e12, 30.75 * GIB, 1200e9, 50e9, 6.25e9, 3, 1.05e9),
    Chip("v5e", r"TPU v5 ?(lite|e)", 197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, 2, 1.5e9),
    Chip("v5p", r"TPU v5p?$", 459e12, 95.73 * GIB, 2765e9, 100e9, 6.25e9, 3, 1.75e9),
    Chip("v6e", r"TPU v6 ?(lite|e)", 918e12, 31.24 * GIB, 1600e9, 100e9, 12.5e9, 2, 1.75e9),
    Chip("A100 40GB", r"A100-SXM.*40GB", 312e12, 40e9, 1555e9),
    Chip("A100 80GB", r"A100-SXM.*80GB", 312e12, 80e9, 2039e9),
    Chip("H100 SXM", r"H100 80GB HBM3", 989e12, 80e9, 3350e9),
    Chip("H200", r"^NVIDIA H200$", 989e12, 141e9, 4800e9),
    Chip("B200", r"^NVIDIA B200$", 2250e12, 180e9, 7700e9),
    Chip("L4", r"NVIDIA L4$", 121e12, 24e9, 300e9),
    Chip("T4", r"T4$", 65e12, 16e9, 320e9),
)


def chip(device_kind: str) -> Chip | None:
    """The row of `CHIPS` for a `jax.Device.device_kind`, or None.

    >>> chip("TPU v5 lite").name
    'v5e'
    """
    return next((row for row in CHIPS if re.search(row.kinds, device_kind)), None)


# ---- FLOPs ----


def flops(function: Callable, *args: Any) -> int:
    """The floating-point operations of the products in `function(*args)`: 2 per multiply-add of every dot product and convolution.

    Counted over the jaxpr: a scan's body as often as it runs, the longest branch of a cond, and whatever a rematerialised layer
    computes again. Element-wise work is not counted. It is the whole computation's, however many devices share it, and is counted
    with the attention written out, whatever kernel will run.

    >>> flops(jnp.matmul, jnp.zeros((2, 3)), jnp.zeros((3, 5)))
    60

    Args:
      function: any function of arrays.
      args: its arguments, or their shapes (`jax.ShapeDtypeStruct`).

    Raises:
      ValueError: products inside a while loop, whose number of rounds a jaxpr does not say.
    """
    return _traced(function, *args).total()


def main_type(function: Callable, *args: Any) -> np.dtype:
    """The dtype of the factors in most of those operations; float32 if there are none."""
    by_type: Counter = Counter()
    for (dtype, _), count in _traced(function, *args).items():
        by_type[dtype] += count
    return max(by_type, key=by_type.__getitem__, default=np.dtype("float32"))


def flops_and_passes(function: Callable, *args: Any) -> tuple[int, int]:
    """(`flops`, the operations on factors of bfloat16 that a TPU makes of them): 6 for each of a float32 product of the highest precision.

    >>> with jax.default_matmul_precision("highest"):
    ...     flops_and_passes(jnp.matmul, jnp.zeros((2, 3)), jnp.zeros((3, 5)))
    (60, 360)
    """
    counted = _traced(function, *args)
    return counted.total(), sum(passes * count for (_, passes), count in counted.items())


def model_flops(loss: Callable, *args: Any) -> int:
    """FLOPs of a training step without rematerialisation: 3 times the loss's, since its gradient takes two products for each of its own.

    The usual convention for MFU: rematerialisation, the optimizer and element-wise operations do not count, nor do stopped gradients.

    >>> model_flops(lambda w, x: (x @ w).sum(), jnp.zeros((4, 8)), jnp.zeros((2, 4)))
    384
    """
    leaves, structure = jax.tree.flatten(args)
    moving = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def both(leaves):
        def scalar(moved):
            placed = dict(zip(moving, moved))
            out = loss(*jax.tree.unflatten(structure, [placed.get(i, leaf) for i, leaf in enumerate(leaves)]))
            return out[0] if isinstance(out, tuple) else out

        # The gradient takes the products of the derivative in one direction; that of the data counts, too, by the convention.
        values = [leaves[i] for i in moving]
        return jax.jvp(scalar, (values,), (values,))

    jaxpr = _jaxpr(both, leaves)
    return _flops(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]).total()  # without derivatives that end at a stop


def _jaxpr(function: Callable, *args: Any) -> Jaxpr:
    with compiling_for("cpu"):
        return jax.make_jaxpr(function)(*args).jaxpr


def _traced(function: Callable, *args: Any) -> Counter:
    return _flops(_jaxpr(function, *args))


def _flops(jaxpr: Jaxpr) -> Counter:
    """Operations by the type of their factors and how often a TPU makes them."""
    return sum((_equation_flops(equation) for equation in jaxpr.eqns), Counter())


def _equation_flops(equation: Any) -> Counter:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        factor = equation.invars[0].aval
        count = 2 * equation.outvars[0].aval.size * math.prod(factor.shape[axis] for axis in contracted)
        return Counter({(factor.dtype, _passes(factor, params)): count})
    if name == "conv_general_dilated":
        # Each output sums over the kernel's window and input features; zeros put between the inputs cost nothing.
        kernel, axes = equation.invars[1].aval, params["dimension_numbers"].rhs_spec
        summed = math.prod(kernel.shape[axis] for axis in axes[1:])
        count = 2 * equation.outvars[0].aval.size * summed // math.prod(params["lhs_dilation"])
        return Counter({(kernel.dtype, _passes(kernel, params)): count})
    inner = [_flops(getattr(part, "jaxpr", part)) for part in _jaxprs(params)]
    if name == "while" and any(inner):
        raise ValueError("products in a while loop cannot be counted: write it as a scan, or as a fori_loop with fixed bounds.")
    if name == "cond":
        return max(inner, key=Counter.total)
    rounds = params["length"] if name == "scan" else 1
    return Counter({key: count * rounds for key, count in sum(inner, Counter()).items()})


def _passes(factor: Any, params: Mapping[str, Any]) -> int:
    """How many products of bfloat16 make one of these factors at this precision."""
    precision = params["precision"]
    precision = precision[0] if isinstance(precision, tuple) else precision
    return {jax.lax.Precision.HIGHEST: 6, jax.lax.Precision.HIGH: 3}.get(precision, 1) if factor.dtype == np.float32 else 1


def _jaxprs(params: Any) -> list[ClosedJaxpr | Jaxpr]:
    return [leaf for leaf in jax.tree.leaves(list(params.values())) if isinstance(leaf, (ClosedJaxpr, Jaxpr))]


# ---- Communication ----


@dataclasses.dataclass(frozen=True)
class CollectiveCost:
    """Collectives of one kind over the same axes of the mesh, in one step.

    Attributes:
      kind: "all-gather" and the like.
      axes: the axes along which the devices of a group differ.
      bytes: sent by a chip.
      seconds: at least, with all links towards the group busy; 0 where the links are unknown.
      network: over the data-centre network.
      exposed: of these seconds those of synchronous instructions, which overlap with nothing.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    seconds: float
    network: bool = False
    exposed: float = 0.0


def collective_costs(program: hlo.Program, mesh: Mesh, chip: Chip) -> list[CollectiveCost]:
    """What each chip sends in a step, by kind and axes, the most bytes first.

    Of b bytes in each of n devices, the usual rings send: all-gather (n - 1) b, reduce-scatter and all-to-all (n - 1) / n b,
    all-reduce 2 (n - 1) / n b; a permutation sends b where it has a target, here the mean over the chips. Between slices the same
    formulas hold, with one device per slice.
    """
    total: dict[tuple, list[float]] = {}
    for collective in program.collectives():
        if collective.network:
            axes, count, rate = ("slices",), mesh.shape["slices"], chip.network
        else:
            axes, count = _axes(collective.groups, mesh), collective.groups.shape[1]
            rate = chip.link * _links(axes, mesh, chip)
        sent = collective.times * collective.bytes * _share(collective, count, mesh.size)
        entry = total.setdefault((collective.kind, axes, collective.network), [0.0, 0.0, 0.0])
        seconds = sent / rate if rate else 0.0
        for i, part in enumerate((sent, seconds, seconds * collective.synchronous)):
            entry[i] += part
    found = [CollectiveCost(*key[:2], *entry[:2], key[2], entry[2]) for key, entry in total.items() if entry[0]]
    return sorted(found, key=lambda cost: -cost.bytes)


def _share(collective: hlo.Collective, count: int, devices: int) -> float:
    """Bytes that a device sends per byte of its operands."""
    if collective.kind == "collective-permute":
        return float((collective.groups[:, 0] != collective.groups[:, 1]).sum() / devices)
    return {
        "all-gather": count - 1,
        "all-reduce": 2 * (count - 1) / count,
        "reduce-scatter": (count - 1) / count,
        "all-to-all": (count - 1) / count,
        "ragged-all-to-all": (count - 1) / count,
    }.get(collective.kind, 1.0)


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh along which the members of a group differ."""
    places = np.unravel_index(groups, mesh.devices.shape)
    return tuple(name for name, place in zip(mesh.axis_names, places) if (place != place[:, :1]).any())


def _links(axes: Sequence[str], mesh: Mesh, chip: Chip) -> int:
    """How many links the worst placed chip has towards its partners along these axes.

    One per dimension of the machine in which they lie, and two where that dimension closes to a ring: on 2-d TPUs if it is 16 long,
    on 3-d ones if all are multiples of 4.
    """
    if not hasattr(mesh.devices.flat[0], "coords"):
        return 0
    partners = mesh.devices[tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)]
    sizes = np.max([device.coords for device in mesh.devices.flat], axis=0) + 1
    extents = [len(set(values)) for values in zip(*(device.coords for device in partners.flat))]
    rings = [size == 16 if chip.torus == 2 else (sizes % 4 == 0).all() for size in sizes]
    return sum(1 + (ring and extent == size) for extent, size, ring in zip(extents, sizes, rings) if extent > 1)


# ---- Memory and the roofline ----


def compiled_memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Bytes per device by kind, and their "total": outputs that alias (donated) arguments count once; the program is in memory, too."""
    stats = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return {**memory, "total": sum(memory.values()) - 2 * memory["aliased"]}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a step: every resource at its datasheet's rate, all at once (Williams et al. 2009).

    Attributes:
      model_flops, hardware_flops: of the whole step, all chips together.
      seconds: by resource: "compute", "memory", "links", "network"; "compute" alone where the traffic is unknown.
      intensity: FLOPs per byte of main memory; None where the traffic is unknown.
      ridge: the intensity at which the chip's compute and memory take equally long.
    """

    model_flops: int
    hardware_flops: int
    seconds: Mapping[str, float]
    intensity: float | None
    ridge: float
    mfu: float

    @property
    def limit(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def step_seconds(self) -> float:
        return self.seconds[self.limit]


def roofline(
    chip: Chip, chips: int, model_flops: int, hardware_flops: int, traffic: float | None, sent: Sequence[CollectiveCost] = ()
) -> Roofline:
    """The `Roofline` of a step with these FLOPs in all, and this traffic and these collectives per chip; None is unknown traffic."""
    seconds, intensity = {"compute": hardware_flops / chips / chip.flops}, None
    if traffic is not None:
        intensity = hardware_flops / chips / traffic
        seconds |= {
            "memory": traffic / chip.bandwidth,
            "links": sum(cost.seconds for cost in sent if not cost.network),
            "network": sum(cost.seconds for cost in sent if cost.network),
        }
    mfu = model_flops / chips / chip.flops / max(seconds.values())
    return Roofline(model_flops, hardware_flops, seconds, intensity, chip.flops / chip.bandwidth, mfu)
