"""Ahead-of-time compilation of a training step for TPUs that are not available: `report(load, "v5e:4x4")`.

The step of `train` is compiled by the TPU compiler (the libtpu package) for a description of the chips. Memory and communication are
read from the compiled program; nothing is run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from mmdiff import config as configs
from mmdiff import console
from mmdiff.data.sources import RandomSource
from mmdiff.errors import UserError
from mmdiff.experiment import Experiment
from mmdiff.training import estimates, hlo, perf, sharding
from mmdiff.training.step import step_of

Load = Callable[[Mapping[str, str]], tuple[ml_collections.ConfigDict, Experiment]]

# The shapes on offer (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). Two cores of a v4 chip work as one ("megacore").
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16", "16x16x16")
TOPOLOGIES: Mapping[str, Sequence[str]] = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}
_OPTIONS = {"v4": {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}}

# Without these libtpu searches for a TPU and warns that there is none.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_LOG_DIR": "disabled",
}


def report(load: Load, topology: str, slices: int = 1) -> dict[str, Any]:
    """Memory, communication and roofline of a config's step on `slices` slices of a topology; if it does not fit, of a step that does.

    Args:
      load: `overrides -> (config, experiment)`: the config with these values replaced, {"train.global_batch": "512"}.
      topology: "v5e:4x4" and the like, see `TOPOLOGIES`.
      slices: how many slices, joined by the data-centre network.

    Returns plain values (`json.dumps` takes them), sizes in bytes, times in seconds. "memory" is per chip and in the compiler's words;
    "traffic" and "estimate" are those of `estimates.report`.
    If the step does not fit, there is "remedy": {"overrides": ..., **the report of the step with these} or None.

    Raises:
      UserError: no libtpu, an unknown topology, or a config that does not suit it.
    """
    chip, devices = describe(topology, slices)
    made = compile_step(load, chip, devices, slices)
    found = {"topology": topology, "slices": slices, **made.report()}
    if not made.fits:
        found["remedy"] = None
        for overrides, changed in remedies(load, chip, devices, slices, made):
            if changed.fits:
                found["remedy"] = {"overrides": overrides, **changed.report()}
                break
    return found


# ---- The topology ----


def describe(topology: str, slices: int = 1) -> tuple[perf.Chip, list[jax.Device]]:
    """The chip and the devices of a topology, one per chip; descriptions, on which nothing can run."""
    kind, _, shape = topology.partition(":")
    if shape not in TOPOLOGIES.get(kind, ()):
        known = {kind: TOPOLOGIES[kind]} if kind in TOPOLOGIES else TOPOLOGIES
        listed = "; ".join(f"{name}:{', '.join(shapes)}" for name, shapes in known.items())
        raise UserError(f"there is no topology {topology!r}: write KIND:SHAPE, such as v5e:4x4, out of {listed}.")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {**_OPTIONS.get(kind, {}), **({"num_slices": slices} if slices > 1 else {})}
    try:
        import libtpu  # noqa: F401  (jax finds it by itself, but says little if it is not there)

        devices = list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except ImportError as error:
        raise UserError("aot needs the TPU compiler: pip install 'mmdiff[tpu-aot]' (Linux on x86-64).") from error
    chip = perf.chip(devices[0].device_kind)
    return chip, devices


# ---- One step ----


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step, compiled or refused.

    Attributes:
      config, mesh, chip: what it was compiled for.
      parameters: how many.
      state: bytes per chip of the training state.
      memory: bytes per chip by kind; only the "total" that the compiler names, if it gave up.
      seconds: of compilation.
      flops: (model, hardware) of the whole step.
      program: what was compiled; None if it did not fit, or if the compiler could not write its text.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    chip: perf.Chip
    parameters: int
    state: int
    memory: Mapping[str, float]
    seconds: float
    flops: tuple[int, int]
    program: hlo.Program | None

    @property
    def fits(self) -> bool:
        return "temporaries" in self.memory and self.memory["total"] <= self.chip.memory

    def report(self) -> dict[str, Any]:
        train, chips = self.config.train, self.mesh.size
        found = {
            "chip": self.chip.name,
            "chips": chips,
            "mesh": dict(self.mesh.shape),
            "global_batch": train.global_batch,
            "images_per_chip": train.global_batch / chips,
            "microbatches": train.microbatches,
            "remat": self.config.get("model", {}).get("remat"),
            "parameters": self.parameters,
            "memory": {**self.memory, "capacity": self.chip.memory},
            "fits": self.fits,
            "compile_seconds": self.seconds,
            "model_flops": self.flops[0],
            "hardware_flops": self.flops[1],
        }
        if "temporaries" in self.memory:
            sent = perf.collective_costs(self.program, self.mesh, self.chip) if self.program else []
            counted = estimates.report(self.program, self.chip, chips, self.flops[0], sent)
            line = perf.roofline(self.chip, chips, *self.flops, counted["traffic"], sent)
            found |= {
                **counted,
                "collectives": [dataclasses.asdict(cost) for cost in sent],
                "intensity": line.intensity,
                "ridge": line.ridge,
                "roofline": {**line.seconds, "step": line.step_seconds, "limit": line.limit, "mfu": line.mfu},
                "images_per_second_per_chip": train.global_batch / chips / line.step_seconds,
            }
        return found


def mesh_of(config: ml_collections.ConfigDict, devices: Sequence[jax.Device], slices: int) -> Mesh:
    """The mesh of a config for these devices."""
    return sharding.make_mesh({**config.train.mesh, "slices": slices}, devices)


def compile_step(
    load: Load, chip: perf.Chip, devices: Sequence[jax.Device], slices: int, overrides: Mapping[str, str] = {}
) -> Compiled:
    """Builds and compiles the step of a config, just as `train` does, but for described devices and from shapes alone."""
    config, experiment = load(overrides)
    train = config.train
    mesh = mesh_of(config, devices, slices)
    sharding.check_batch(train.global_batch, mesh, train.microbatches)
    step = step_of(experiment, train)
    widths = tuple(train.get("ema_widths", ()))
    state = sharding.abstract_state(experiment.init, experiment.optimizer, mesh, experiment.rules, experiment.loss, widths)
    example = {**RandomSource(experiment.modalities).take([0]), "index": np.zeros(1, np.uint32)}
    batch = {name: jax.ShapeDtypeStruct((train.global_batch, *array.shape[1:]), array.dtype) for name, array in example.items()}
    flops = perf.model_flops(experiment.loss, state.params, batch, state.key), perf.flops(step, state, batch)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    shown = ", ".join(f"{key}={value}" for key, value in overrides.items()) or "the config as it is"
    console.say(f"compiling for {len(devices)} x {chip.name}: {shown}")
    began = time.perf_counter()
    try:
        lowered = sharding.lower_step(step, state, batch, mesh)
        compiled, program = estimates.compile_readable(lambda options: sharding.compile_lowered(lowered, mesh, options))
        memory = perf.compiled_memory(compiled)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        memory, program = {"total": needed}, None
    return Compiled(config, mesh, chip, parameters, held, memory, time.perf_counter() - began, flops, program)


def _needed(message: str) -> float | None:
    """The bytes in "... HLO temporaries (62.92G) exceeds available HBM ..." or "Used 20.5G of 15.75G hbm"; None if it says neither."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of \S+ hbm", message)
    if not found:
        return None
    number, unit = [part for part in found.groups() if part]
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)


