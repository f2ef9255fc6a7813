"""CLIP and SigLIP against transformers and open_clip: keys and shapes at full size, values of random weights, files both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import published
import pytest
import real_weights
import safetensors.numpy
import sklearn.datasets
import torch
import transformers
from PIL import Image

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor
from mmdiff.encoders import clip, open_encoder, read_clip_tokenizer, siglip
from mmdiff.encoders.preprocessing import Preprocessing

SMALL, IDS = published.SMALL["clip"], np.array(published.CLIP_IDS, np.int32)
FAMILIES = {
    clip: ("CLIP", clip.CLIP, clip.CLIPText, clip.CLIPVision),
    siglip: ("Siglip", siglip.SigLIP, siglip.SigLIPText, siglip.SigLIPVision),
}
COUNTS = {  # tensors and parameters
    "clip-vit-base-patch32": (398, 151_277_313),
    "clip-vit-large-patch14": (590, 427_616_513),
    "siglip-base-patch16-224": (408, 203_155_970),
}


def shapes_of(net):
    return state_dicts.expected(published.abstract(net))


def meta(make):
    with torch.device("meta"):
        return {key: tuple(of.shape) for key, of in make().state_dict().items()}


def tensors(model):
    return {key: Tensor.of(of.numpy()) for key, of in model.state_dict().items()}


@pytest.mark.parametrize("name", [*clip.CONFIGS, *siglip.CONFIGS])
def test_the_full_sizes_have_transformers_keys_and_shapes(name):
    family = clip if name in clip.CONFIGS else siglip
    config, (prefix, both, text, vision) = family.CONFIGS[name], FAMILIES[family]
    net = both.from_config(config)
    original = meta(lambda: getattr(transformers, f"{prefix}Model")(getattr(transformers, f"{prefix}Config")(**config)))
    assert shapes_of(net) == original
    if name in COUNTS:
        assert (len(original), sum(map(np.prod, original.values()))) == COUNTS[name]
    for cls, part in ((text, "text"), (vision, "vision")):
        tower = cls.from_config(config)
        kind = tower.config()["architectures"][0]
        own = dict(tower.config())
        del own["architectures"], own["model_type"]
        found = meta(lambda: getattr(transformers, kind)(getattr(transformers, f"{prefix}{part.capitalize()}Config")(**own)))
        assert shapes_of(tower) == found


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14"])
def test_open_clips_full_sizes_are_renamed_to_all_keys_that_there_are(name):
    config = open_clip.get_model_config(name)
    of = meta(lambda: open_clip.CLIP(**config))
    empty = {key: Tensor(shape, np.dtype(np.float32), None) for key, shape in of.items()}
    net = clip.CLIP.from_config(config)
    assert {key: tensor.shape for key, tensor in clip.CLIP.canonical(empty).items()} == shapes_of(net)


def ask(net, params, images, double):
    """States of both towers: those of the last layer, and those before it."""
    net = net.clone(dtype=jnp.float64 if double else jnp.float32)
    with jax.enable_x64(double):
        found = jax.jit(
            lambda params, ids, images: net.apply(
                {"params": params}, method=lambda net: (net.encode_text(ids), net.encode_image(images), net(ids, images)))
        )(params, IDS, images.transpose(0, 2, 3, 1))  # fmt: skip
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("eos", [2, 90])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_is_transformers(activation, eos, double, tmp_path):
    config = SMALL | {
        "text_config": SMALL["text_config"] | {"eos_token_id": eos, "hidden_act": activation},
        "vision_config": SMALL["vision_config"] | {"hidden_act": activation, "image_size": 40}}  # fmt: skip
    compare(transformers.CLIPModel(transformers.CLIPConfig(**config)), clip.CLIP.from_config(config), 40, double, tmp_path)


@pytest.mark.parametrize("double", [False, True])
def test_siglip_is_transformers(double, tmp_path):
    config = SMALL | {"vision_config": SMALL["vision_config"] | {"image_size": 40}}
    config = {key: config[key] for key in ("text_config", "vision_config")}
    compare(transformers.SiglipModel(transformers.SiglipConfig(**config)), siglip.SigLIP.from_config(config), 40, double, tmp_path)


def compare(model, net, size, double, folder):
    """Values of random weights, and of the file that is written, as transformers reads it."""
    model = published.torch_model(model)
    params = state_dicts.load_params(published.abstract(net), net.canonical(tensors(model)), "model")
    images = published.normal("images", (2, 3, size, size)).astype(np.float64 if double else np.float32)
    text, image, logits = ask(net, params, images, double)
    written = state_dicts.state_dict(params)
    assert {key: (array.shape, array.tobytes()) for key, array in written.items()} == {
        key: (tuple(of.shape), of.numpy().tobytes()) for key, of in model.state_dict().items()}  # fmt: skip
    safetensors.numpy.save_file(written, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(net.config()))
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    try:
        torch.set_default_dtype(torch.float64 if double else torch.float32)
        for of in (model, again.eval()):
            of = of.double() if double else of
            with torch.no_grad():
                expected = of(input_ids=torch.tensor(IDS).long(), pixel_values=torch.from_numpy(images))
                embeddings = of.get_text_features(torch.tensor(IDS).long()), of.get_image_features(torch.from_numpy(images))
            embeddings = [getattr(each, "pooler_output", each) for each in embeddings]  # transformers 5
            tolerance = 1e-10 if double else 2e-5
            last = image.tokens if type(net) is siglip.SigLIP else image.hidden
            for found, theirs in (
                (text.tokens, expected.text_model_output.last_hidden_state), (text.embedding, embeddings[0]),
                (last, expected.vision_model_output.last_hidden_state), (image.embedding, embeddings[1]),
                (logits, expected.logits_per_image),
            ):  # fmt: skip
                published.assert_close(found, theirs.numpy(), tolerance)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cls, kind", [(clip.CLIPText, "CLIPTextModel"), (siglip.SigLIPText, "SiglipTextModel")])
def test_a_mask_is_transformers(cls, kind):
    config, mask = SMALL["text_config"], np.array([[1] * 4 + [0] * 4, [1] * 8, [1] * 7 + [0]])
    model = published.torch_model(getattr(transformers, kind)(getattr(transformers, kind.replace("Model", "Config"))(**config)))
    net = cls.from_config(config | {"architectures": [kind]})
    params = state_dicts.load_params(published.abstract(net), net.canonical(tensors(model)), "model")
    with torch.no_grad():
        theirs = model(torch.tensor(IDS).long(), torch.tensor(mask)).last_hidden_state
    published.assert_close(jax.jit(net.apply)({"params": params}, IDS, mask).tokens, theirs)


TOWERS = [
    (clip.CLIPText, "CLIPTextModelWithProjection"), (clip.CLIPText, "CLIPTextModel"), (clip.CLIPVision, "CLIPVisionModelWithProjection"),
    (clip.CLIPVision, "CLIPVisionModel"), (siglip.SigLIPText, "SiglipTextModel"), (siglip.SigLIPVision, "SiglipVisionModel"),
]  # fmt: skip


@pytest.mark.parametrize("cls, kind", TOWERS)
def test_a_tower_that_is_written_is_one_of_transformers(cls, kind, tmp_path):
    net = cls.from_config(SMALL)
    if kind in ("CLIPTextModel", "CLIPVisionModel"):
        net = net.clone(projection_dim=None)
    assert net.config()["architectures"] == [kind]
    params = published.params(net)
    safetensors.numpy.save_file(state_dicts.state_dict(params), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(net.config()))
    model, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = IDS if "Text" in kind else published.normal("images", (2, 3, 32, 32))
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(inputs).long() if "Text" in kind else torch.from_numpy(inputs))
    found = jax.jit(net.apply)({"params": params}, inputs if "Text" in kind else inputs.transpose(0, 2, 3, 1))
    ours = found.embedding if "Projection" in kind or cls in (siglip.SigLIPText, siglip.SigLIPVision) else found.pooled
    published.assert_close(ours, theirs[0].numpy() if "Projection" in kind else theirs.pooler_output.numpy())
    assert cls.from_config(model.config.to_dict()).config() == net.config()


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_preprocessing_is_open_clips(mode):
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {"resize_mode": mode}}
    ours, theirs = Preprocessing.from_open_clip(config), open_clip.image_transform(224, is_train=False, resize_mode=mode)
    for shape in ((301, 227, 3), (224, 225, 3), (64, 99, 3)):
        image = (np.random.RandomState(0).random_sample(shape) * 256).astype(np.uint8)
        expected = theirs(Image.fromarray(image)).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(ours(image), expected, rtol=0, atol=1e-6)


def photographs():
    """A temple and a flower."""
    return [Image.fromarray(sklearn.datasets.load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


@pytest.fixture(scope="module")
def real():
    """Logits of captions for the photographs: ours and transformers'."""
    folder = real_weights.find("clip-vit-base-patch32")
    captions = ["a photo of a temple", "a photo of a flower", "a photo of a dog, isn't it?"]
    encoder, tokenizer = open_encoder("clip", folder), read_clip_tokenizer(folder)
    ours = jax.jit(encoder.apply)(tokenizer.encode(captions), np.stack([encoder.preprocessing(image) for image in photographs()]))
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    given = processor(text=captions, images=photographs(), return_tensors="pt", padding="max_length", max_length=77)
    with torch.no_grad():
        theirs = transformers.CLIPModel.from_pretrained(folder)(**given).logits_per_image
    return np.asarray(ours), theirs.numpy()


def test_clip_with_its_real_weights_gives_transformers_logits(real):
    ours, theirs = real
    published.assert_close(ours, theirs)


def test_clip_with_its_real_weights_tells_a_temple_from_a_flower(real):
    assert real[0].argmax(1).tolist() == [0, 1]
