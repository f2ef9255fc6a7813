"""Reports of steps for TPUs that are not here, from the TPU's own compiler."""

import dataclasses
import importlib.util
import json
import sys
import types

import jax
import pytest

from mmdiff import config as configs
from mmdiff.__main__ import main
from mmdiff.errors import UserError
from mmdiff.training import aot, perf, sharding

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra tpu-aot")

# Layers of one product each, scanned, without anything that takes the TPU's compiler long.
CONFIG = '''
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mmdiff.data.modalities import Images
from mmdiff.experiment import Experiment
from mmdiff.nets.transformer import REMAT

LAYERS, WIDTH = 6, 256


def get_config():
    return ConfigDict({
        "seed": 0,
        "model": {"remat": "none"},
        "train": {"global_batch": 512, "microbatches": 1, "ema": 0.999, "mesh": {"data": 1, "fsdp": -1}},
    })


def build(config):
    def layer(h, w):
        return jnp.tanh(h @ w.astype(jnp.bfloat16)), None

    if config.model.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[config.model.remat])

    def loss(params, batch, key):
        h = batch["image"].reshape(-1, WIDTH).astype(jnp.bfloat16)
        return (jax.lax.scan(layer, h, params["layers"])[0].astype(jnp.float32) ** 2).mean(), {}

    def init(key):
        return {"layers": jnp.zeros((LAYERS, WIDTH, WIDTH))}

    return Experiment(
        process=None, init=init, apply=None, loss=loss, optimizer=optax.adam(1e-3), train_data=None,
        validation_data=None, test_data=None,
        shape={"image": (16, 16, 1)}, sample=None, modalities={"image": Images(16, 16)})
'''
LAYERS, WIDTH = 6, 256


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("aot") / "small.py"
    file.write_text(CONFIG)
    return str(file)


def loader(path):
    def load(overrides):
        config, module = configs.load(path, list(overrides.items()))
        return config, module.build(config)

    return load


