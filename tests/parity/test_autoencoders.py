"""The convolutional autoencoders against diffusers, and against taming's own modules: keys at full size, values, files that both read."""

import argparse
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import safetensors.numpy
import torch
from originals import autoencoders as originals

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor
from mmdiff.encoders import autoencoder_kl, autoencoder_layouts, autoencoder_tiny, vq_model

NETWORKS = {autoencoder_kl: "AutoencoderKL", autoencoder_tiny: "AutoencoderTiny", vq_model: "VQModel"}
# All but taming's GumbelVQ, which diffusers does not have.
FULL_SIZES = [(module, name) for module in NETWORKS for name, config in module.CONFIGS.items() if "quantizer" not in config]
F8 = {**autoencoder_layouts.levels([8, 8, 16, 16]), "norm_num_groups": 4}
F16 = {**autoencoder_layouts.levels([8, 8, 16, 16, 32], attention=True), "norm_num_groups": 8}


def ours(module, config):
    return getattr(module, NETWORKS[module]).from_config(config)


def theirs(module, config):
    """diffusers' network of a config.json."""
    return getattr(diffusers, NETWORKS[module]).from_config(config)


def params_of(net, model):
    weights = net.canonical({key: Tensor.of(value.numpy()) for key, value in model.state_dict().items()})
    return state_dicts.load_params(published.abstract(net), weights, "diffusers")


def torch_images(name, shape, dtype=torch.float32):
    return torch.tensor(published.normal(name, shape)).to(dtype)


def nhwc(x):
    return x.permute(0, 2, 3, 1).numpy()


def applied(net, params, method, x):
    return jax.jit(lambda params, x: net.apply({"params": params}, x, method=method))(params, jnp.asarray(x))


@pytest.mark.parametrize(("module", "name"), FULL_SIZES)
def test_the_full_sizes_have_diffusers_keys_and_shapes(module, name):
    net = ours(module, module.CONFIGS[name])
    with torch.device("meta"):
        original = theirs(module, net.config())
    assert state_dicts.expected(published.abstract(net)) == {key: tuple(value.shape) for key, value in original.state_dict().items()}


@pytest.mark.parametrize(("name", "codes"), [("vqgan-f16-1024", 1024), ("vqgan-f16-16384", 16384)])
def test_the_full_size_of_vqgan_has_taming_s_keys_and_shapes(name, codes, monkeypatch):
    monkeypatch.setitem(originals.OPTIONS, "ch", 128)
    monkeypatch.setattr(originals, "_with_weights", lambda net: net)
    with torch.device("meta"):
        original = originals._taming(256, False, codes)
    net = ours(vq_model, vq_model.CONFIGS[name])
    found = {key: np.broadcast_to(np.zeros(()), shape) for key, shape in state_dicts.expected(published.abstract(net)).items()}
    found = {key: array.shape for key, array in autoencoder_layouts.to_ldm(found).items()}
    assert found == {key: tuple(value.shape) for key, value in original.state_dict().items()}


KL = [
    ({**F8}, (2, 3, 40, 24)), ({**F8, "use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16}, (1, 3, 47, 33)),
    ({**F8, "mid_block_add_attention": False, "layers_per_block": 1}, (1, 3, 24, 24)), ({**F16, "latent_channels": 5}, (1, 3, 40, 72)),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.float64, 1e-10)])
@pytest.mark.parametrize(("config", "shape"), KL)
def test_moments_samples_and_images(config, shape, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        net = ours(autoencoder_kl, config).clone(dtype=dtype)
        model = originals._with_weights(theirs(autoencoder_kl, net.config()))
        params = params_of(net, model)
        model = model.to(torch.float64 if dtype == jnp.float64 else torch.float32)
        x = torch_images("live", shape, next(model.parameters()).dtype)
        moments = model.encode(x).latent_dist
        found = applied(net, params, "encode", nhwc(x))
        assert found.dtype == dtype
        published.assert_close(found, nhwc(moments.parameters), tolerance)
        published.assert_close(net.mode(found), nhwc(moments.mode()), tolerance)
        published.assert_close(applied(net, params, "decode", nhwc(moments.mean)), nhwc(model.decode(moments.mean).sample), tolerance)
        noise = jax.random.normal(jax.random.key(0), moments.mean.permute(0, 2, 3, 1).shape, dtype)
        published.assert_close(net.sample(found, jax.random.key(0)), nhwc(moments.mean) + nhwc(moments.std) * np.asarray(noise), tolerance)


@pytest.mark.parametrize("shape", [(1, 3, 80, 64), (2, 3, 60, 33), (1, 3, 32, 70)])
def test_tiles_are_diffusers_tiles(shape):
    net = ours(autoencoder_kl, F8).clone(tiling=True, slicing=True)
    model = originals._with_weights(theirs(autoencoder_kl, net.config()))
    model.enable_tiling()
    model.enable_slicing()
    params, x = params_of(net, model), torch_images("tiles", shape)
    moments = model.encode(x).latent_dist
    published.assert_close(applied(net, params, "encode", nhwc(x)), nhwc(moments.parameters))
    published.assert_close(applied(net, params, "decode", nhwc(moments.mean)), nhwc(model.decode(moments.mean).sample))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.float64, 1e-10)])
