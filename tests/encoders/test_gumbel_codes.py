"""taming's GumbelVQ: the code of a pixel is that of its largest logit, of all codes or of those that are kept."""

import json

import jax
import numpy as np
import published
import pytest
from PIL import Image

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor
from mmdiff.convert.weight_writer import write_weights
from mmdiff.data.named_autoencoders import ImageTokens
from mmdiff.encoders import autoencoder_layouts, vq_model
from mmdiff.encoders.vq_model import VQModel
from mmdiff.errors import UserError

CONFIG = {
    **autoencoder_layouts.levels([4, 4]), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4, "num_vq_embeddings": 20,
    "quantizer": "gumbel"}  # fmt: skip


def test_codes_are_those_of_the_largest_logits(tmp_path):
    net = VQModel.from_config(CONFIG)
    shapes = state_dicts.expected(published.abstract(net))
    weights = {key.replace("quantize.embedding", "quantize.embed"): published.weight(key, shape) for key, shape in shapes.items()}
    assert weights["quantize.proj.weight"].shape == (20, 4, 1, 1) and weights["quantize.embed.weight"].shape == (20, 4)
    weights = autoencoder_layouts.to_ldm(weights) | {"loss.discriminator.weight": np.zeros(3, np.float32)}
    canonical = VQModel.canonical({key: Tensor.of(array) for key, array in weights.items()})
    params = state_dicts.load_params(published.abstract(net), canonical, "weights")
    images = published.normal("gumbel", (2, 8, 12, 3))

    @jax.jit
    def run(params, images):
        h = net.apply({"params": params}, images, method="latents")
        return h, net.apply({"params": params}, images, method="encode")

    h, codes = (np.asarray(array) for array in run(params, images))
    logits = h.astype(np.float64) @ weights["quantize.proj.weight"][:, :, 0, 0].T + weights["quantize.proj.bias"]
    np.testing.assert_array_equal(codes, logits.argmax(-1))
    assert len(np.unique(codes)) > 5
    # Of a part of the codebook: the largest of these logits, and the vectors of these codes.
    write_weights(tmp_path / "vq", {key: tensor.read() for key, tensor in canonical.items()}, net.config())
    kept = [1, 2, 3, 5, 8, 13]
    tokens = ImageTokens({"kind": "vq_model", "path": str(tmp_path / "vq")}, 4, 6, str(tmp_path))
    (tmp_path / "codes.json").write_text(json.dumps({"format": 1, "encoder": "", "codes": kept}))
    view = tokens.prepare(Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)))[None]
    ids = tokens.encode(view)["tokens"]
    logits = np.asarray(run(params, view)[0]) @ weights["quantize.proj.weight"][:, :, 0, 0].T + weights["quantize.proj.bias"]
    np.testing.assert_array_equal(ids.reshape(4, 4), logits[0][..., kept].argmax(-1))
    decoded = net.apply({"params": params}, np.array(kept)[ids].reshape(1, 4, 4), method="decode")
    np.testing.assert_allclose(tokens.decode(ids), np.clip(decoded, -1, 1), atol=1e-5)


def test_the_published_size_and_an_unknown_quantizer():
    shapes = state_dicts.expected(published.abstract(VQModel.from_config(vq_model.CONFIGS["vqgan-gumbel-f8-8192"])))
    assert shapes["quantize.proj.weight"] == (8192, 256, 1, 1) and shapes["quantize.embedding.weight"] == (8192, 256)
    assert shapes["encoder.down_blocks.3.attentions.1.to_q.weight"] == (512, 512)
    assert "encoder.down_blocks.4.resnets.0.conv1.weight" not in shapes
    assert "quantizer" not in VQModel.from_config(CONFIG | {"quantizer": "nearest"}).config()
    with pytest.raises(UserError, match="quantizer = 'sphere' in its configuration is none of nearest, gumbel"):
        published.abstract(VQModel.from_config(CONFIG | {"quantizer": "sphere"}))
