"""What sampling and encoding cost on TPUs that are not here, from the TPU's own compiler."""

import importlib.util
import json

import pytest
import tiny_encoders

from mmdiff import config as configs
from mmdiff import inference_costs
from mmdiff.__main__ import main
from mmdiff.nets.dit import SIZES
from mmdiff.training import aot, perf

DIT = "configs/imagenet256/dit_xl2.py"
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra tpu-aot")


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "XS", (1, 32, 2))
    folder, *_ = tiny_encoders.autoencoder(tmp_path / "vae")
    return [
        "aot", "--config", DIT, "--topology", "v5e:2x2", f"--config.encoder.path={folder}", "--config.model.size=XS",
        "--config.model.patch=4", "--config.model.image=8"]


def reported(tmp_path, *args):
    assert main([*args, "--json", str(tmp_path / "found.json")]) == 0
    return json.loads((tmp_path / "found.json").read_text())


def built(small, **others):
    """(config, experiment) of the command's flags, with others in their place."""
    flags = dict(flag.removeprefix("--config.").split("=", 1) for flag in small if flag.startswith("--config."))
    config, module = configs.load(DIT, list((flags | {key: str(value) for key, value in others.items()}).items()))
    return config, configs.build(config, module)


def forward(width=32, tokens=4, patch=4 * 4 * 4):
    """Multiply-adds of one layer of DiT of an image, its embeddings and its head."""
    layer = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    return layer + tokens * 3 * patch * width + (256 + width) * width + 2 * width**2  # the head is twice as wide: learned variances


@needs_libtpu
@pytest.mark.slow
def test_a_sampler_and_its_decoder(small, tmp_path, capsys):
    found = reported(
        tmp_path, *small, "--of", "sample", "--config.sample.steps=3", "--config.sample.guidance=2", "--batch", "2", "--number", "72000")
    sampler, decoder = found["programs"]
    assert (sampler["images"], decoder["images"], found["chips"]) == (2, 64, 4) and found["fits"]
    assert sampler["model_flops"] == sampler["hardware_flops"] == 3 * 2 * 2 * 2 * forward()  # steps, guided, of two, a multiply-add
    assert decoder["hardware_flops"] == 6 * decoder["model_flops"]  # of float32 at the highest precision
    assert not sampler["unknown_loops"] + decoder["unknown_loops"]
    seconds = 0.0
    for program in found["programs"]:
        line = program["roofline"]
        assert line["compute"] == pytest.approx(program["hardware_flops"] / 197e12)
        assert line["memory"] == pytest.approx(program["traffic"] / 819e9)
        assert line["call"] == max(line["compute"], line["memory"]) == line[line["limit"]]
        assert program["estimate"]["step"] > line["compute"] and sum(program["traffic_by_kind"].values()) == program["traffic"]
        seconds += line["call"] / program["images"]
    assert found["images_per_second_per_chip"] == pytest.approx(1 / seconds)
    assert found["hours"] == pytest.approx(72000 * seconds / 4 / 3600)
    out = capsys.readouterr().out
    for words in ("4 x v5e", "3 steps, guidance 2", "autoencoder_kl, decoded", "72,000 images", "hours at least"):
        assert words in out, words


@needs_libtpu
@pytest.mark.slow
def test_a_step_more_costs_a_call_of_the_network(small):
    """The program is a scan: its body's traffic counts as often as it runs."""
    found = []
    for steps in (2, 3, 4):
        config, experiment = built(small, **{"sample.steps": steps})
        chip, devices = aot.describe("v5e:2x2")
        sampler = next(inference_costs._sampling(config, experiment, 1))  # without its decoder
        found.append(inference_costs._compiled(sampler, chip, devices[0])["traffic"])
    assert found[2] - found[1] == pytest.approx(found[1] - found[0], rel=0.02) and found[1] > found[0]


@needs_libtpu
@pytest.mark.slow
def test_an_encoder(small, tmp_path):
    found = reported(tmp_path, *small, "--of", "encode")
    [encoder] = found["programs"]
    assert encoder["name"] == "autoencoder_kl, encoded" and encoder["images"] == 64 and found["number"] == 50_000
    # Without a path Stable Diffusion's, which takes two minutes to compile and is counted only.
    [(name, images, function, args)] = inference_costs._encoding(built(small, **{"encoder.path": ""})[1])
    flops, _ = perf.flops_and_passes(function, *args)
    assert name == encoder["name"] and flops / images > 1000 * encoder["model_flops"] / encoder["images"]


def test_what_does_not_go_together_is_said(small, capsys):
    assert main([*small, "--number", "10"]) == 2 and "--number goes with --of sample" in capsys.readouterr().err
    assert main([*small, "--of", "encode", "--slices", "2"]) == 2 and "--slices goes with --of train" in capsys.readouterr().err


@needs_libtpu
def test_what_encodes_and_samples_nothing_is_said(capsys):
    none = ["aot", "--config", "configs/digits_joint.py", "--topology", "v5e:1x1", "--of", "encode"]
    assert main(none) == 2 and "the config encodes no images by a published" in capsys.readouterr().err
