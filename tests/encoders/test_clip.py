"""CLIP's and SigLIP's towers against transformers' and open_clip's (golden files); layouts and configs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from mmdiff.convert import state_dicts, write_weights
from mmdiff.convert.tensors import Tensor
from mmdiff.encoders import open_encoder
from mmdiff.encoders.clip import CLIP, CLIPText, CLIPVision
from mmdiff.encoders.preprocessing import Preprocessing
from mmdiff.encoders.siglip import SigLIP, SigLIPText, SigLIPVision
from mmdiff.errors import UserError

IDS, PIXELS = np.array(published.CLIP_IDS, np.int32), published.normal("px", (2, 3, 32, 32)).transpose(0, 2, 3, 1)
SMALL = published.SMALL["clip"]
FAMILIES = {"clip": (CLIP, CLIPText, CLIPVision), "siglip": (SigLIP, SigLIPText, SigLIPVision)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    both, *_ = FAMILIES[request.param]
    net = both.from_config(SMALL)
    return request.param, net, published.params(net)


@pytest.fixture(scope="module")
def double(family):
    """(what is asked of a network in double precision, the golden file)."""
    name, net, params = family
    net = net.clone(dtype=jnp.float64)
    with jax.enable_x64(True):

        def ask(net):
            pixels = PIXELS.astype(np.float64)
            states = [of(x, skip=skip) for of, x in ((net.encode_text, IDS), (net.encode_image, pixels)) for skip in (0, 1)]
            return *states, net(IDS, pixels)

        found = jax.jit(lambda params: net.apply({"params": params}, method=ask))(params)
    return jax.tree.map(np.asarray, found), published.golden(name)


def test_both_towers_are_the_published_ones_in_double_precision(family, double):
    (text, text1, image, image1, logits), golden = double
    last = image.tokens if family[0] == "siglip" else image.hidden  # transformers' last states of CLIP's images have no final norm
    found = {
        "text_hidden": text1.hidden, "text_tokens_before": text1.tokens, "text_tokens": text.tokens, "text_embedding": text.embedding,
        "image_hidden": image1.hidden, "image_last": last, "image_embedding": image.embedding, "logits": logits}  # fmt: skip
    for name, array in found.items():
        assert array.dtype == np.float64
        published.assert_close(array[..., ::4] if array.ndim == 3 else array, golden[name], 1e-10)


def test_single_precision_and_each_tower_alone_from_weights_of_both(family):
    name, net, params = family
    golden, weights = published.golden(name), {key: Tensor.of(array) for key, array in state_dicts.state_dict(params).items()}
    assert {key: tensor.shape for key, tensor in weights.items()} == state_dicts.expected(params)
    for cls, inputs, of in zip(FAMILIES[name][1:], (IDS, PIXELS), ("text", "image")):
        tower = cls.from_config(SMALL)
        own = cls.canonical(weights)
        loaded = state_dicts.load_params(published.abstract(tower), own, "both")
        published.assert_close(jax.jit(tower.apply)({"params": loaded}, inputs).embedding, golden[f"{of}_embedding"])
        bare = {key.removeprefix("text_model.").removeprefix("vision_model."): tensor for key, tensor in own.items()}
        assert cls.canonical(bare | {"embeddings.position_ids": Tensor.of(np.arange(8))}).keys() == own.keys()  # as transformers 5 writes
        written = state_dicts.state_dict(loaded)
        assert written.keys() == own.keys() and all(np.array_equal(array, own[key].read()) for key, array in written.items())
        assert cls.from_config(tower.config()).config() == tower.config()


def open_clip_weights(golden):
    """Weights by open_clip's keys."""
    shapes = zip(golden["keys"].tolist(), golden["shapes"].tolist())
    return {key: published.weight(key, tuple(map(int, shape.split()))) for key, shape in shapes}


def test_damaged_weights_of_open_clip_are_named():
    net, weights = CLIP.from_config(published.SMALL["open_clip"]), open_clip_weights(published.golden("openclip"))
    damaged = dict.fromkeys(("text_projection", "visual.transformer.resblocks.0.attn.in_proj_bias"), np.float32(0))
    weights = {key: Tensor.of(array) for key, array in (weights | damaged).items()}
    with pytest.raises(UserError, match="lacks vision_model.encoder.layers.0.self_attn.k_proj.bias"):
        state_dicts.load_params(published.abstract(net), CLIP.canonical(weights), "file")


