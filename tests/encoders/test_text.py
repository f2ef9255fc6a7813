"""T5's encoder and SentenceBERT against what transformers answers."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.sentence_bert import SentenceBERT
from mmdiff.encoders.t5 import T5Encoder
from mmdiff.errors import UserError

NETS = {"bert": SentenceBERT, "t5": T5Encoder}


def net_of(name, **changes):
    return NETS[name].from_config(published.SMALL[name] | changes)


def example(name, length=40, padding=15):
    return published.token_ids(name, (2, length), 100), published.masked((2, length), padding)


def test_bert_gives_the_published_states_and_sentence_vectors():
    net, golden = net_of("bert"), published.golden("bert")

    @jax.jit
    def both(params, ids, mask):
        return net.apply({"params": params}, ids, mask)[0], net.apply({"params": params}, ids, mask, method="encode")

    states, vectors = both(published.params(net), *example("bert"))
    published.assert_close(states, golden["states"])
    published.assert_close(vectors, golden["sentence"], 1e-6)


def test_t5_gives_the_published_states():
    net = net_of("t5")
    ids, mask = example("t5")
    states = jax.jit(net.apply)({"params": published.params(net)}, ids, mask)
    published.assert_close(states, published.golden("t5")["states"])


@pytest.mark.parametrize("name", NETS)
def test_padding_changes_no_state_of_a_token(name):
    net = net_of(name)
    params, (ids, mask) = published.params(net), example(name)
    encode = jax.jit(lambda ids: net.apply({"params": params}, ids, mask, method="encode"))
    short, other = encode(ids), encode(np.where(mask == 1, ids, 7))
    if name == "t5":
        short, other = short[mask == 1], other[mask == 1]
    assert np.array_equal(short, other) and np.isfinite(short).all()


@pytest.mark.parametrize("name", NETS)
def test_a_published_config_makes_the_network_and_comes_back(name):
    net = net_of(name)
    config = net.config()
    assert published.SMALL[name].items() <= config.items()
    assert NETS[name].from_config(config) == net


@pytest.mark.parametrize("name", NETS)
def test_state_dicts_come_back_bit_for_bit(name):
    net = net_of(name)
    abstract = published.abstract(net)
    weights = {key: published.weight(key, shape) for key, shape in state_dicts.expected(abstract).items()}
    canonical = net.canonical({key: Tensor.of(array) for key, array in weights.items()})
    back = state_dicts.state_dict(state_dicts.load_params(abstract, canonical, name))
    assert back.keys() == weights.keys() and all(np.array_equal(back[key], array) for key, array in weights.items())


def test_other_layouts_of_bert_are_the_same_network():
    weights = {key: Tensor.of(np.zeros(shape)) for key, shape in state_dicts.expected(published.abstract(net_of("bert"))).items()}
    renames = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for key, tensor in weights.items():
        for new, former in renames.items():
            key = key.replace(new, former)
        old[f"bert.{key}"] = tensor
    extra = {"cls.predictions.bias": Tensor.of(np.zeros(3)), "bert.embeddings.position_ids": Tensor.of(np.zeros(3))}
    assert SentenceBERT.canonical(old | extra) == weights


def test_the_token_table_of_t5_has_two_names():
    shared, layer, head = (Tensor.of(np.zeros(size)) for size in (3, 4, 5))
    expected = {"shared.weight": shared, "encoder.final_layer_norm.weight": layer}
    file = {"encoder.final_layer_norm.weight": layer, "lm_head.weight": head, "decoder.block.0.layer.0.layer_norm.weight": layer}
    assert T5Encoder.canonical(file | {"encoder.embed_tokens.weight": shared}) == expected
    assert T5Encoder.canonical(file | {"shared.weight": shared}) == expected
    assert T5Encoder.canonical(file | {"shared.weight": shared, "encoder.embed_tokens.weight": shared}) == expected


def test_the_first_t5_has_one_product_and_relu():
    keys = state_dicts.expected(published.abstract(net_of("t5", feed_forward_proj="relu")))
    assert "encoder.block.1.layer.1.DenseReluDense.wi.weight" in keys
    assert not any(key.endswith(("wi_0.weight", "wi_1.weight")) for key in keys)


def test_what_these_networks_cannot_do_is_refused():
    with pytest.raises(UserError, match="float16"):
        T5Encoder(dtype=jnp.float16)
    with pytest.raises(UserError, match="positions"):
        SentenceBERT.from_config({"position_embedding_type": "relative_key"})
    with pytest.raises(UserError, match="64 positions"):
        jax.eval_shape(net_of("bert").init, jax.random.key(0), np.zeros((1, 65), np.int32), np.ones((1, 65), np.int32))


@pytest.mark.parametrize("name", NETS)
def test_bfloat16_is_near_float32(name):
    net = net_of(name)
    params, (ids, mask) = published.params(net), example(name)
    half = jax.jit(lambda ids: net.clone(dtype=jnp.bfloat16).apply({"params": params}, ids, mask, method="encode"))(ids)
    whole = published.golden(name)[{"bert": "sentence", "t5": "states"}[name]]
    assert half.dtype == {"bert": jnp.float32, "t5": jnp.bfloat16}[name]  # a vector of length 1 is computed in float32
    published.assert_close(half.astype(jnp.float32), whole, 0.05)
