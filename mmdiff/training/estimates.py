"""What the TPU compiler itself says of a program: its estimated time, and what the traffic to main memory is for."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mmdiff.training import hlo, perf

# Kinds of traffic by the source of an instruction (`hlo.Work.source`): the first that is found in it.
_KINDS = {
    "optimizer": r"/optax/|training/(step|optim|accumulation)\.py",
    "attention": r"nets/\w*attention\.py",
    "norms": r":(layer_norm|modulate)|nets/\w*norm\w*\.py|normalization\.py|adaln|[_/](norm|rms)\w*/",
    "weights": r"linen/dtypes\.py",  # converted to the type of the products
    "outputs and losses": r"/\w+_out/|mmdiff/(terms|losses|contrastive)\.py|mmdiff/processes/",
    "saved activations": r"axes_scan\.py",
    "products": r"(dot_general|conv_general_dilated) |[/)]\w+/(in|out|qkv|mlp)/",
}


def compile_readable(compile: Callable[[Mapping[str, Any]], jax.stages.Compiled]) -> tuple[jax.stages.Compiled, hlo.Program | None]:
    """(what `compile(options)` returns, its program), compiled for a TPU; None where the compiler does not write the program's text.

    The text is the file that the compiler writes itself: `as_text()` reads the program back and refuses some (libtpu 0.0.52, INTERNAL:
    async-update instruction should have 1 operands but sees 3). It is the way where there is no file.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = [file.read_text() for file in Path(folder).glob("*.after_codegen.txt")]
    try:
        return compiled, hlo.Program(max(texts, key=len) if texts else compiled.as_text())
    except jax.errors.JaxRuntimeError:
        return compiled, None


def report(
    program: hlo.Program | None, chip: perf.Chip, chips: int, model_flops: int, sent: Sequence[perf.CollectiveCost] = ()
) -> dict[str, Any]:
    """Traffic and estimated time of one run of a program on a chip, as plain values.

        seconds = cycles / clock,    step = seconds + those of collectives that overlap with nothing

    Args:
      program: of `compile_readable`.
      chips, model_flops: how many share how much, for the MFU.
      sent: the program's collectives.

    Returns "traffic" in bytes, all of it None if there is no program; "traffic_by_kind"; "estimate", with the sum of the compiler's
    "cycles" over all instructions, as if none overlapped, and the "kernels" (calls of Pallas kernels), which it does not estimate; and
    "unknown_loops".
    """
    if program is None:
        return {"traffic": None, "traffic_by_kind": {}, "estimate": None, "unknown_loops": 0}
    kinds, cycles, kernels = Counter(), 0, 0
    for work in program.work():
        kinds[_kind(work)] += work.times * work.bytes
        cycles += work.times * (work.cycles or 0)
        kernels += work.times * (work.opcode == "tpu_custom_call")
    estimate = None
    if chip.clock and cycles:
        exposed = sum(cost.exposed for cost in sent)
        step = cycles / chip.clock + exposed
        estimate = {
            "cycles": cycles, "clock": chip.clock, "seconds": cycles / chip.clock, "exposed": exposed, "step": step, "kernels": kernels,
            "mfu": model_flops / chips / chip.flops / step,
        }  # fmt: skip
    by_kind = {kind: moved for kind, moved in kinds.most_common() if moved}
    return {
        "traffic": kinds.total(), "traffic_by_kind": by_kind, "estimate": estimate, "unknown_loops": len(program.unknown_loops),
    }  # fmt: skip


def _kind(work: hlo.Work) -> str:
    if work.opcode.removesuffix("-start") in hlo.COLLECTIVES:
        return "collectives"
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, work.source)), "rest")


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines (name, value) of a report's text."""
    if found["traffic"] is None:
        return [("  note", "the compiler cannot write this program's text: its traffic, links and estimated time are unknown")]
    whole, estimate, lines = found["traffic"], found["estimate"], []
    lines.append(("traffic by kind", ", ".join(f"{kind} {moved / whole:.0%}" for kind, moved in found["traffic_by_kind"].items())))
    if estimate:
        links = f" and {estimate['exposed'] * 1e3:.3g} ms of links not overlapped" if estimate["exposed"] else ""
        cycles = f"{estimate['seconds'] * 1e3:.4g} ms ({estimate['cycles'] / 1e6:.4g} M cycles at {estimate['clock'] / 1e9:g} GHz)"
        lines.append(("compiler's estimate", f"{cycles}{links}: MFU {estimate['mfu']:.1%}"))
        if estimate["kernels"]:
            lines.append(("  note", f"{estimate['kernels']:,} calls of kernels are not in the estimate"))
    if found["unknown_loops"]:
        lines.append(("  note", f"{found['unknown_loops']} loop(s) of unknown length count once"))
    return lines
