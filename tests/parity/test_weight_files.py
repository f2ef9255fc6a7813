"""Files of weights against torch, safetensors, diffusers and transformers: what they write is read bit for bit, and the other way round."""

import json

import numpy as np
import published
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel

from mmdiff.convert import open_weights, state_dicts, write_weights
from mmdiff.convert.weight_files import SAFETENSORS
from mmdiff.encoders import autoencoder_layouts, open_encoder

TYPES = sorted(SAFETENSORS.values())
KL = autoencoder_layouts.levels([8, 8, 16, 16]) | {"norm_num_groups": 4, "sample_size": 32}


def bits(tensor):
    tensor = tensor.detach().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(weights, tensors):
    assert set(weights) == set(tensors)
    for key, tensor in tensors.items():
        found = weights[key].read()
        assert found.shape == tuple(tensor.shape) and str(found.dtype) == str(tensor.dtype).removeprefix("torch."), key
        assert np.ascontiguousarray(found).tobytes() == bits(tensor), key


@pytest.fixture(scope="module")
def tensors():
    """One tensor of each type, and views."""
    numbers = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0)) * 3
    found = {name: numbers.abs().to(getattr(torch, name)) for name in TYPES}
    views = {"transposed": numbers.permute(2, 0, 1), "rows": numbers[1:4, ::2], "scalar": numbers[0, 0, 0], "empty": numbers[:0]}
    return found | views | {f"{name}.T": found[name].transpose(0, 2) for name in ("bfloat16", "float8_e4m3fn")}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves(tmp_path, tensors, zipped):
    if not zipped:  # which the older form cannot hold
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(("float8", "uint16", "uint32", "uint64"))}
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert_same(open_weights(tmp_path / "a.pt"), tensors)
    torch.save({"epoch": 3, "model": {}, "ema": tensors, "opt": [tensors]}, tmp_path / "b.pt", _use_new_zipfile_serialization=zipped)
    assert_same(open_weights(tmp_path / "b.pt", "ema"), tensors)


def test_what_an_optimizer_and_a_module_save(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(module.parameters())
    with torch.enable_grad():  # which other comparisons turn off
        module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = {"state_dict": module.state_dict(), "optimizer": optimizer.state_dict(), "device": torch.device("cpu"), "type": torch.float16}
    torch.save(state, tmp_path / "a.ckpt")
    assert_same(open_weights(tmp_path / "a.ckpt"), module.state_dict())


def test_what_safetensors_writes_and_reads(tmp_path, tensors):
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "theirs.safetensors")
    weights = open_weights(tmp_path / "theirs.safetensors")
    assert_same(weights, tensors)
    write_weights(tmp_path / "ours.safetensors", weights)
    written = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert set(written) == set(tensors)
    for key, tensor in tensors.items():
        assert (written[key].dtype, written[key].shape) == (tensor.dtype, tensor.shape) and bits(written[key]) == bits(tensor)


def models():
    torch.manual_seed(0)
    return {"autoencoder_kl": AutoencoderKL(**KL), "t5": T5EncoderModel(T5Config(**published.SMALL["t5"]))}


@pytest.mark.parametrize("kind", ["autoencoder_kl", "t5"])
@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": 20_000}, {"max_shard_size": 20_000, "variant": "fp16"}])
@pytest.mark.parametrize("safe", [True, False])
def test_what_diffusers_and_transformers_save(tmp_path, kind, options, safe):
    model = models()[kind]
    model.save_pretrained(tmp_path, safe_serialization=safe, **options)
    if "max_shard_size" in options:
        assert len([path for path in tmp_path.iterdir() if path.suffix in (".bin", ".safetensors")]) > 1
    weights = open_weights(tmp_path)
    state = model.state_dict()
    assert_same(weights, {key: state[key] for key in weights})
    encoder = open_encoder(kind, tmp_path)
    found = state_dicts.state_dict(encoder.params)
    assert all(np.array_equal(array, state[key].numpy()) for key, array in found.items())
    assert set(state) - set(found) <= {"encoder.embed_tokens.weight"}


@pytest.mark.parametrize("kind", ["autoencoder_kl", "t5"])
@pytest.mark.parametrize("shard_size", [5_000_000_000, 20_000])
def test_what_is_written_is_loaded_without_missing_keys(tmp_path, kind, shard_size):
    model = models()[kind]
    model.save_pretrained(tmp_path / "theirs")
    encoder = open_encoder(kind, tmp_path / "theirs")
    write_weights(tmp_path / "ours", state_dicts.state_dict(encoder.params), encoder.net.config(), shard_size=shard_size)
    loaded, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if name in info)
    state = model.state_dict()
    assert set(loaded.state_dict()) == set(state) and all(bits(tensor) == bits(state[key]) for key, tensor in loaded.state_dict().items())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())