@pytest.mark.parametrize(("config", "shape"), [
    ({**F8, "num_vq_embeddings": 64, "latent_channels": 4}, (2, 3, 40, 24)),
    ({**F16, "num_vq_embeddings": 300, "latent_channels": 16, "vq_embed_dim": 5}, (1, 3, 47, 64)),
])  # fmt: skip
def test_codes_and_images(config, shape, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        net = ours(vq_model, config).clone(dtype=dtype)
        model = originals._with_weights(theirs(vq_model, net.config()))
        params = params_of(net, model)
        model = model.to(torch.float64 if dtype == jnp.float64 else torch.float32)
        x = torch_images("live", shape, next(model.parameters()).dtype)
        latents = model.encode(x).latents
        published.assert_close(applied(net, params, "latents", nhwc(x)), nhwc(latents), tolerance)
        codes = applied(net, params, "encode", nhwc(x))
        assert (np.asarray(codes).ravel() == model.quantize(latents)[2][2].numpy().ravel()).all()
        published.assert_close(applied(net, params, "decode", codes), nhwc(model.decode(latents).sample), tolerance)


@pytest.mark.parametrize("latent_channels", [4, 16])
def test_small_previews(latent_channels):
    config = {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4, "latent_channels": latent_channels}
    net = ours(autoencoder_tiny, config)
    model = originals._with_weights(theirs(autoencoder_tiny, net.config()))
    params, x = params_of(net, model), torch_images("live", (2, 3, 45, 24))
    latents = model.encode(x).latents
    published.assert_close(applied(net, params, "encode", nhwc(x)), nhwc(latents))
    published.assert_close(applied(net, params, "decode", nhwc(latents)), nhwc(model.decode(latents).sample))


def test_the_first_names_of_the_attention_as_diffusers_reads_them(tmp_path):
    """The keys and shapes of the first published files: diffusers' own conversion of them gives what ours does."""
    net = ours(autoencoder_kl, F8)
    weights = {key: published.weight(key, shape) for key, shape in state_dicts.expected(published.abstract(net)).items()}
    old = {}
    for key, array in weights.items():
        for new, name in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            key = key.replace(new, name)
        old[key] = np.ascontiguousarray(array)
    model = read_by_diffusers(net, old, tmp_path)
    params = state_dicts.load_params(published.abstract(net), net.canonical({key: Tensor.of(array) for key, array in old.items()}), "old")
    x = torch_images("live", (1, 3, 24, 24))
    published.assert_close(applied(net, params, "encode", nhwc(x)), nhwc(model.encode(x).latent_dist.parameters))


def read_by_diffusers(net, weights, folder):
    """diffusers' network of a folder that holds a config.json and weights."""
    safetensors.numpy.save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(net.config()))
    model = getattr(diffusers, type(net).__name__).from_pretrained(folder, low_cpu_mem_usage=False)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(("module", "config"), [
    (autoencoder_kl, {**F8, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    (autoencoder_kl, {**F16, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}),
    (autoencoder_tiny, {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}),
    (vq_model, {**F16, "num_vq_embeddings": 64, "latent_channels": 8, "vq_embed_dim": 4}),
])  # fmt: skip
def test_what_is_written_is_read_by_diffusers_bit_for_bit(module, config, tmp_path):
    net = ours(module, config)
    params = params_of(net, originals._with_weights(theirs(module, net.config())))
    model = read_by_diffusers(net, state_dicts.state_dict(params), tmp_path)
    assert all(np.array_equal(value.numpy(), state_dicts.state_dict(params)[key]) for key, value in model.state_dict().items())
    stated = {key: model.config[key] for key in net.config() if not key.startswith("_")}
    assert stated == {key: net.config()[key] for key in stated}
    x = torch_images("live", (1, 3, 48, 32))
    if module is vq_model:
        latents, decoded = applied(net, params, "encode", nhwc(x)), model(x).sample
    else:  # the encoder's rounding would be amplified by the decoder
        latents = model.encode(x).latents if module is autoencoder_tiny else model.encode(x).latent_dist.mean
        latents, decoded = nhwc(latents), model.decode(latents).sample
    published.assert_close(applied(net, params, "decode", latents), nhwc(decoded))


def test_llamagen_s_tokenizer_is_a_vq_model_with_normalised_codes(tmp_path):
    """What is written of it is read by diffusers, with the same codes and images as the original's."""
    original = originals._with_weights(originals._LlamaGen())
    sizes = {"num_vq_embeddings": 64, "latent_channels": 32, "vq_embed_dim": 4}
    net = ours(vq_model, {**autoencoder_layouts.levels([32, 32, 64, 64, 128], attention=True), **sizes})
    params = params_of(net, original)
    model = read_by_diffusers(net, state_dicts.state_dict(params), tmp_path)
    x = torch_images("live", (1, 3, 48, 64))
    codes = original.codes(original.latents(x))
    assert (applied(net, params, "encode", nhwc(x)) == codes.numpy()).all()
    assert (model.quantize(model.encode(x).latents)[2][2].numpy() == codes.numpy().ravel()).all()
    published.assert_close(nhwc(model(x).sample), nhwc(original.decode(codes)))


def test_the_time_of_both_is_measured(loaded_launch, monkeypatch):
    program = loaded_launch("encoder_experiments")
    monkeypatch.setitem(program.CONFIGS, "sd-vae", F8)
    found = program.speed(argparse.Namespace(config="sd-vae", size=32, batch=1, rounds=2))
    assert found.keys() == {"encode", "decode"}
    for times in found.values():
        assert min(times["ratios"]) <= times["ratio"] <= max(times["ratios"]) and times["jax_processor_seconds"] > 0
