"""The convolutional autoencoders against their originals (golden files), and the layouts, values and errors around them."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor
from mmdiff.encoders import autoencoder_blocks, autoencoder_kl, autoencoder_layouts, autoencoder_tiny, vq_model
from mmdiff.encoders.autoencoder_kl import AutoencoderKL
from mmdiff.encoders.autoencoder_tiny import AutoencoderTiny
from mmdiff.encoders.published_configs import built
from mmdiff.encoders.vq_model import VQModel
from mmdiff.errors import UserError

F8 = {**autoencoder_layouts.levels([8, 8, 16, 16]), "norm_num_groups": 4}
F16 = autoencoder_layouts.levels([32, 32, 64, 64, 128], attention=True)
KL4 = AutoencoderKL.from_config(F8)
TILED = AutoencoderKL.from_config({**autoencoder_layouts.levels([8, 16]), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16})
TILED = TILED.clone(tiling=True)
NO_CONVS = {"use_quant_conv": False, "use_post_quant_conv": False}
KL16 = AutoencoderKL.from_config({**F8, **NO_CONVS, "latent_channels": 16})
VQ = VQModel.from_config({**F8, "num_vq_embeddings": 64, "latent_channels": 4})
TAMING = VQModel.from_config({**F16, "num_vq_embeddings": 64, "latent_channels": 32})
LLAMAGEN = VQModel.from_config({**F16, "num_vq_embeddings": 64, "latent_channels": 32, "vq_embed_dim": 4})
TINY = AutoencoderTiny.from_config({"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4})


def named(net, to_layout=dict):
    """Weights of a network made from the keys of a published layout."""
    shapes = state_dicts.expected(published.abstract(net))
    keys = to_layout({key: np.broadcast_to(np.zeros((), np.float32), shape) for key, shape in shapes.items()})
    return {key: published.weight(key, array.shape) for key, array in keys.items()}


def loaded(net, weights):
    weights = net.canonical({key: Tensor.of(array) for key, array in weights.items()})
    return state_dicts.load_params(published.abstract(net), weights, "golden")


def images(name, *shape):
    return jnp.asarray(published.normal(name, shape).transpose(0, 2, 3, 1))


def run(net, params, x, first, then, second):
    """net.first(x), and net.then(second): one compiled call."""

    @jax.jit
    def both(params, x, second):
        return tuple(net.apply({"params": params}, value, method=method) for method, value in ((first, x), (then, second)))

    return both(params, x, second)


@pytest.mark.parametrize(
    ("name", "net", "layout", "shape"),
    [
        pytest.param("kl4", KL4, dict, (2, 3, 40, 24), marks=pytest.mark.slow),
        pytest.param("kl16", KL16, dict, (1, 3, 44, 27), marks=pytest.mark.slow),
        ("kl4tiled", TILED, dict, (1, 3, 44, 30)),
        ("vavae", AutoencoderKL.from_config(F16), autoencoder_layouts.to_ldm, (1, 3, 48, 32)),
    ],
)
def test_moments_and_images_are_the_original_s(name, net, layout, shape):
    """Sides that do not divide by 8, tiles that are cut at the edges, attention in a level."""
    golden = published.golden(name)
    mean = net.mode(jnp.asarray(golden["moments"]))
    moments, decoded = run(net, loaded(net, named(net, layout)), images(name, *shape), "encode", "decode", mean)
    published.assert_close(moments, golden["moments"])
    published.assert_close(decoded, golden["images"])


@pytest.mark.parametrize(
    ("name", "net", "layout", "shape"),
    [
        pytest.param("vq", VQ, dict, (2, 3, 40, 24), marks=pytest.mark.slow),
        ("taming", TAMING, autoencoder_layouts.to_ldm, (2, 3, 32, 48)),
        ("llamagen", LLAMAGEN, autoencoder_layouts.to_llamagen, (1, 3, 48, 32)),
    ],
)
def test_codes_and_images_are_the_original_s(name, net, layout, shape):
    golden, params = published.golden(name), loaded(net, named(net, layout))
    latents, decoded = run(net, params, images(name, *shape), "latents", "decode", jnp.asarray(golden["codes"]))
    published.assert_close(latents, golden["latents"])
    published.assert_close(decoded, golden["images"])
    codes = net.apply({"params": params}, latents, method="quantize")
    assert codes.dtype == jnp.int32 and (codes == golden["codes"]).all()


def test_small_previews_are_the_original_s():
    golden = published.golden("taesd")
    latents, decoded = run(TINY, published.params(TINY), images("taesd", 1, 3, 44, 27), "encode", "decode", jnp.asarray(golden["latents"]))
    published.assert_close(latents, golden["latents"])
    published.assert_close(decoded, golden["images"])


@pytest.mark.parametrize(("name", "net", "methods", "given"), [
    ("kl_float64", KL4, ("encode", "decode"), "moments"), ("vq_float64", VQ, ("latents", "decode"), "codes"),
])  # fmt: skip
def test_in_float64_nothing_but_rounding_is_left(name, net, methods, given):
    with jax.enable_x64(True):
        golden, net = published.golden(name), net.clone(dtype=jnp.float64)
        second = golden["codes"] if given == "codes" else net.mode(jnp.asarray(golden["moments"]))
        x = images(name, 1, 3, 17, 24).astype(jnp.float64)
        first, decoded = run(net, published.params(net), x, *methods, jnp.asarray(second))
        assert first.dtype == decoded.dtype == jnp.float64
        published.assert_close(first, golden["moments" if given == "moments" else "latents"], 1e-10)
        published.assert_close(decoded, golden["images"], 1e-10)


# ---- Layouts ----


def equal(params, others):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), params, others))


def first_names(weights):
    """The attention's keys and shapes in diffusers' first files."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, name in old.items():
        weights = {key.replace(new, name): array for key, array in weights.items()}
    return {key: array[..., None, None] if "attn" in key and array.ndim == 2 else array for key, array in weights.items()}


