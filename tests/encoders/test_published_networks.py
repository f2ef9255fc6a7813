"""Opening published networks: files and folders in every accepted layout, configurations, kinds, types, shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from mmdiff.convert import state_dicts, write_weights
from mmdiff.encoders import open_encoder
from mmdiff.encoders.t5 import T5Encoder
from mmdiff.errors import UserError

SMALL_T5 = T5Encoder(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")


def written(folder, net, **options):
    """A published folder with random weights of a network."""
    weights = state_dicts.state_dict(published.params(net))
    write_weights(folder, weights, net.config(), **options)
    return weights


def test_a_folder_opens_with_its_configuration_and_its_parameters_are_equal(tmp_path):
    weights = written(tmp_path / "t5", SMALL_T5, shard_size=10_000)
    assert len(list((tmp_path / "t5").glob("*.safetensors"))) > 2
    encoder = open_encoder("t5", tmp_path / "t5")
    assert encoder.net == SMALL_T5 and encoder.licence == "Apache-2.0" and encoder.preprocessing is None
    assert encoder.counts == {"tensors": len(weights), "parameters": sum(w.size for w in weights.values()), "dtype": "float32"}
    found = state_dicts.state_dict(encoder.params)
    assert all(np.array_equal(found[key], weights[key]) for key in weights) and set(found) == set(weights)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(encoder.params))
    assert encoder.apply(*encoder.net.example_inputs()).shape == (1, 2, 32)


@pytest.mark.parametrize(
    ("kind", "what", "options", "message"),
    [
        ("t6", "t5", {}, "there are "),
        ("t5", "none", {}, "no such file"),
        ("sentence_bert", "t5", {}, "is a t5, not a sentence_bert"),
        ("t5", "t5/model.safetensors", {"config": "t5-v1_1-huge"}, "nor one of the configurations of t5: t5-v1_1-small"),
        ("t5", "t5", {"dtype": jnp.float16}, "overflows in float16"),
        ("t5", "t5", {"within": "ema"}, "has no 'ema' in it"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(tmp_path, kind, what, options, message):
    written(tmp_path / "t5", SMALL_T5)
    with pytest.raises(UserError, match=message) as error:
        open_encoder(kind, tmp_path / what, **options)
    assert "\n" not in str(error.value)
