"""T5's encoder, BERT and their tokenizers against transformers', MiniLM with its real weights."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import real_weights
import torch
import transformers
from originals import text as originals
from transformers_files import assert_keys, params, reopened

from mmdiff.encoders import open_encoder, open_tokenizer, sentence_bert, t5
from mmdiff.encoders.sentence_bert import SentenceBERT
from mmdiff.encoders.t5 import T5Encoder, relative_buckets

LENGTHS = (1, 7, 40, 63)
TEXTS = (
    "A small red seven", "", " ", "Ünïcödé naïve café ÉTÉ", "数字の七 on a blue background", "🙂 emoji 👩‍👩‍👧", "don't (stop) it's 3.14%",
    "a\tb\nc", "word " * 400, "antidisestablishmentarianism" * 9, "&amp; <b>html</b>", "a [SEP] b [MASK]", "ﬁ ligature Ⅷ ½", "x" * 300,
    "a </s> b")  # fmt: skip


def answers(net, loaded, model, name, length, padding):
    """States of all tokens, ours and the original's."""
    ids, mask, expected = originals._states(model, name, length, padding)
    found = jax.jit(net.apply)({"params": loaded}, ids, mask)
    return np.asarray(found if isinstance(net, T5Encoder) else found[0]), expected


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("activation", ["gated-gelu", "relu"])
def test_t5(activation, length):
    model = originals._t5(feed_forward_proj=activation)
    net = T5Encoder.from_config(model.config.to_dict())
    found, expected = answers(net, params(net, model), model, "t5", length, length // 3)
    print(activation, length, np.abs(found - expected).max(), np.abs(expected).max())
    published.assert_close(found, expected)


@pytest.mark.parametrize("length", LENGTHS)
def test_bert(length):
    model = originals._bert()
    net = SentenceBERT.from_config(model.config.to_dict())
    found, expected = answers(net, params(net, model), model, "bert", length, length // 3)
    print(length, np.abs(found - expected).max(), np.abs(expected).max())
    published.assert_close(found, expected)


def test_bert_in_double_precision():
    model = originals._bert().double()
    with jax.enable_x64(True):
        net = SentenceBERT.from_config(published.SMALL["bert"]).clone(dtype=jnp.float64)
        found, expected = answers(net, params(net, model), model, "bert", 40, 15)
        assert found.dtype == expected.dtype == np.float64
    print(np.abs(found - expected).max(), np.abs(expected).max())
    published.assert_close(found, expected, 1e-10)


def test_buckets_of_t5_are_the_published_ones_at_any_distance():
    from transformers.models.t5.modeling_t5 import T5Attention

    for buckets, furthest in ((32, 128), (16, 50)):
        distance = torch.arange(700)[None] - torch.arange(700)[:, None]
        expected = T5Attention._relative_position_bucket(distance, True, buckets, furthest)
        np.testing.assert_array_equal(relative_buckets(700, buckets, furthest), expected.numpy())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_what_we_write_is_opened_with_equal_answers(name, tmp_path):
    model, cls = getattr(originals, f"_{name}")(), {"bert": SentenceBERT, "t5": T5Encoder}[name]
    net = cls.from_config(model.config.to_dict())
    again = reopened(net, params(net, model), tmp_path, type(model))
    _, _, expected = originals._states(model, name)
    np.testing.assert_array_equal(originals._states(again, name)[2], expected)


@pytest.mark.parametrize("name", t5.CONFIGS)
def test_keys_of_t5_at_full_size(name):
    config = transformers.T5Config(**t5.CONFIGS[name])
    count = assert_keys(T5Encoder.from_config(t5.CONFIGS[name]), lambda: transformers.T5EncoderModel(config))
    if name == "t5-v1_1-xxl":
        assert count == 4_762_310_656


@pytest.mark.parametrize("name", sentence_bert.CONFIGS)
def test_keys_of_bert_at_full_size(name):
    config = transformers.BertConfig(**sentence_bert.CONFIGS[name])
    count = assert_keys(SentenceBERT.from_config(sentence_bert.CONFIGS[name]), lambda: transformers.BertModel(config))
    if name == "all-MiniLM-L6-v2":
        assert count == 22_713_216


def test_minilm_and_its_tokenizer_with_their_real_weights(tmp_path):
    folder = real_weights.minilm(tmp_path)
    encoder, tokenizer = open_encoder("sentence_bert", folder), open_tokenizer("sentence_bert", folder)
    original = transformers.BertTokenizerFast.from_pretrained(folder)
    batch = original(list(TEXTS), padding="max_length", max_length=256, truncation=True, return_tensors="np")
    ids = tokenizer.encode(TEXTS)
    np.testing.assert_array_equal(ids, batch["input_ids"])
    np.testing.assert_array_equal(tokenizer.mask(ids), batch["attention_mask"])
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])).last_hidden_state.numpy()
    found = jax.jit(encoder.net.apply, static_argnames="method")({"params": encoder.params}, ids, batch["attention_mask"], method="encode")
    expected = originals._sentence(states, batch["attention_mask"])
    print(np.abs(found - expected).max())
    published.assert_close(found, expected, 1e-6)