def whole_checkpoint(weights):
    found = {f"first_stage_model.{key}": array for key, array in autoencoder_layouts.to_ldm(weights).items()}
    return {**found, "first_stage_model.loss.logvar": np.zeros(()), "model.diffusion_model.out.2.bias": np.zeros(4)}


def training_checkpoint(weights):
    left = ("loss.perceptual_loss.lin0.model.1.weight", "foundation_model.norm.weight", "linear_proj.weight")
    return {**autoencoder_layouts.to_ldm(weights), **{key: np.zeros(3) for key in left}}


@pytest.mark.parametrize("layout", [first_names, autoencoder_layouts.to_ldm, whole_checkpoint, training_checkpoint])
@pytest.mark.parametrize("net", [KL4, TAMING])
def test_every_layout_gives_the_same_parameters_bit_for_bit(net, layout):
    weights = named(net)
    params = loaded(net, weights)
    assert equal(params, loaded(net, layout(weights)))
    written = state_dicts.state_dict(params)
    assert written.keys() == weights.keys() and all(np.array_equal(written[key], weights[key]) for key in weights)


def test_keys_of_latent_diffusion():
    keys = set(autoencoder_layouts.to_ldm(named(TAMING)))
    assert {"encoder.down.4.attn.1.q.weight", "decoder.up.4.attn.2.proj_out.bias", "decoder.up.0.block.2.conv2.weight"} <= keys
    assert {"encoder.mid.block_2.norm1.weight", "decoder.mid.attn_1.norm.bias", "decoder.norm_out.weight", "quant_conv.bias"} <= keys
    assert {"encoder.down.2.block.0.nin_shortcut.weight", "encoder.down.3.downsample.conv.bias", "decoder.up.1.upsample.conv.bias"} <= keys


