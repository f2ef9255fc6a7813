"""Device meshes, and the sharding of training states by one table of rules.

The axes of the mesh:

    slices   data parallelism over TPU slices, which the data-centre network joins; each holds all parameters
    data     data parallelism within a slice
    fsdp     data parallelism with parameters, optimizer state and EMA sharded, and gathered layer by layer
    seq      sequence parallelism: rows of images, tokens of sequences (for long token streams)
    tensor   tensor parallelism: attention heads and MLP hidden units

Rules map paths in the training state to shardings; they are applied once, from outside: no network, loss or process imports this module.

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
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmdiff.errors import UserError
from mmdiff.nets.target import compiling_for
from mmdiff.training.step import State, Step, init_state

AXES = ("slices", "data", "fsdp", "seq", "tensor")
BATCH_SPEC = PartitionSpec(("slices", "data", "fsdp"))  # of the leading dimension of every batch array
FSDP_MIN_SIZE = 2**14  # smaller arrays are replicated: gathering them costs more than the memory is worth

Rules = Sequence[tuple[str, PartitionSpec | str | Mapping[str, int | None]]]

# The transformers of `mmdiff.nets`: each device of the tensor axis computes some heads and some hidden units of the MLP, so a block has
# two all-reduces over the axis (Megatron-LM, Shoeybi et al. 2019). Modulations, and the layers of long skips, are split along their inputs.
TRANSFORMER_RULES: Rules = (
    (r"blocks?(_\d+)?/(\w+/)?(\w+_)?(q|kv|qkv|mlp/in)/kernel$", {"tensor": -1}),
    (r"blocks?(_\d+)?/(\w+/)?(\w+_)?(q|kv|qkv|mlp/in)/bias$", {"tensor": -1, "fsdp": None}),
    (r"blocks?(_\d+)?/(\w+/)?(\w+_)?(out|mlp/out|adaln|skip)/kernel$", {"tensor": -2}),
    (".*", "fsdp"),
)


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with the sizes `axes`, e.g. {"data": -1, "fsdp": 4}.

    Neighbours along the last axes are neighbours in the machine: tensor parallelism communicates most, slices least.

    Args:
      axes: the size of each axis, 1 by default; one may be -1: the devices that the others leave.
      devices: by default all devices of all processes.

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
    shape = 1, *list(sizes.values())[1:]  # of a slice; an axis of 16 may lie in an 8x8 machine, which jax.make_mesh refuses for v6e
    placed = [mesh_utils.create_device_mesh(shape, group, allow_split_physical_axes=True) for group in groups]
    return Mesh(np.concatenate(placed), AXES, axis_types=kinds)


def partition_specs(tree: Any, rules: Rules | None, mesh: Mesh, *, min_size: int = FSDP_MIN_SIZE) -> Any:
    """The PartitionSpec of every leaf of `tree`, by its path.

    A path is e.g. "params/params/blocks/mlp/kernel"; paths of the optimizer state and of the EMA end in those of the parameters
    ("opt/0/mu/params/blocks/mlp/kernel"), so one rule (`re.search`) serves all three. The first match wins; a leaf without one is
    replicated. A rule is

        PartitionSpec(...)   as it is
        "fsdp"               the largest dimension that the fsdp axis divides (the last of equals); arrays below `min_size` are replicated
        {"tensor": -1}       the tensor axis at the last dimension (of one layer or of a scanned stack), fsdp at another; with
                             "fsdp": None at none

    Args:
      tree: a pytree of arrays or of their shapes.
      rules: (regular expression, rule) pairs, `TRANSFORMER_RULES` if None.
      mesh: of the specs.
      min_size: elements of the smallest array that "fsdp" splits.

    Raises:
      UserError: a rule of another kind, or one that does not fit an array; it names the path.

    >>> mesh = make_mesh({"data": -1}, jax.devices()[:1])
    >>> tuple(partition_specs({"kernel": np.zeros((4, 2))}, [("kernel", PartitionSpec(None, "data"))], mesh)["kernel"])
    (None, 'data')
    """
    rules = TRANSFORMER_RULES if rules is None else rules

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
    """`partition_specs` on the mesh: the NamedSharding of every leaf."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, rules, mesh, min_size=min_size))


def abstract_state(
    init: Callable, optimizer: Any, mesh: Mesh, rules: Rules | None, loss: Callable | None = None, widths: Sequence[float] = ()
) -> State:
    """The training state as `jax.ShapeDtypeStruct`s with shardings, for compilation and restoring. Arguments as of `init_state`."""
    rules = TRANSFORMER_RULES if rules is None else rules
    named = {axis for _, rule in rules if isinstance(rule, (PartitionSpec, Mapping)) for axis in jax.tree.leaves(tuple(rule))}
    if mesh.shape["tensor"] > 1 and "tensor" not in named:
        raise UserError(
            f"the mesh has tensor={mesh.shape['tensor']}, but no sharding rule of this experiment names the tensor axis, so its devices "
            "would all compute the same: set config.train.mesh.tensor=1, or add rules."
        )
    state = jax.eval_shape(lambda: init_state(init, optimizer, jax.random.key(0), loss, widths))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings(state, rules, mesh)
    )


