"""A published list of classes of a tokenizer's codes: several codes are one class, which is decoded as the first of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.convert import state_dicts
from mmdiff.convert.weight_writer import write_weights
from mmdiff.data.named_autoencoders import CODES, ImageTokens
from mmdiff.encoders.vq_model import VQModel
from mmdiff.errors import UserError
from mmdiff.files import write_json

VQ = {"block_out_channels": [4, 4], "latent_channels": 4, "num_vq_embeddings": 30, "norm_num_groups": 4,
      "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip
LIST = np.array([0, 0, 1, 0, 2, 3, 0, 4, 0, 5] + 20 * [0], np.int64)  # classes 1 to 5 are one code each


def test_codes_are_classes_of_the_published_list(tmp_path):
    net = VQModel.from_config(VQ)
    params = jax.jit(net.init)(jax.random.key(0), *net.example_inputs())["params"]
    write_weights(tmp_path / "vqgan", state_dicts.state_dict(params), net.config())
    np.save(tmp_path / "list.npy", LIST)
    section = {"kind": "vq_model", "path": str(tmp_path / "vqgan"), "codes": str(tmp_path / "list.npy")}
    tokenizer = ImageTokens(section, 4, 6)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    whole = np.asarray(jax.jit(lambda x: net.apply({"params": params}, x, method="encode"))(images))
    ids = tokenizer.encode(images)["tokens"]
    np.testing.assert_array_equal(ids, LIST[whole].reshape(3, 16))
    assert tokenizer.entries == tokenizer.choose([]) == [0, 2, 4, 5, 7, 9]
    first = jnp.asarray(tokenizer.entries)[ids].reshape(3, 4, 4)
    decoded = jax.jit(lambda ids: net.apply({"params": params}, ids, method="decode"))(first)
    np.testing.assert_allclose(tokenizer.decode(ids), np.clip(decoded, -1, 1), atol=1e-5)
    assert tokenizer.fingerprint() not in (None, ImageTokens({**section, "codes": ""}, 4, 6).fingerprint())

    with pytest.raises(UserError, match="holds int64 .30., not for each of the 30 codes of .* one of 7 classes"):
        ImageTokens(section, 4, 7).classes
    wrong = {"lists 3 of 3 codes or more": [0, 1, 2], "lists 6 of 31 codes or more": [0, 1, 2, 3, 4, 30], "are numbers": [-1] * 6,
             "lists 0 of 0 codes": []}  # fmt: skip
    for words, codes in wrong.items():
        write_json(tmp_path / CODES, {"encoder": "", "codes": codes})
        with pytest.raises(UserError, match=words):
            ImageTokens({**section, "codes": ""}, 4, 6, str(tmp_path)).entries
    write_json(tmp_path / CODES, {"encoder": "", "codes": [0, 1, 2, 3, 4, 5]})
    with pytest.raises(UserError, match="holds tokens of other codes than those of config.encoder.codes"):
        ImageTokens(section, 4, 6, str(tmp_path)).entries
