"""The fastest training step for TPUs that are not available: `search(load, "v6e:4x4", 1, fixed=(), most=12)`.

Starts at the config as it is, and changes the batch or one of mesh, rematerialisation and micro-batches as long as the compiler's reports
promise more images a second and chip. Steps are compiled whole: with scanned layers a smaller depth would compile no faster.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mmdiff import config as configs
from mmdiff import console
from mmdiff.training import aot

GAIN = 1.01  # what promises less more than the best is no better
GROUP = 16  # chips of an fsdp axis that is smaller than a slice


class Point(NamedTuple):
    """What is changed; `remat` is None where the config has none."""

    batch: int
    fsdp: int
    remat: str | None
    microbatches: int


def search(load: aot.Load, topology: str, slices: int, fixed: Collection[str], most: int) -> dict[str, Any]:
    """Climbs from the config as it is to more images a second and chip.

        images/s/chip = images of a step / chips / max(roofline step, compiler's estimated step)

    Args:
      load, topology, slices: as `aot.report` takes them.
      fixed: keys of the config that stay as they are.
      most: so many steps are compiled.

    Returns plain values: "tried", best first, each with its "overrides", its "seconds" a step and "images_per_second_per_chip" (None and 0
    where it does not fit, or the compiler cannot write the text that its traffic is read from) and its "report"; "ended": whether nothing
    was left to try.

    Raises:
      UserError: as `aot.report`.
    """
    chip, devices = aot.describe(topology, slices)
    config, _ = load({})
    mesh = aot.mesh_of(config, devices, slices)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    start = Point(config.train.global_batch, mesh.shape["fsdp"], configs.flatten(config).get("model.remat"), config.train.microbatches)
    tried: dict[Point, dict[str, Any]] = {}

    def measure(point: Point) -> dict[str, Any]:
        overrides = _overrides(point, start, shares)
        made = aot.compile_step(load, chip, devices, slices, overrides)
        report = made.report()
        known = made.fits and report["traffic"] is not None  # else the roofline is of compute alone
        seconds = max(report["roofline"]["step"], (report["estimate"] or {}).get("step", 0.0)) if known else None
        rate = report["images_per_chip"] / seconds if seconds else 0.0
        found = {"overrides": overrides, "images_per_second_per_chip": rate, "seconds": seconds, "state": made.state, "report": report}
        tried[point] = found
        console.say(f"  {rate:.4g} images/s/chip" if seconds else f"  {_memory(found)} a chip: {_why(found)}")
        return found

    best, ended = start, False
    measure(start)
    while not ended and len(tried) < most:
        for point in _neighbours(best, shares, slices, fixed):
            if point not in tried and not _hopeless(point, tried, chip.memory):
                if _better(measure(point), tried[best]):
                    best = point
                break
        else:
            ended = True
    ranked = sorted(tried.values(), key=lambda found: (-found["images_per_second_per_chip"], found["report"]["memory"]["total"]))
    return {"topology": topology, "slices": slices, "tried": ranked, "ended": ended}


def _neighbours(point: Point, shares: int, slices: int, fixed: Collection[str]) -> Iterator[Point]:
    """What differs in the batch, or in one thing else and perhaps, as it frees memory, in the batch, too; the most promising first."""

    def free(key: str) -> bool:
        return not any(name.startswith(key) for name in fixed)

    double, half = ([{"batch": batch}] if free("train.global_batch") else [] for batch in (2 * point.batch, point.batch // 2))
    others = [{"remat": policy} for policy in ("full", "auto", "none") if point.remat is not None and free("model.remat")]
    line = math.isqrt(shares)  # of a square slice: there gradients are reduce-scattered
    sizes = dict.fromkeys((shares, GROUP, line if line**2 == shares else 1, 1))
    others += [{"fsdp": fsdp} for fsdp in sizes if shares % fsdp == 0 and free("train.mesh")]
    others += [{"microbatches": 2 * point.microbatches}, {"microbatches": point.microbatches // 2}] * free("train.microbatches")
    changes = [*double, *(change | batch for change in others for batch in ({}, *double)), *half]
    for other in (point._replace(**change) for change in changes):
        if other.microbatches and other.batch and other.batch % (shares * slices * other.microbatches) == 0:
            yield other


def _hopeless(point: Point, tried: Mapping[Point, Mapping[str, Any]], memory: float) -> bool:
    """Whether it needs more memory than what did not fit, or holds more of the state than fits."""
    for other, found in tried.items():
        if found["state"] * other.fsdp / point.fsdp > memory:
            return True
        same = other.fsdp == point.fsdp and point.remat in (other.remat, "none")  # than which all need less
        if same and not found["report"]["fits"] and point.batch / point.microbatches >= other.batch / other.microbatches:
            return True
    return False


def _better(found: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    if not best["seconds"]:  # whatever needs less memory, until something fits
        return bool(found["seconds"]) or found["report"]["memory"]["total"] < best["report"]["memory"]["total"]
    return found["images_per_second_per_chip"] > GAIN * best["images_per_second_per_chip"]


def _overrides(point: Point, start: Point, shares: int) -> dict[str, str]:
    changed = {
        "train.global_batch": point.batch != start.batch and point.batch,
        "train.mesh.data": point.fsdp != start.fsdp and shares // point.fsdp,
        "train.mesh.fsdp": point.fsdp != start.fsdp and point.fsdp,
        "model.remat": point.remat != start.remat and point.remat,
        "train.microbatches": point.microbatches != start.microbatches and point.microbatches,
    }
    return {key: str(value) for key, value in changed.items() if value}


# ---- As text ----


def text(found: Mapping[str, Any], config: str, given: Sequence[tuple[str, str]]) -> str:
    """The result as text, with the command that trains so: `config` and the overrides `given` are those of the search."""
    lines = [f"{found['topology']}: {len(found['tried'])} steps compiled" + ("" if found["ended"] else ", and more could be tried"), ""]
    lines.append(f"{'images/s/chip':>13}  {'step':>9}  {'bound':>9}  {'by':<8}{'memory':>8}  {'links':>9}  with")
    for one in found["tried"]:
        report = one["report"]
        memory, flags = _memory(one), aot.flags(one["overrides"]) or "the config as it is"
        if not one["seconds"]:
            lines.append(f"{_why(one):>13}  {'':>9}  {'':>9}  {'':<8}{memory:>8}  {'':>9}  {flags}")
            continue
        line = report["roofline"]
        seconds = [f"{1e3 * each:.4g} ms" for each in (one["seconds"], line["step"], line.get("links", 0.0))]
        rate, (step, bound, links) = one["images_per_second_per_chip"], seconds
        lines.append(f"{rate:>13.4g}  {step:>9}  {bound:>9}  {line['limit']:<8}{memory:>8}  {links:>9}  {flags}")
    best = found["tried"][0]
    if not best["seconds"]:
        return "\n".join([*lines, "", "nothing that was tried fits and has a known time"])
    overrides = {**dict(given), **best["overrides"]}
    lines += ["", "By the compiler's cycles and the chip's datasheet, kernels of Pallas excepted; nothing was run. To train so:"]
    slices = {"train.mesh.slices": str(found["slices"])} if found["slices"] > 1 else {}
    return "\n".join([*lines, f"  mmdiff train --config {shlex.quote(config)} --workdir DIR {aot.flags(slices | overrides)}".rstrip()])


def _memory(one: Mapping[str, Any]) -> str:
    return f"{one['report']['memory']['total'] / 1e9:.3g} GB"


def _why(one: Mapping[str, Any]) -> str:
    """Why there are no seconds."""
    return "time unknown" if one["report"]["fits"] else "does not fit"
