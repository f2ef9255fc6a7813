"""Where arrays live: a mesh, and one table of rules from paths to shardings.

The axes of the mesh:

    slices   TPU slices that a data-centre network joins; each holds all parameters and takes its share of the batch
    data     the same within a slice
    fsdp     shares of the batch; parameters, optimizer state and average are split too, and gathered layer by layer
    seq      shares of every example: rows of images, tokens of sequences (for long token streams)
    tensor   shares of every layer: attention heads and MLP width

Parameters, optimizer state and their running average follow the table, which is applied once, from outside: no network, loss or
process knows of it.

    rules = [(r"mlp/in/", {"tensor": -1}), (r"head/kernel", PartitionSpec(None, "fsdp")), (".*", "fsdp")]
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmdiff.errors import UserError
from mmdiff.nets.target import compiling_for
from mmdiff.training.step import State, Step, init_state

AXES = ("slices", "data", "fsdp", "seq", "tensor")
ROWS = PartitionSpec(("slices", "data", "fsdp"))  # how the leading dimension of every batch array is split
FSDP_MIN_SIZE = 2**14  # arrays of fewer elements stay whole: gathering them costs more than they weigh

Rules = Sequence[tuple[str, PartitionSpec | str | Mapping[str, int | None]]]

# The transformers of `mmdiff.nets`: each device of the tensor axis computes some heads and some of the MLP's hidden units, so a
# block ends in two sums over the axis. The modulations, per example and not per token, are split by what they read.
TRANSFORMER: Rules = (
    (r"blocks?(_\d+)?/(\w+/)?(\w+_)?(q|kv|qkv|mlp/in)/kernel$", {"tensor": -1}),
    (r"blocks?(_\d+)?/(\w+/)?(\w+_)?(q|kv|qkv|mlp/in)/bias$", {"tensor": -1, "fsdp": None}),
    (r"blocks?(_\d+)?/(\w+/)?(\w+_)?(out|mlp/out|adaln)/kernel$", {"tensor": -2}),
    (".*", "fsdp"),
)


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `axes`, {"data": -1, "fsdp": 4}; one size may be -1: what the others leave.

    Neighbours in the last axes are neighbours in the machine: tensor parallelism talks most, slices least.

    Args:
      axes: the size of each axis; an axis that is left out has size 1.
      devices: what to use; by default every device of every process.

    Raises:
      UserError: an unknown axis, a bad size, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise UserError(f"the mesh has no axis {unknown[0]!r}: its axes are {', '.join(AXES)}.")
    sizes = {name: int(axes.get(name, 1)) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    wrong = [name for name, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(free) > 1:
        raise UserError(f"mesh sizes must be positive and at most one of them -1, not {_text(sizes)}.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"the mesh {_text(sizes)} does not fit the {len(devices)} device(s) here: "
            f"the sizes must multiply to {len(devices)} (config.train.mesh.data=-1 takes what the others leave)."
        )
    # Auto: the compiler places every intermediate. Networks are written for one device and say nothing of sharding.
    kinds = (AxisType.Auto,) * len(AXES)
    groups = _slices(devices, sizes["slices"])
    inner = [jax.make_mesh((1, *list(sizes.values())[1:]), AXES, axis_types=kinds, devices=group) for group in groups]
    return Mesh(np.concatenate([mesh.devices for mesh in inner]), AXES, axis_types=kinds)


def specs(tree: Any, rules: Rules | None, mesh: Mesh, *, min_size: int = FSDP_MIN_SIZE) -> Any:
    """The PartitionSpec of every leaf of `tree`, by its path.

    A path reads "params/params/blocks/mlp/kernel"; the optimizer's and the average's paths contain the parameters' own
    ("opt/0/mu/params/blocks/mlp/kernel"), so one rule, found by `re.search`, serves all three. The first match wins; a leaf
    without a match is replicated. "fsdp" splits the largest dimension that the fsdp axis divides (the last of equals), and
    leaves arrays below `min_size` elements whole. {"tensor": -1} splits the last dimension over the tensor axis (so it holds for
    one layer and for a stack of them) and one of the others as "fsdp" does, unless the rule names fsdp too (None: nowhere).

    Args:
      tree: a pytree of arrays or of their shapes.
      rules: pairs of a regular expression and a PartitionSpec, "fsdp", or a mapping from mesh axes to dimensions; `TRANSFORMER` if None.
      mesh: the mesh that the specs are for.
      min_size: the smallest array that "fsdp" splits.

    Raises:
      UserError: a rule that is none of these, or one that does not fit an array; it names the path.
    """

    rules = TRANSFORMER if rules is None else rules

    def spec(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next((rule for pattern, rule in rules if re.search(pattern, name)), PartitionSpec())
        if rule == "fsdp":
            rule = {}
        if isinstance(rule, Mapping):
            rule = _split(name, leaf.shape, rule, mesh, min_size)
        if not isinstance(rule, PartitionSpec):
            raise UserError(
                f"the sharding rule of {name} must be a PartitionSpec, 'fsdp' or a dict such as {{'tensor': -1}}, not {rule!r}."
            )
        _check(name, leaf.shape, rule, mesh)
        return rule

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, rules: Rules | None, mesh: Mesh, *, min_size: int = FSDP_MIN_SIZE) -> Any:
    """`specs` on the mesh: the NamedSharding of every leaf."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, rules, mesh, min_size=min_size))


