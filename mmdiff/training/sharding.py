"""Where arrays live: a mesh with the axes data, fsdp and tensor, and one table of rules from paths to shardings.

The batch is split over data and fsdp. Parameters, optimizer state and their running average follow the table, which is applied
once, from outside: no network, loss or process knows of it.

    rules = [(r"mlp/.*kernel", PartitionSpec(None, "tensor")), (".*", "fsdp")]
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmdiff.errors import UserError
from mmdiff.training.step import State, Step, init_state

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # how the leading dimension of every batch array is split
FSDP_MIN_SIZE = 2**14  # arrays of fewer elements stay whole: gathering them costs more than they weigh

Rules = Sequence[tuple[str, PartitionSpec | str]]


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `axes`, {"data": -1, "fsdp": 1, "tensor": 1}; one size may be -1: what the others leave.

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
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def specs(tree: Any, rules: Rules, mesh: Mesh, *, min_size: int = FSDP_MIN_SIZE) -> Any:
    """The PartitionSpec of every leaf of `tree`, by its path.

    A path reads "params/params/blocks/mlp/kernel"; the optimizer's and the average's paths contain the parameters' own
    ("opt/0/mu/params/blocks/mlp/kernel"), so one rule, found by `re.search`, serves all three. The first match wins; a leaf
    without a match is replicated. "fsdp" splits the largest dimension that the fsdp axis divides (the last of equals), and
    leaves arrays below `min_size` elements whole.

    Args:
      tree: a pytree of arrays or of their shapes.
      rules: pairs of a regular expression and a PartitionSpec or "fsdp".
      mesh: the mesh that the specs are for.
      min_size: the smallest array that "fsdp" splits.

    Raises:
      UserError: a rule that is neither, or a PartitionSpec that does not fit an array; it names the path.
    """

    def spec(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next((rule for pattern, rule in rules if re.search(pattern, name)), PartitionSpec())
        if rule == "fsdp":
            return _fsdp(leaf.shape, mesh.shape["fsdp"], min_size)
        if not isinstance(rule, PartitionSpec):
            raise UserError(f"the sharding rule of {name} must be a PartitionSpec or 'fsdp', not {rule!r}.")
        _check(name, leaf.shape, rule, mesh)
        return rule

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, rules: Rules, mesh: Mesh, *, min_size: int = FSDP_MIN_SIZE) -> Any:
    """`specs` on the mesh: the NamedSharding of every leaf."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, rules, mesh, min_size=min_size))


def abstract_state(init: Callable, optimizer: Any, mesh: Mesh, rules: Rules) -> State:
    """The shapes, types and shardings of the state, without any arrays: what checkpoints are restored onto."""
    named = {axis for _, rule in rules if isinstance(rule, PartitionSpec) for axis in jax.tree.leaves(tuple(rule))}
    if mesh.shape["tensor"] > 1 and "tensor" not in named:
        raise UserError(
            f"the mesh has tensor={mesh.shape['tensor']}, but no sharding rule of this experiment names the tensor axis, so its devices "
            "would all do the same: set config.train.mesh.tensor=1, or add rules."
        )
    state = jax.eval_shape(lambda: init_state(init, optimizer, jax.random.key(0)))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings(state, rules, mesh)
    )


def place_state(init: Callable, optimizer: Any, key: jax.Array, mesh: Mesh, rules: Rules) -> State:
    """`init_state` on the mesh: each device makes its own part, no host ever holds the whole."""
    target = jax.tree.map(lambda x: x.sharding, abstract_state(init, optimizer, mesh, rules))
    return jax.jit(lambda key: init_state(init, optimizer, key), out_shardings=target)(key)


def lower_step(step: Step, state: State, batch: Mapping[str, Any], mesh: Mesh) -> jax.stages.Lowered:
    """The step, lowered for the mesh: `.compile()` gives the program `(state, batch) -> (state, metrics)`.

    The state keeps its sharding and its memory (it is donated: the old state is gone after the call); the batch is split over
    data and fsdp; metrics are replicated.

    Args:
      step: from `make_step`.
      state: the abstract state with shardings, from `abstract_state` (or a real one).
      batch: arrays or shapes of the *global* batch.
      mesh: where it will run; its devices may be descriptions only.
    """
    target = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(
        step,
        in_shardings=(target, NamedSharding(mesh, ROWS)),
        out_shardings=(target, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    return jitted.lower(state, batch)


def check_batch(global_batch: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises UserError, with the nearest batch that works, unless micro-batches and the mesh divide the global batch."""
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * microbatches
    if global_batch < 1 or global_batch % unit:
        nearest = max(1, round(global_batch / unit)) * unit
        raise UserError(
            f"the mesh does not divide the global batch {global_batch}: data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x "
            f"{microbatches} micro-batch(es) need a multiple of {unit}; the nearest is config.train.global_batch={nearest}."
        )


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch from the rows of each process (those that `process_rows` names), split over data and fsdp."""
    sharding = NamedSharding(mesh, ROWS)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def process_rows(mesh: Mesh, global_batch: int) -> tuple[int, int]:
    """(p, P): this process feeds part p of the P equal parts of every global batch.

    P is the number of processes, except where the tensor axis spans several of them: these need the same rows.
    """
    rows: dict[int, set] = {}
    for device, (index, *_) in NamedSharding(mesh, ROWS).devices_indices_map((global_batch,)).items():
        start, stop, _ = index.indices(global_batch)
        rows.setdefault(device.process_index, set()).add((start, stop))
    parts = sorted({tuple(sorted(ranges)) for ranges in rows.values()})
    if sum(len(part) for part in parts) != len(set().union(*parts)):
        raise UserError(
            "the mesh gives two processes different but overlapping parts of the batch: "
            "let the tensor axis divide, or be a multiple of, the devices of a process."
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def _fsdp(shape: tuple[int, ...], size: int, min_size: int) -> PartitionSpec:
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or math.prod(shape) < min_size or not divisible:
        return PartitionSpec()
    axis = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*[None] * axis, "fsdp")


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