@pytest.mark.parametrize("name, quick_gelu", [("openclip", True), ("openclip_custom_text", False)])
def test_open_clips_layout_is_read(name, quick_gelu):
    golden = published.golden(name)
    weights = {key: Tensor.of(array) for key, array in open_clip_weights(golden).items()}
    config = published.SMALL["open_clip"] | {"quick_gelu": quick_gelu}
    net = CLIP.from_config({"model_cfg": config, "preprocess_cfg": {}})
    assert net.text.eos_token_id == 2
    loaded = state_dicts.load_params(published.abstract(net), CLIP.canonical(weights), name)

    @jax.jit
    def ask(params):
        return net.apply({"params": params}, method=lambda net: (net.encode_text(IDS).embedding, net.encode_image(PIXELS).embedding))

    for found, of in zip(ask(loaded), ("text", "image")):
        published.assert_close(found, golden[f"{of}_embedding"])


def test_a_folder_of_open_clip_opens_as_a_tower_with_its_preprocessing(tmp_path):
    golden, config = published.golden("openclip"), published.SMALL["open_clip"] | {"quick_gelu": True}
    write_weights(tmp_path / "open_clip_model.safetensors", open_clip_weights(golden))
    stated = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(stated))
    encoder = open_encoder("clip_vision", tmp_path)
    published.assert_close(encoder.apply(PIXELS).embedding, golden["image_embedding"])
    assert encoder.preprocessing == Preprocessing(32, "square", crop="round", mean=(0.5,) * 3, std=(0.25,) * 3)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"resize_mode": "longest"}}))
    with pytest.raises(UserError, match="open_clip_config.json states no preprocessing that is known"):
        open_encoder("clip_vision", tmp_path)


def test_a_mask_hides_what_follows_and_a_short_text_is_its_own(family):
    name, net, params = family
    ask = jax.jit(lambda ids, mask: net.apply({"params": params}, ids, mask, method="encode_text"))
    mask = np.array([[1, 1, 1, 1, 0]])
    found, changed = ask(IDS[:1, :5], mask), ask(np.array([[98, 5, 17, 90, 7]]), mask)
    np.testing.assert_array_equal(found.tokens[:, :4], changed.tokens[:, :4])
    assert np.abs(found.tokens[:, 4] - changed.tokens[:, 4]).max() > 0.01
    with pytest.raises(UserError, match="has 8 positions, the ids have 9"):
        jax.eval_shape(net.text.init, jax.random.key(0), np.zeros((1, 9), np.int32))


def test_half_precision_runs_and_is_near(family):
    name, net, params = family
    net = net.clone(dtype=jnp.bfloat16)
    text = jax.jit(lambda ids: net.apply({"params": params}, ids, jnp.ones_like(ids), skip=1, method="encode_text"))(IDS)
    assert {of.dtype for of in text} == {jnp.bfloat16.dtype}
    published.assert_close(text.embedding.astype(np.float32), published.golden(name)["text_embedding"], 0.03)


def test_the_text_tower_of_a_whole_stable_diffusion_is_found():
    net = CLIPText.from_config(SMALL).clone(projection_dim=None)
    shapes = state_dicts.expected(published.abstract(net))
    weights = {key: Tensor(shape, np.dtype(np.float32), None) for key, shape in shapes.items()}
    whole = {f"cond_stage_model.transformer.{key}": tensor for key, tensor in weights.items()} | {"model.diffusion_model.out.weight": None}
    assert CLIPText.canonical(whole) == weights


def test_configs_say_what_the_towers_are():
    text = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 1024, "projection_dim": 512}
    assert CLIPText.from_config(text).projection_dim is None  # Stable Diffusion's
    assert "projection_dim" not in CLIPText.from_config(text).config()
    assert CLIPText.from_config(text | {"architectures": ["CLIPTextModelWithProjection"]}).projection_dim == 512
    old = {"projection_dim": 768, "text_config": {"hidden_size": 512}, "text_config_dict": {"hidden_size": 768}}
    assert CLIPText.from_config(old).hidden_size == 768
    for config, message in [
        ({"model_type": "bert"}, "of model_type 'bert', not of the text tower of a 'clip'"),
        ({"model_type": "clip_vision_model"}, "not of the text tower"),
        ({"hidden_act": "swish9"}, "hidden_act='swish9' in the config.json is none of"),
        ({"embed_dim": 16, "vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name='vit' in vision_cfg"),
        ({"embed_dim": 16, "vision_cfg": {"layers": [3, 4, 6, 3]}}, "is a ResNet"),
        ({"embed_dim": 16, "text_cfg": {"no_causal_mask": True}}, "no_causal_mask=True in text_cfg"),
    ]:
        with pytest.raises(UserError, match=message):
            CLIPText.from_config(config)


def test_an_image_of_another_size_is_a_sentence():
    net = CLIPVision.from_config(SMALL)
    with pytest.raises(UserError, match=r"takes images \[B, 32, 32, 3\], not \[1, 30, 32, 3\]"):
        jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 30, 32, 3)))