def abstract_state(init: Callable, optimizer: Any, mesh: Mesh, rules: Rules | None, loss: Callable | None = None) -> State:
    """The shapes, types and shardings of the state, without any arrays: what checkpoints are restored onto. See `init_state`."""
    rules = TRANSFORMER if rules is None else rules
    named = {axis for _, rule in rules if isinstance(rule, (PartitionSpec, Mapping)) for axis in jax.tree.leaves(tuple(rule))}
    if mesh.shape["tensor"] > 1 and "tensor" not in named:
        raise UserError(
            f"the mesh has tensor={mesh.shape['tensor']}, but no sharding rule of this experiment names the tensor axis, so its devices "
            "would all do the same: set config.train.mesh.tensor=1, or add rules."
        )
    state = jax.eval_shape(lambda: init_state(init, optimizer, jax.random.key(0), loss))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings(state, rules, mesh)
    )


def check_memory(state: State, batch: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> None:
    """Raises UserError if a device has less memory than its share of the state and of one batch: said before anything is compiled.

    What a step needs besides is known once it is compiled, so this is a lower bound.
    """
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    rows = math.prod(mesh.shape[name] for name in ("slices", "data", "fsdp"))
    read = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(dict(batch))) / rows
    device = mesh.local_devices[0]
    if device.platform == "cpu":  # simulated devices share the memory of the machine
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(mesh.local_devices)
    else:
        memory = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    if held + read > memory:
        raise UserError(
            f"the training state takes {held / 1e9:,.3g} GB of each of {mesh.size} device(s) and a batch {read / 1e9:,.3g} GB, of "
            f"{memory / 1e9:,.3g} GB: choose a smaller network (config.model) or config.train.global_batch, or spread the state over more "
            "devices by config.train.mesh.fsdp.")


def place_state(
    init: Callable, optimizer: Any, key: jax.Array, mesh: Mesh, rules: Rules | None, loss: Callable | None = None
) -> State:
    """`init_state` on the mesh: each device makes its own part, no host ever holds the whole."""
    return lower_init(init, optimizer, key, mesh, rules, loss).compile()(key)


def lower_init(
    init: Callable, optimizer: Any, key: jax.Array, mesh: Mesh, rules: Rules | None, loss: Callable | None = None
) -> jax.stages.Lowered:
    """`init_state`, lowered for the mesh: `.compile()` gives the program `key -> state`."""
    target = jax.tree.map(lambda x: x.sharding, abstract_state(init, optimizer, mesh, rules, loss))
    return jax.jit(lambda key: init_state(init, optimizer, key, loss), out_shardings=target).lower(key)


