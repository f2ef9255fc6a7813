"""The search for the fastest step, among steps whose time and memory are known."""

import itertools
import types

import jax
import pytest

from mmdiff import config as configs
from mmdiff.__main__ import main
from mmdiff.training import aot, aot_search, perf

CHIP = perf.chip("TPU v5 lite")
CHIPS = 8


def model(images, fsdp, remat, microbatches):
    """(memory, state, seconds) of a step: full rematerialisation pays for large batches alone, micro-batches send the weights again."""
    state = 40e9 / fsdp
    kept = 0.3e9 * images / microbatches * {"none": 3, "auto": 1, "full": 0.2}[remat]
    work = 1e-3 * images * {"none": 0.95, "auto": 1.0, "full": 1.3}[remat]
    return state + kept, state, work + 5e-3 + 60e-3 * microbatches * (fsdp > 1)


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled, in order."""
    made = []

    def compile_step(load, chip, devices, slices, overrides):
        config, _ = load(overrides)
        fsdp = aot.mesh_of(config, devices, slices).shape["fsdp"]
        images = config.train.global_batch / CHIPS
        point = images, fsdp, config.model.remat, config.train.microbatches
        made.append(point)
        memory, state, seconds = model(*point)
        roofline = {"step": seconds / 2, "limit": "memory", "links": 0.0}
        report = {"images_per_chip": images, "memory": {"total": memory}, "fits": memory <= chip.memory}
        report |= {"roofline": roofline, "estimate": {"step": seconds}, "traffic": 1.0}
        return types.SimpleNamespace(fits=report["fits"], state=state, report=lambda: report)

    monkeypatch.setattr(aot, "describe", lambda topology, slices: (CHIP, jax.devices()[:CHIPS]))
    monkeypatch.setattr(aot, "compile_step", compile_step)
    return made


def load(overrides):
    config, _ = configs.load("configs/imagenet256/dit_xl2.py", [("train.mesh.fsdp", "8"), *overrides.items()])
    return config, None


def test_it_finds_the_fastest_that_fits(compiled):
    found = aot_search.search(load, "v5e:2x4", 1, fixed=(), most=40)
    points = itertools.product([2**k for k in range(12)], [1, 8], ["none", "auto", "full"], [1, 2, 4])
    rates = [point[0] / seconds for point in points for memory, _, seconds in [model(*point)] if memory <= CHIP.memory]
    best = found["tried"][0]
    assert best["images_per_second_per_chip"] > max(rates) / aot_search.GAIN and found["ended"]
    assert best["overrides"]["model.remat"] == "full" and best["report"]["memory"]["total"] <= CHIP.memory
    # Each once; nothing whose state alone is too large, and nothing larger than what did not fit.
    assert len(set(compiled)) == len(compiled) == len(found["tried"]) and all(fsdp == 8 for _, fsdp, _, _ in compiled)
    assert sum(not one["seconds"] for one in found["tried"]) <= 3


def test_what_is_given_stays(compiled):
    found = aot_search.search(load, "v5e:2x4", 1, fixed=("train.global_batch", "train.mesh.fsdp"), most=40)
    assert {(images, fsdp) for images, fsdp, *_ in compiled} == {(32, 8)} and found["ended"]
    assert found["tried"][0]["overrides"] == {}  # none does not fit


def test_what_the_compiler_writes_no_text_of_is_not_taken_for_the_fastest(compiled, monkeypatch):
    step = aot.compile_step

    def without_text(load, chip, devices, slices, overrides):
        made = step(load, chip, devices, slices, overrides)
        unknown = {"traffic": None, "estimate": None} if overrides.get("model.remat") == "full" else {}
        return types.SimpleNamespace(**{**vars(made), "report": lambda: made.report() | unknown})

    monkeypatch.setattr(aot, "compile_step", without_text)
    found = aot_search.search(load, "v5e:2x4", 1, fixed=(), most=40)
    assert found["tried"][0]["seconds"] and found["tried"][0]["overrides"].get("model.remat") != "full"
    text = aot_search.text(found, "dit_xl2", ())
    assert "time unknown" in text and "--config.model.remat=full" not in text.splitlines()[-1]


def test_the_command_trains_with_the_best(compiled, capsys):
    given = ["--config.train.mesh.data=8", "--config.train.global_batch=4096"]  # does not fit
    assert main(["aot", "--config", "imagenet256/dit_xl2", "--topology", "v5e:2x4", "--search", "3", *given[:1]]) == 0
    assert "nothing that was tried fits and has a known time" in capsys.readouterr().out and len(compiled) <= 3
    given[:1] = ["--config.train.mesh.fsdp=8", "--config.train.ema_widths=(0.05, 0.1)"]
    assert main(["aot", "--config", "imagenet256/dit_xl2", "--topology", "v5e:2x4", "--search", *given]) == 0
    out = capsys.readouterr().out
    [command] = [line for line in out.splitlines() if line.startswith("  mmdiff train")]
    assert command.startswith("  mmdiff train --config imagenet256/dit_xl2 --workdir DIR --config.train.mesh.fsdp=8")
    assert "'--config.train.ema_widths=(0.05, 0.1)'" in command
    assert "--config.train.global_batch=4096" in command and "does not fit" in out and "the config as it is" in out
    assert "--config.model.remat=full" in command or "--config.train.microbatches=" in command
    assert main(["aot", "--config", "imagenet256/dit_xl2", "--topology", "v5e:2x4", "--search", "--of", "sample"]) == 2


def test_the_lines_of_a_square_slice_are_tried():
    point = aot_search.Point(2048, 64, None, 1)
    tried = {other.fsdp for other in aot_search._neighbours(point, 64, 1, ())}
    assert tried == {1, 8, 16, 64}
    assert {other.fsdp for other in aot_search._neighbours(point._replace(fsdp=8), 8, 1, ())} == {1, 8}  # no lines of 2 in a 2x4