# ---- Remedies ----


_CHEAPER = {"none": ("some", "full"), **dict.fromkeys(("auto", "some", "dots", "offload"), ("full",))}  # than a policy


def remedies(
    load: Load, chip: perf.Chip, devices: Sequence[jax.Device], slices: int, first: Compiled
) -> Iterator[tuple[dict[str, str], Compiled]]:
    """Compiles what needs less memory than `first`, which does not fit, the least change first: (overrides, step).

    Rematerialisation costs time, a larger fsdp axis communication; a smaller batch changes the training, so it comes last. Each
    compilation takes a minute or so: where the state alone is too large, the axis comes before rematerialisation, which would not help.
    """
    mesh, policy = first.mesh, configs.flatten(first.config).get("model.remat")
    changes = [{"model.remat": cheaper} for cheaper in _CHEAPER.get(policy, ())]
    whole = mesh.shape["data"] * mesh.shape["fsdp"]
    if mesh.shape["data"] > 1:
        changes.insert(0 if first.state > chip.memory else len(changes), {"train.mesh.data": "1", "train.mesh.fsdp": str(whole)})
    overrides, step = {}, first
    for change in changes:
        overrides = {**overrides, **change}
        step = compile_step(load, chip, devices, slices, overrides)
        yield overrides, step
    batch, least = first.config.train.global_batch, mesh.shape["slices"] * whole * first.config.train.microbatches
    while batch >= 2 * least:
        batch = max(1, batch // 2 // least) * least
        overrides = {**overrides, "train.global_batch": str(batch)}
        step = compile_step(load, chip, devices, slices, overrides)
        yield overrides, step


# ---- As text ----


def text(found: Mapping[str, Any]) -> str:
    """A report as text."""
    lines = [f"{found['slices']} x {found['topology']}" if found["slices"] > 1 else found["topology"], *_lines(found)]
    if not found["fits"]:
        remedy = found["remedy"]
        lines += ["", f"this fits: {flags(remedy['overrides'])}", *_lines(remedy)] if remedy else ["", "nothing that was tried fits"]
    return "\n".join(lines)


def flags(overrides: Mapping[str, Any]) -> str:
    """Values of a config as a shell takes them.

    >>> print(flags({"train.steps": 9, "train.ema_widths": "(0.05, 0.1)"}))
    --config.train.steps=9 '--config.train.ema_widths=(0.05, 0.1)'
    """
    return shlex.join(f"--config.{key}={value}" for key, value in overrides.items())


def _lines(found: Mapping[str, Any]) -> list[str]:
    memory, mesh = found["memory"], {name: size for name, size in found["mesh"].items() if size > 1}
    rows = [
        ("chips", f"{found['chips']} x {found['chip']}, mesh {', '.join(f'{k}={v}' for k, v in mesh.items()) or 'of one'}"),
        ("batch", f"{found['global_batch']}, {found['images_per_chip']:g} per chip"),
        ("remat", found["remat"] or "-"),
        ("parameters", f"{found['parameters']:,}"),
        ("memory per chip", ", ".join(f"{kind} {_gb(memory[kind])}" for kind in memory if kind not in ("total", "capacity"))),
        ("  total", f"{_gb(memory['total'])} of {_gb(memory['capacity'])}: {'fits' if found['fits'] else 'DOES NOT FIT'}"),
        ("FLOPs per step", f"{found['model_flops']:.4g} of the model, {found['hardware_flops']:.4g} of the hardware"),
        ("compiled in", f"{found['compile_seconds']:.0f} s"),
    ]
    if "roofline" in found:
        line = found["roofline"]
        for sent in found["collectives"]:
            where = " + ".join(sent["axes"]) + (" (network)" if sent["network"] else "")
            exposed = f", {_ms(sent['exposed'])} of it not overlapped" if sent["exposed"] else ""
            rows.append((f"  {sent['kind']}", f"{_gb(sent['bytes'])} over {where}, {_ms(sent['seconds'])}{exposed}"))
        if found["traffic"] is not None:
            balance = f"{found['intensity']:.0f} FLOPs a byte (the chip balances at {found['ridge']:.0f})"
            rows.append(("main memory", f"{_gb(found['traffic'])}, {balance}"))
        rows += [
            ("roofline", ", ".join(f"{name} {_ms(line[name])}" for name in ("compute", "memory", "links", "network") if name in line)),
            ("  step", f"{_ms(line['step'])} at least, bound by {line['limit']}: MFU up to {line['mfu']:.1%}"),
            ("  images/s/chip", f"up to {found['images_per_second_per_chip']:.4g}"),
            *estimates.rows(found),
        ]
    return [f"{name:<22}{value}" for name, value in rows if value]  # of a step that does not fit, only the total is known


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