def lower_step(step: Step, state: State, batch: Mapping[str, Any], mesh: Mesh) -> jax.stages.Lowered:
    """The step, lowered for the mesh: `.compile()` gives the program `(state, batch) -> (state, metrics)`.

    The state keeps its sharding and its memory (it is donated: the old state is gone after the call); the batch is split over
    slices, data and fsdp, and then over seq; metrics are replicated.

    Args:
      step: from `make_step`.
      state: the abstract state with shardings, from `abstract_state` (or a real one).
      batch: arrays or shapes of the *global* batch.
      mesh: where it will run; its devices may be descriptions only.
    """
    target = jax.tree.map(lambda x: x.sharding, state)
    parts = {name: NamedSharding(mesh, _sequence(array.shape, mesh)) for name, array in batch.items()}
    jitted = jax.jit(
        lambda state, batch: step(state, jax.lax.with_sharding_constraint(batch, parts)),
        in_shardings=(target, NamedSharding(mesh, ROWS)),
        out_shardings=(target, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    with target_of(mesh):
        return jitted.lower(state, batch)


def target_of(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """A context: networks that are traced inside are meant for the mesh (see `nets.target`)."""
    place = functools.partial(_place_activations, mesh=mesh)
    return compiling_for(mesh.devices.flat[0].platform, mesh.size, place, dict(mesh.shape))


def check_batch(global_batch: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises UserError, with the nearest batch that works, unless micro-batches and the mesh divide the global batch."""
    shares = {name: mesh.shape[name] for name in ROWS[0]}
    unit = math.prod(shares.values()) * microbatches
    if global_batch < 1 or global_batch % unit:
        nearest = max(1, round(global_batch / unit)) * unit
        raise UserError(
            f"the mesh does not divide the global batch {global_batch}: {_text(shares)} and {microbatches} micro-batch(es) "
            f"need a multiple of {unit}; the nearest is config.train.global_batch={nearest}."
        )


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch from the rows of each process (those that `process_rows` names), split over slices, data and fsdp."""
    sharding = NamedSharding(mesh, ROWS)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def process_rows(mesh: Mesh, global_batch: int) -> tuple[int, int]:
    """(p, P): this process feeds part p of the P equal parts of every global batch.

    P is the number of processes, except where the seq or tensor axis spans several of them: these need the same rows.
    """
    rows: dict[int, set] = {}
    for device, (index, *_) in NamedSharding(mesh, ROWS).devices_indices_map((global_batch,)).items():
        start, stop, _ = index.indices(global_batch)
        rows.setdefault(device.process_index, set()).add((start, stop))
    parts = sorted({tuple(sorted(ranges)) for ranges in rows.values()})
    if sum(len(part) for part in parts) != len(set().union(*parts)):
        raise UserError(
            "the mesh gives two processes different but overlapping parts of the batch: "
            "let seq x tensor divide, or be a multiple of, the devices of a process."
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def _split(name: str, shape: tuple[int, ...], axes: Mapping[str, int | None], mesh: Mesh, min_size: int) -> PartitionSpec:
    """The axes that are named at their dimensions, and fsdp, if it is not, on the largest of the others."""
    entries: list[str | None] = [None] * len(shape)
    for axis, dimension in axes.items():
        if dimension is None:
            continue
        if not -len(shape) <= dimension < len(shape):
            raise UserError(f"the sharding rule {dict(axes)} of {name} asks for dimension {dimension} of the shape {shape}.")
        if mesh.shape.get(axis) != 1:  # an axis of one device leaves its dimension to fsdp
            entries[dimension] = axis
    size = mesh.shape["fsdp"]
    free = [i for i, length in enumerate(shape) if entries[i] is None and length % size == 0]
    if "fsdp" not in axes and size > 1 and math.prod(shape) >= min_size and free:
        entries[max(free, key=lambda i: (shape[i], i))] = "fsdp"
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _sequence(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """ROWS, and seq on the second dimension where it divides it: rows of an image, tokens of a sequence."""
    spread = mesh.shape["seq"] > 1 and len(shape) > 1 and shape[1] % mesh.shape["seq"] == 0
    return PartitionSpec(*ROWS, "seq") if spread else ROWS


def _place_activations(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Activations stay where the rows of the batch are, and tokens [B, N, ...] over seq."""
    if mesh.size == 1 or x.shape[0] % math.prod(mesh.shape[name] for name in ROWS[0]):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _sequence(x.shape, mesh) if x.ndim > 2 else ROWS))


def _slices(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice: as a TPU tells, elsewhere equal runs of them in their order."""
    if devices[0].platform == "tpu":
        told = sorted({getattr(device, "slice_index", 0) for device in devices})
        if len(told) != count and len(told) > 1:
            raise UserError(f"the devices form {len(told)} slices, not {count}: set config.train.mesh.slices={len(told)}.")
        if len(told) == count:
            return [[device for device in devices if getattr(device, "slice_index", 0) == index] for index in told]
    size = len(devices) // count
    return [list(devices[i * size : (i + 1) * size]) for i in range(count)]


def _check(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise UserError(f"the sharding rule {spec} of {name} has more dimensions than its shape {shape}.")
    for length, entry in zip(shape, spec):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        unknown = [axis for axis in names if axis not in mesh.shape]
        if unknown:
            raise UserError(f"the sharding rule {spec} of {name} names {unknown[0]!r}: the mesh has {', '.join(mesh.shape)}.")
        size = math.prod(mesh.shape[axis] for axis in names)
        if length % size:
            raise UserError(
                f"the sharding rule {spec} of {name} splits a dimension of {length} in {size}, which does not divide it "
                f"(its shape is {shape}): change the rule or the mesh."
            )


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