@pytest.mark.parametrize("alone", [False, True])
def test_the_original_s_two_halves_of_small_previews(alone):
    weights = named(TINY)
    halves = {}
    for key, array in weights.items():
        part, _, number, leaf = key.split(".", 3)
        halves.setdefault(part, {})[f"{int(number) + (part == 'decoder')}.{leaf}"] = array
    if alone:  # each half in a file of its own
        found = {key for half in halves.values() for key in TINY.canonical({key: Tensor.of(array) for key, array in half.items()})}
        assert found == set(weights)
    else:
        both = {f"taesd_{part}.{key}": array for part, half in halves.items() for key, array in half.items()}
        assert equal(loaded(TINY, both), published.params(TINY))


MODULES = {AutoencoderKL: autoencoder_kl, AutoencoderTiny: autoencoder_tiny, VQModel: vq_model}
PUBLISHED = [(network, config) for network, module in MODULES.items() for config in module.CONFIGS.values()]


@pytest.mark.parametrize(("network", "config"), PUBLISHED)
def test_what_is_written_of_a_published_configuration_is_read_again(network, config):
    net = network.from_config(config)
    assert network.from_config(json.loads(json.dumps(net.config()))) == net


@pytest.mark.parametrize(
    ("net", "tensors", "numbers"),
    [
        (AutoencoderKL.from_config(autoencoder_kl.CONFIGS["flux-vae"]), 244, 83_819_683),
        (AutoencoderTiny.from_config(autoencoder_tiny.CONFIGS["taesd"]), 134, 2_445_063),
        (VQModel.from_config(vq_model.CONFIGS["llamagen-vq-8"]), 299, 70_109_835),
    ],
)
def test_tensors_and_parameters_of_published_files(net, tensors, numbers):
    shapes = state_dicts.expected(published.abstract(net)).values()
    assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, numbers)


# ---- Latents and codes ----


def test_a_sample_has_the_moments():
    moments = jnp.stack([jnp.full(200_000, value) for value in (0.5, -1.0, 2 * np.log(0.1), 100.0)], axis=-1)
    latents = KL4.sample(moments, jax.random.key(0))
    np.testing.assert_allclose(latents.mean(0)[0], 0.5, atol=0.001)
    np.testing.assert_allclose(latents.std(0), [0.1, np.exp(10)], rtol=0.01)  # log-variances are at most 20
    np.testing.assert_array_equal(KL4.mode(moments)[0], [0.5, -1.0])


