"""Text encoders that a config names: each kind's states, vectors and masks are those of its network."""

import jax
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mmdiff.convert import state_dicts
from mmdiff.convert.weight_writer import write_weights
from mmdiff.data import TextStates
from mmdiff.encoders import SentenceBERT, SigLIPText, T5Encoder
from mmdiff.errors import UserError

TEXTS = ["red seven", "a red seven on a red a"]
BERT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NETS = {
    "t5": T5Encoder.from_config({"vocab_size": 16, "d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}),
    "sentence_bert": SentenceBERT.from_config({"vocab_size": 16, "max_position_embeddings": 16, **BERT}),
    "siglip_text": SigLIPText(vocab_size=16, max_position_embeddings=8, **BERT),
}


def tokenizer_file(bert):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if bert else ["<pad>", "</s>", "<unk>"]
    words = {token: i for i, token in enumerate([*special, "a", "red", "seven", "on"])}
    rules = Tokenizer(models.WordLevel(words, unk_token=special[1 if bert else 2]))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.add_special_tokens([AddedToken(token, special=True) for token in special])
    return rules.to_str()


@pytest.fixture(scope="module", params=NETS)
def published(request, tmp_path_factory):
    net, folder = NETS[request.param], tmp_path_factory.mktemp(request.param) / "net"
    params = jax.jit(net.init)(jax.random.key(0), *net.example_inputs())["params"]
    write_weights(folder, state_dicts.state_dict(params), net.config())
    (folder / "tokenizer.json").write_text(tokenizer_file(request.param == "sentence_bert"))
    return request.param, folder, net, params


def test_states_vectors_and_masks(published):
    kind, folder, net, params = published
    vector = "" if kind == "t5" else "query"
    encoder = TextStates({"kind": kind, "path": str(folder)}, vector=vector, masked=True, length=8)
    found = encoder.encode(TEXTS)
    ids = encoder.tokenizer.encode(TEXTS)
    mask = encoder.tokenizer.mask(ids)
    inputs = (ids,) if kind == "siglip_text" else (ids, mask)  # whose towers were trained without
    states, embedding, length = jax.jit(lambda: answer(kind, net, params, inputs))()
    np.testing.assert_allclose(found["text"], states * mask[..., None], atol=1e-5)
    assert kind == "siglip_text" or not found["text"][0, -1].any() and found["text"][0, 0].any()
    if vector:
        np.testing.assert_allclose(found["query"], embedding / length, atol=1e-5)
    assert len({encoder.fingerprint(), None}) == 2


def answer(kind, net, params, inputs):
    found = net.apply({"params": params}, *inputs)
    states = {"t5": lambda: found, "sentence_bert": lambda: found[0], "siglip_text": lambda: found.tokens}[kind]()
    if kind == "t5":
        return states, states[:, 0], 1.0
    embedding = net.apply({"params": params}, *inputs, method="encode") if kind == "sentence_bert" else found.embedding
    return states, embedding, jax.numpy.linalg.norm(embedding, axis=-1, keepdims=True)


def test_the_tokenizer_of_another_network(published):
    kind, folder, net, params = published
    arrays, small = state_dicts.state_dict(params), folder / "small"
    vocabulary = next(key for key in arrays if key.endswith(("shared.weight", "word_embeddings.weight", "token_embedding.weight")))
    write_weights(small, arrays | {vocabulary: np.zeros((5, 16), np.float32)}, net.config() | {"vocab_size": 5})
    encoder = TextStates({"kind": kind, "path": str(small), "tokenizer": str(folder)}, length=8)
    with pytest.raises(UserError, match="has [78] ids and the text encoder .* 5: name the one that was published with it by"):
        encoder.encode(TEXTS)
    with pytest.raises(UserError, match="of the tokenizer, whose file or folder --config.text_encoder.tokenizer names"):
        TextStates({"kind": kind, "path": str(small), "tokenizer": ""}, length=8).encode(TEXTS)


def test_t5_has_no_vector_of_a_text():
    with pytest.raises(UserError, match=r"config.text_encoder.kind is 't5', which has no vector"):
        TextStates({"kind": "t5", "path": ""}, vector="query")
