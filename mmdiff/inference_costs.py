"""What sampling and encoding cost at least on TPUs that are not available: `report(config, experiment, "sample", "v5e:4x4", 50_000)`.

The programs of `mmdiff sample --format` and `mmdiff cache` are compiled by the TPU compiler, each for one chip, since every chip computes
batches of its own. Their roofline bounds the images of a second; nothing is run, and reading and writing files is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import SingleDeviceSharding

from mmdiff import console
from mmdiff.data.named_autoencoders import SquareImages, part_of
from mmdiff.data.sources import RandomSource
from mmdiff.encoders.published_configs import built
from mmdiff.encoders.published_kinds import KINDS
from mmdiff.errors import UserError
from mmdiff.experiment import Experiment
from mmdiff.nets.target import compiling_for
from mmdiff.training import aot, estimates, perf

Program = tuple[str, int, Callable, tuple]  # what it is, the images of a call, the function and its arguments


def report(config: ml_collections.ConfigDict, experiment: Experiment, way: str, topology: str, number: int, batch: int) -> dict[str, Any]:
    """The least time in which the chips of a topology sample or encode so many images.

        seconds = number / chips * sum over programs of roofline seconds a call / images a call

    Args:
      way: "sample", of the config's conditions by config.sample's steps and guidance, and decoded where there is an autoencoder; or
        "encode", by the networks that `mmdiff cache` uses on images. Without its path an autoencoder is the first published of its kind.
      topology: as `aot.report` takes it. number: of images. batch: samples that a chip computes at once.

    Returns plain values: "programs" (each with "memory", "model_flops", "traffic" and "roofline" of a call), "images_per_second_per_chip",
    "hours".

    Raises:
      UserError: what `aot.describe` refuses, nothing to encode or no number of steps.
    """
    chip, devices = aot.describe(topology)
    programs = _sampling(config, experiment, batch) if way == "sample" else _encoding(experiment)
    programs = [_compiled(program, chip, devices[0]) for program in programs]
    seconds = sum(program["roofline"]["call"] / program["images"] for program in programs)
    settings = {name: config.sample.get(name) for name in ("steps", "guidance")} if way == "sample" else {}
    return {
        "of": way, "topology": topology, "chip": chip.name, "chips": len(devices), **settings, "number": number, "programs": programs,
        "fits": all(program["memory"]["total"] <= chip.memory for program in programs),
        "images_per_second_per_chip": 1 / seconds, "hours": number * seconds / len(devices) / 3600,
    }  # fmt: skip


def _sampling(config: ml_collections.ConfigDict, experiment: Experiment, batch: int) -> Iterator[Program]:
    settings = config.get("sample", {})
    if not settings.get("steps"):
        raise UserError("the config has no config.sample.steps: set --config.sample.steps=N.")
    steps, guidance = int(settings.steps), float(settings.get("guidance", 1.0))
    example = RandomSource(experiment.modalities).take([0])
    conditions = [name for name in getattr(experiment.process, "conditions", ()) if name in example]
    given = {name: jax.ShapeDtypeStruct((batch, *example[name].shape[1:]), example[name].dtype) for name in conditions}
    params, keys = (jax.eval_shape(make) for make in (
        lambda: experiment.init(jax.random.key(0)), lambda: jax.random.split(jax.random.key(0), batch)))  # fmt: skip

    def sample(params, keys, given):
        return experiment.sample(params, keys, given, steps=steps, guidance=guidance)

    yield f"{steps} steps, guidance {guidance:g}", batch, sample, (params, keys, given)
    for modality in experiment.modalities.values():
        if isinstance(encoder := getattr(modality, "encoder", None), SquareImages):
            yield _program(encoder, "decode", example[encoder.modalities[0]])


def _encoding(experiment: Experiment) -> Iterator[Program]:
    encoders = [encoder for encoder in getattr(experiment.cache, "encoders", ()) if isinstance(encoder, SquareImages)]
    if not encoders:
        raise UserError("the config encodes no images by a published autoencoder or tokenizer: --of encode is of one that does.")
    example = RandomSource(experiment.modalities).take([0])
    for encoder in encoders:
        yield _program(encoder, "encode", example[encoder.modalities[0]])


def _program(encoder: SquareImages, method: str, example: np.ndarray) -> Program:
    if encoder.path or encoder.kind == "vq_model":  # of which no single one is meant
        net, params = encoder.network()
    else:
        net, params = built(encoder.kind, next(iter(KINDS[encoder.kind].module.CONFIGS.values())), encoder.kind)
    side = encoder.side * net.downsampling
    images = part_of(side)
    rows = (images, side, side, 3) if method == "encode" else (images, encoder.side, encoder.side, *example.shape[3:])
    batch = jax.ShapeDtypeStruct(rows, jnp.float32 if method == "encode" else example.dtype)
    function = encoder.functions[method == "decode"]

    def run(params, batch):
        with jax.default_matmul_precision("highest"):  # as encoders do
            return function(net, {"params": params}, batch)

    return f"{encoder.kind}, {method}d", images, run, (params, batch)


def _compiled(program: Program, chip: perf.Chip, device: jax.Device) -> dict[str, Any]:
    name, images, function, args = program
    here = SingleDeviceSharding(device)
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), args)
    console.say(f"compiling for {chip.name}: {name}, {images} images at once")
    flops, passes = perf.flops_and_passes(function, *args)
    began = time.perf_counter()
    with compiling_for("tpu"):
        compiled, read = estimates.compile_readable(jax.jit(function).lower(*args).compile)
    counted = estimates.report(read, chip, 1, flops)
    line = perf.roofline(chip, 1, flops, passes, counted["traffic"])
    seconds = {"compute": line.seconds["compute"], "memory": line.seconds.get("memory")}
    return {
        "name": name, "images": images, "memory": {**perf.compiled_memory(compiled), "capacity": chip.memory}, "model_flops": flops,
        "hardware_flops": passes, **counted, "compile_seconds": time.perf_counter() - began,
        "roofline": {**seconds, "call": line.step_seconds, "limit": line.limit},
    }  # fmt: skip


def text(found: Mapping[str, Any]) -> str:
    """A report as text."""
    rows = [("chips", f"{found['chips']} x {found['chip']}, each on its own")]
    for program in found["programs"]:
        line, memory = program["roofline"], program["memory"]
        moved = "" if line["memory"] is None else f"main memory {line['memory']:.3g} s a call: "
        fits = "fits" if memory["total"] <= memory["capacity"] else "DOES NOT FIT"
        rows += [
            (program["name"], f"{program['images']} images a call, {program['model_flops'] / program['images'] / 1e12:.4g} TFLOP each"),
            ("  memory", f"{memory['total'] / 1e9:.3g} of {memory['capacity'] / 1e9:.3g} GB: {fits}"),
            ("  roofline", f"compute {line['compute']:.3g} s, {moved}bound by {line['limit']}"),
            ("  images/s/chip", f"up to {program['images'] / line['call']:.4g}"),
            *estimates.rows(program),
        ]
    rows += [
        ("images/s/chip", f"up to {found['images_per_second_per_chip']:.4g} in all"),
        (f"{found['number']:,} images", f"{found['hours']:.3g} hours at least"),
    ]
    return "\n".join([found["topology"], *(f"{name:<24}{value}" for name, value in rows)])