def test_latents_are_scaled_by_the_published_constants():
    z = jnp.asarray(published.normal("z", (2, 3, 3, 4)))
    sd, flux, own = (AutoencoderKL.from_config(config) for config in (
        autoencoder_kl.CONFIGS["sd-vae"], autoencoder_kl.CONFIGS["flux-vae"],
        {"latents_mean": [1, 2, 3, 4], "latents_std": [0.5, 1, 2, 4], "scaling_factor": 0.5}))  # fmt: skip
    np.testing.assert_allclose(sd.scale_latents(z), z * 0.18215, rtol=1e-6)
    np.testing.assert_allclose(flux.scale_latents(z), (z - 0.1159) * 0.3611, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(own.scale_latents(z)[..., 3], (z[..., 3] - 4) * 0.5 / 4, rtol=1e-5)
    for net in (sd, flux, own):
        np.testing.assert_allclose(net.unscale(net.scale_latents(z)), z, rtol=1e-5, atol=1e-6)


def test_the_lowest_of_several_nearest_codes():
    params = published.params(VQ)
    vectors = np.array(params["quantize"]["embedding"]["embedding"])
    vectors[[50, 7]] = vectors[23]
    params = {**params, "quantize": {"embedding": {"embedding": vectors}}}
    assert VQ.apply({"params": params}, jnp.asarray(vectors[[50, 23, 7, 0]]), method="quantize").tolist() == [7, 7, 7, 0]


def test_what_is_no_code_gives_nan():
    decoded = jax.jit(lambda codes: VQ.apply({"params": published.params(VQ)}, codes, method="decode"))(
        jnp.asarray([[[3, 0]], [[64, 0]], [[0, -1]]])
    )
    assert np.isfinite(decoded[0]).all() and np.isnan(decoded[1:]).any(axis=(1, 2, 3)).all()


# ---- Large images ----


def test_attention_in_parts_of_the_queries_is_the_attention():
    q, k, v = (jnp.asarray(published.normal(name, (2, 35, 8))) for name in "qkv")
    whole = autoencoder_blocks.attention_by_parts(q, k, v)
    parts = jax.jit(autoencoder_blocks.attention_by_parts, static_argnums=3)(q, k, v, 35 * 8)
    np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_one_image_after_another_is_the_same():
    moments, decoded = run(KL4.clone(slicing=True), published.params(KL4), images("kl4", 2, 3, 40, 24), "encode", "decode", jnp.asarray(
        published.golden("kl4")["moments"][..., :4]))  # fmt: skip
    published.assert_close(moments, published.golden("kl4")["moments"])
    published.assert_close(decoded, published.golden("kl4")["images"])


@pytest.mark.parametrize("net", [TILED.clone(slicing=True), TINY])
def test_half_precision_computes_and_gives_float32(net):
    net = net.clone(dtype=jnp.bfloat16)
    variables = {"params": published.abstract(net)}
    latents = jax.eval_shape(lambda v: net.apply(v, jnp.zeros((2, 40, 24, 3)), method="encode"), variables)
    decoded = jax.eval_shape(lambda v: net.apply(v, jnp.zeros((2, 20, 12, net.latent_channels)), method="decode"), variables)
    assert latents.dtype == decoded.dtype == jnp.float32
    jaxpr = str(jax.make_jaxpr(lambda v: net.apply(v, jnp.zeros((2, 8, 8, 3)), method="encode"))(variables))
    assert "f32" not in "".join(re.findall(r":(\S+) = conv_general_dilated", jaxpr)) and "conv_general_dilated" in jaxpr


# ---- Errors ----


def test_half_precision_is_refused_where_it_overflows():
    with pytest.raises(UserError, match="float16 overflows"):
        KL4.clone(dtype=jnp.float16)
    AutoencoderKL.from_config({**F8, "force_upcast": False}).clone(dtype=jnp.float16)


@pytest.mark.parametrize("shape", [(1, 4, 40, 3), (1, 16, 16, 4), (16, 16, 3)])
def test_images_that_cannot_be_encoded(shape):
    for net in (KL4, VQ):
        with pytest.raises(UserError, match=r"encodes images \[B, H, W, 3\] of at least 8 pixels"):
            jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("kind", "config", "problem"),
    [
        ("autoencoder_kl", {"latent_channels": -1}, "latent_channels = -1"),
        ("autoencoder_kl", {"scaling_factor": float("nan")}, "scaling_factor = nan"),
        ("autoencoder_kl", {"act_fn": "relu"}, "act_fn = 'relu'"),
        ("autoencoder_kl", {"block_out_channels": [64, 128]}, "do not fit each other"),
        ("autoencoder_kl", {"block_out_channels": 64}, "makes no autoencoder_kl"),
        ("autoencoder_kl", {"block_out_channels": [40]}, "divide into norm_num_groups = 32"),
        ("autoencoder_kl", {"down_block_types": ["DownBlock3D"]}, "DownBlock3D"),
        ("autoencoder_kl", {"down_block_types": ["AttnDownEncoderBlock2D"]}, "do not fit each other"),
        ("vq_model", {"norm_type": "spatial"}, "norm_type = 'spatial'"),
        ("vq_model", {"num_vq_embeddings": 10**12}, "num_vq_embeddings"),
        ("autoencoder_tiny", {"num_encoder_blocks": [1, 2]}, "encoder stages"),
    ],
)
def test_values_of_a_config_that_a_network_cannot_have(kind, config, problem):
    with pytest.raises(UserError, match=problem):
        built(kind, config, "the weights")


def test_a_tile_of_a_config_with_height_and_width():
    assert AutoencoderKL.from_config({"sample_size": [512, 768]}).sample_size == 512