def check_memory(state: State, batch: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> None:
    """Raises UserError, before anything is compiled, if a device has less memory than its shard of the state and of one batch.

    A lower bound: temporaries are known after compilation only.
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


def init_sharded_state(
    init: Callable, optimizer: Any, key: jax.Array, mesh: Mesh, rules: Rules | None, loss: Callable | None = None,
    widths: Sequence[float] = (),
) -> State:
    """`init_state` on the mesh: each device initialises its own shard; no host holds the whole state."""
    return lower_init(init, optimizer, key, mesh, rules, loss, widths).compile()(key)


def lower_init(
    init: Callable, optimizer: Any, key: jax.Array, mesh: Mesh, rules: Rules | None, loss: Callable | None = None,
    widths: Sequence[float] = (),
) -> jax.stages.Lowered:
    """`init_state` lowered for the mesh; `.compile()` returns the program `key -> state`."""
    target = jax.tree.map(lambda x: x.sharding, abstract_state(init, optimizer, mesh, rules, loss, widths))
    with compiling_for_mesh(mesh):
        return jax.jit(lambda key: init_state(init, optimizer, key, loss, widths), out_shardings=target).lower(key)


def lower_step(step: Step, state: State, batch: Mapping[str, Any], mesh: Mesh) -> jax.stages.Lowered:
    """A training step lowered for the mesh; `.compile()` returns the program `(state, batch) -> (state, metrics)`.

    The state is donated and keeps its sharding; the batch is sharded over slices, data and fsdp, and then over seq; metrics are
    replicated.

    Args:
      step: from `make_step`.
      state: the abstract state with shardings, from `abstract_state` (or a real one).
      batch: arrays or shapes of the *global* batch.
      mesh: of devices or of their descriptions.
    """
    target = jax.tree.map(lambda x: x.sharding, state)
    parts = {name: NamedSharding(mesh, _sequence(array.shape, mesh)) for name, array in batch.items()}
    jitted = jax.jit(
        lambda state, batch: step(state, jax.lax.with_sharding_constraint(batch, parts)),
        in_shardings=(target, NamedSharding(mesh, BATCH_SPEC)),
        out_shardings=(target, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    with compiling_for_mesh(mesh):
        return jitted.lower(state, batch)


def compile_lowered(lowered: jax.stages.Lowered, mesh: Mesh, options: Mapping[str, Any] = {}) -> jax.stages.Compiled:
    """`lowered.compile(options)`, on TPUs with an option more that halves the traffic of some FSDP steps.

    Without it the compiler may turn the gathering of weights into rings of small products. Along `tensor` they hide communication: stays.
    """
    rings_off = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    if mesh.devices.flat[0].platform == "tpu" and mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] == 1:
        try:
            return lowered.compile({**options, **rings_off})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):  # of another version of the compiler
                raise
    return lowered.compile(dict(options) or None)


def compiling_for_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """A context: networks that are traced inside are for the mesh (see `nets.target`)."""
    by_mesh = functools.partial(_constrain, mesh=mesh), dict(mesh.shape), functools.partial(_per_device, mesh=mesh)
    return compiling_for(mesh.devices.flat[0].platform, mesh.size, *by_mesh)


def check_batch(global_batch: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises UserError, naming the nearest batch size that works, unless micro-batches and the mesh divide the global batch."""
    shares = {name: mesh.shape[name] for name in BATCH_SPEC[0]}
    unit = math.prod(shares.values()) * microbatches
    if global_batch < 1 or global_batch % unit:
        nearest = max(1, round(global_batch / unit)) * unit
        raise UserError(
            f"the mesh does not divide the global batch {global_batch}: {_text(shares)} and {microbatches} micro-batch(es) "
            f"need a multiple of {unit}; the nearest is config.train.global_batch={nearest}."
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch as sharded arrays, from the rows that each process has loaded (see `process_shard`)."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def process_shard(mesh: Mesh, global_batch: int) -> tuple[int, int]:
    """(p, P): this process loads part p of P equal parts of every global batch.

    P is the number of processes, except where the seq or tensor axis spans several: these load the same rows.
    """
    rows: dict[int, set] = {}
    for device, (index, *_) in NamedSharding(mesh, BATCH_SPEC).devices_indices_map((global_batch,)).items():
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
    """The spec of a mapping from axes to dimensions, with fsdp, unless it is named, at the largest of the others."""
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
    """BATCH_SPEC, and seq at the second dimension where it divides it: rows of an image, tokens of a sequence."""
    spread = mesh.shape["seq"] > 1 and len(shape) > 1 and shape[1] % mesh.shape["seq"] == 0
    return PartitionSpec(*BATCH_SPEC, "seq") if spread else BATCH_SPEC


def _constrain(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Activations sharded as the batch, tokens [B, N, ...] also over seq."""
    if mesh.size == 1 or x.shape[0] % math.prod(mesh.shape[name] for name in BATCH_SPEC[0]):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _sequence(x.shape, mesh) if x.ndim > 2 else BATCH_SPEC))


def _per_device(function: Callable, inputs: Sequence[tuple], outputs: Sequence[tuple], mesh: Mesh) -> Callable:
    """See `nets.target.per_device`."""
    if mesh.size == 1:
        return function
    axes = {"batch": BATCH_SPEC[0], "heads": "tensor", None: None}
    inputs, outputs = (tuple(PartitionSpec(*(axes[kind] for kind in kinds)) for kinds in each) for each in (inputs, outputs))
    return jax.shard_map(lambda *arrays: tuple(function(*arrays)), mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def _slices(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice: by a TPU's slice index, elsewhere equal consecutive groups."""
    if devices[0].platform == "tpu":
        found = sorted({getattr(device, "slice_index", 0) for device in devices})
        if len(found) != count and len(found) > 1:
            raise UserError(f"the devices form {len(found)} slices, not {count}: set config.train.mesh.slices={len(found)}.")
        if len(found) == count:
            return [[device for device in devices if getattr(device, "slice_index", 0) == index] for index in found]
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