@needs_libtpu
def test_a_step_that_fits_is_reported(path, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert main(["aot", "--config", path, "--topology", "v5e:2x2", "--config.train.global_batch=1024", "--json", str(file)]) == 0
    found, out = json.loads(file.read_text()), capsys.readouterr().out
    assert found["chip"] == "v5e" and found["chips"] == 4 and found["mesh"]["fsdp"] == 4 and found["images_per_chip"] == 256

    # The arguments: parameters, two moments and their average, split in four, and the images.
    memory, state = found["memory"], 4 * 4 * LAYERS * WIDTH**2 / 4
    assert found["parameters"] == LAYERS * WIDTH**2
    assert state + 256 * WIDTH * 4 < memory["arguments"] < state + 256 * WIDTH * 4 + 2**16
    assert memory["total"] == sum(memory[k] for k in ("arguments", "outputs", "temporaries", "code")) - memory["aliased"]
    assert state <= memory["aliased"] <= memory["outputs"]  # donated
    assert memory["capacity"] == 15.75 * 2**30 and found["fits"] and "remedy" not in found

    product = 2 * 1024 * WIDTH**2
    assert found["model_flops"] == 3 * LAYERS * product
    assert found["hardware_flops"] == found["model_flops"]  # a scan does not know that nothing needs its first layer's input gradient

    # Every layer's weights are gathered forward and backward, in two bytes, and its gradient is summed.
    sent = {(exchange["kind"], *exchange["axes"]): exchange for exchange in found["collectives"]}
    assert sent["all-gather", "fsdp"]["bytes"] == pytest.approx(2 * LAYERS * 3 / 4 * WIDTH**2 * 2)
    assert {axis for exchange in found["collectives"] for axis in exchange["axes"]} == {"fsdp"}
    roofline = found["roofline"]
    assert roofline["step"] == max(roofline[name] for name in ("compute", "memory", "links", "network")) == roofline[roofline["limit"]]
    assert roofline["compute"] == pytest.approx(found["hardware_flops"] / 4 / 197e12)
    # On a 2x2 every chip has one link in either direction of the plane.
    assert roofline["links"] == pytest.approx(sum(exchange["bytes"] for exchange in found["collectives"]) / (2 * 50e9))
    assert roofline["mfu"] == pytest.approx(found["model_flops"] / 4 / 197e12 / roofline["step"])
    assert found["traffic"] > memory["arguments"] and not found["unknown_loops"]
    assert sum(found["traffic_by_kind"].values()) == found["traffic"] and found["traffic_by_kind"]["optimizer"] > state

    # The compiler's own estimate of every instruction, one after the other, and of no product faster than the chip.
    estimate = found["estimate"]
    assert estimate["seconds"] == pytest.approx(estimate["cycles"] / 1.5e9) and not estimate["kernels"]
    assert roofline["compute"] < estimate["seconds"] < 1.0
    exposed = sum(exchange["exposed"] for exchange in found["collectives"])
    assert exposed <= roofline["links"] and estimate["step"] == pytest.approx(estimate["seconds"] + exposed)
    assert estimate["mfu"] == pytest.approx(found["model_flops"] / 4 / 197e12 / estimate["step"])
    for text in ("4 x v5e, mesh fsdp=4", ": fits", f"bound by {roofline['limit']}", "over fsdp", "393,216", "cycles at 1.5 GHz"):
        assert text in out, text


@needs_libtpu
@pytest.mark.parametrize(
    "topology, slices, kind, chips",
    [("v4:2x2x1", 1, "v4", 4), ("v5p:2x2x2", 1, "v5p", 8), ("v6e:16x16", 1, "v6e", 256), ("v5e:4x4", 2, "v5e", 32)],
)
def test_a_topology_has_one_device_per_chip(topology, slices, kind, chips):
    chip, devices = aot.describe(topology, slices)
    assert (chip.name, len(devices)) == (kind, chips)
    assert len({getattr(device, "slice_index", 0) for device in devices}) == slices


@needs_libtpu
def test_an_axis_may_be_a_part_of_the_machine_that_is_no_line():
    mesh = sharding.make_mesh({"data": 4, "fsdp": 16}, aot.describe("v6e:8x8")[1])
    assert mesh.shape["data"] == 4 and mesh.shape["fsdp"] == 16 and len({device.id for device in mesh.devices.flat}) == 64


@needs_libtpu
def test_slices_talk_over_the_network(path):
    found = aot.report(loader(path), "v5e:2x2", slices=2)
    assert found["mesh"] == {"slices": 2, "data": 1, "fsdp": 4, "seq": 1, "tensor": 1}
    [network] = [exchange for exchange in found["collectives"] if exchange["network"]]
    # Each chip sums its quarter of the gradients, in two bytes, with its twin in the other slice.
    assert network["kind"] == "all-reduce" and network["axes"] == ("slices",)
    assert network["bytes"] == pytest.approx(LAYERS * WIDTH**2 / 4 * 2, rel=0.05)
    assert found["roofline"]["network"] == pytest.approx(network["bytes"] / 3.125e9)


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_is_told_with_a_remedy_that_does(path, monkeypatch):
    tried = []
    compile_step = aot.compile_step

    def small(load, chip, devices, slices, overrides={}):
        # As if full rematerialisation and half the batch were needed; the first says so as the compiler does.
        made = compile_step(load, chip, devices, slices, overrides)
        tried.append(overrides)
        if not overrides:
            return dataclasses.replace(made, program=None, memory={"total": aot._needed("... (62.92G) exceeds available HBM (15.75G)")})
        fits = made.config.model.remat == "full" and made.config.train.global_batch <= 256
        return made if fits else dataclasses.replace(made, memory={**made.memory, "total": 2 * chip.memory})

    monkeypatch.setattr(aot, "compile_step", small)
    found = aot.report(loader(path), "v5e:2x2")
    assert not found["fits"] and found["memory"] == {"total": 62.92 * 2**30, "capacity": 15.75 * 2**30}
    assert found["remedy"]["overrides"] == {"model.remat": "full", "train.global_batch": "256"} and found["remedy"]["fits"]
    assert tried == [{}, {"model.remat": "some"}, {"model.remat": "full"}, found["remedy"]["overrides"]]
    assert found["remedy"]["hardware_flops"] > found["remedy"]["model_flops"]  # layers are computed again
    out = aot.text(found)
    assert "67.6 GB of 16.9 GB: DOES NOT FIT" in out
    assert "this fits: --config.model.remat=full --config.train.global_batch=256" in out


@needs_libtpu
def test_a_program_whose_text_the_compiler_cannot_write_keeps_its_memory_and_flops(path, monkeypatch, capsys):
    def as_text():
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3")

    sizes = {f"{kind}_size_in_bytes": 2**20 for kind in ("argument", "output", "alias", "temp", "generated_code")}
    compiled = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**sizes), as_text=as_text)
    monkeypatch.setattr(sharding, "lower_step", lambda *args: types.SimpleNamespace(compile=lambda options: compiled))
    assert main(["aot", "--config", path, "--topology", "v6e:1x1"]) == 0
    out = capsys.readouterr().out
    for text in ("arguments 0.00105 GB", "total               0.00315 GB of 33.5 GB: fits", "1.208e+09 of the model", "bound by compute"):
        assert text in out, text
    assert out.count("cannot write this program's text: its traffic, links and estimated time are unknown") == 1
    assert "main memory" not in out and "estimate  " not in out


def test_the_compiler_s_complaints_are_understood():
    assert aot._needed("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.") == 20.5 * 2**30
    assert aot._needed("total memory required for HLO temporaries (900.25M) exceeds available HBM (15.75G)") == 900.25 * 2**20
    assert aot._needed("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.50M of 16.00M vmem.") is None


@pytest.mark.parametrize(
    "topology, listed", [("v5e:3x3", "v5e:1x1, 2x2, .*16x16"), ("v5e", "v5e:1x1"), ("v7:2x2", "v4:2x2x1.*v5e:.*v5p:.*v6e:"), ("", "v4:")]
)
def test_a_wrong_topology_lists_the_right_ones(topology, listed):
    with pytest.raises(UserError, match=f"no topology {topology!r}.*{listed}"):
        aot.describe(topology)


def test_without_libtpu_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"pip install 'mmdiff\[tpu-aot\]'"):
        aot.describe("v5e:2x2")


@needs_libtpu
def test_a_mesh_that_the_topology_does_not_hold_is_refused(path, capsys):
    assert main(["aot", "--config", path, "--topology", "v5e:2x2", "--config.train.mesh.fsdp=3"]) == 2
    assert "does not fit the 4 device(s)" in capsys.readouterr().err
    assert main(["aot", "--config", path, "--topology", "v5e:2x2", "--config.train.global_batch=510"]) == 2
    assert "global_batch=512" in capsys.readouterr().err


def test_capacities_are_the_compiler_s():
    assert [perf.chip(kind).memory / 2**30 for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite")] == [30.75, 15.75, 95.73, 31.24]
