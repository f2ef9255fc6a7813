"""Tokenizers from published files: special ids, truncation and padding are the network's, not the file's."""

import json
import struct

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mmdiff.encoders.published_tokenizers import canonical, open_tokenizer
from mmdiff.errors import UserError
from mmdiff.files import FileError, Missing

WORDS = ("red", "seven", "a", "cat", "##s", "s", "stock", "market")


def wordpiece():
    """A tokenizer.json as MiniLM's: its truncation and padding are not what the network is used with."""
    special = {"[PAD]": 0, "[UNK]": 5, "[CLS]": 7, "[SEP]": 9}
    others = [i for i in range(20) if i not in special.values()]
    rules = Tokenizer(models.WordPiece({**special, **dict(zip(WORDS, others))}, unk_token="[UNK]"))
    rules.normalizer, rules.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    rules.decoder = decoders.WordPiece()
    rules.add_special_tokens([AddedToken(token, special=True) for token in special])
    rules.enable_truncation(4)
    rules.enable_padding(length=4, pad_id=0, pad_token="[PAD]")
    return rules.to_str()


def unigram():
    """A tokenizer.json as T5's and SigLIP's: pieces with scores, the end at 1, and nothing that appends it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -float(i + 1)) for i, word in enumerate(WORDS)), ("s", -9.0)]
    rules = Tokenizer(models.Unigram(pieces, unk_id=2))
    rules.pre_tokenizer, rules.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    rules.add_special_tokens([AddedToken(piece, special=True) for piece, _ in pieces[:3]])
    return rules.to_str()


def message(*fields):
    """A protocol buffer: (number, value) of ints below 128, floats, texts and messages."""
    found = b""
    for number, value in fields:
        if isinstance(value, int):
            tag, value = 0, bytes([value])
        elif isinstance(value, float):
            tag, value = 5, struct.pack("<f", value)
        else:
            value = value.encode() if isinstance(value, str) else value
            tag, value = 2, bytes([len(value)]) + value
        number = number << 3 | tag
        found += (bytes([number]) if number < 128 else bytes([number & 127 | 128, number >> 7])) + value
    return found


def spiece():
    """A spiece.model of the same pieces as `unigram`."""
    pieces = [message((1, "<pad>"), (3, 3)), message((1, "</s>"), (3, 3)), message((1, "<unk>"), (3, 2))]
    pieces += [message((1, f"▁{word}"), (2, -float(i + 1))) for i, word in enumerate(WORDS)] + [message((1, "s"), (2, -9.0))]
    return message(*[(1, piece) for piece in pieces], (2, message((3, 1), (40, 2))), (3, message((1, "identity"), (3, 1))))


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_bert_has_256_ids_whatever_the_file_says(file):
    tokenizer = open_tokenizer("sentence_bert", file(wordpiece()))
    ids = tokenizer.encode(["A red seven", "red " * 500])
    assert ids.shape == (2, 256) and ids.dtype == np.int32
    a, red, seven = 3, 1, 2
    np.testing.assert_array_equal(ids[0], [7, a, red, seven, 9] + [0] * 251)
    np.testing.assert_array_equal(ids[1], [7] + [red] * 254 + [9])
    np.testing.assert_array_equal(tokenizer.mask(ids).sum(1), [5, 256])
    assert tokenizer.decode(ids[:1]) == ["a red seven"]
    assert tokenizer.unseen("a blue cats tail") == ["blue", "tail"] and tokenizer.unseen("cats") == []


def test_t5_ends_in_its_own_end_and_pads_with_its_own_padding(file):
    tokenizer = open_tokenizer("t5", file(unigram()) / "tokenizer.json", length=5)
    ids = tokenizer.encode(["red seven", "", "a cat red seven a cat"])
    np.testing.assert_array_equal(ids, [[3, 4, 1, 0, 0], [1, 0, 0, 0, 0], [5, 6, 3, 4, 1]])
    np.testing.assert_array_equal(tokenizer.mask(ids), [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1] * 5])
    assert tokenizer.decode(ids) == ["red seven", "", "a cat red seven"] and tokenizer.size == 12


def test_a_sentencepiece_model_is_the_same_tokenizer(file, tmp_path):
    texts = ["red  seven", "", " a cat red <extra_id_0> seven a cat", "blue cat"]
    expected = open_tokenizer("siglip_text", file(unigram())).encode([text.replace("<extra_id_0>", "") for text in texts])
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "spiece.model").write_bytes(spiece())
    np.testing.assert_array_equal(open_tokenizer("siglip_text", tmp_path).encode(texts)[[0, 1, 3]], expected[[0, 1, 3]])
    t5 = open_tokenizer("t5", tmp_path, length=8)
    assert t5.size == 112 and t5.unseen("a blue cat") == ["blue"]
    np.testing.assert_array_equal(t5.encode(texts[2:3]), [[5, 6, 3, 111, 4, 5, 6, 1]])
    for content in (spiece()[:-5], b"\xff" * 40, b"", message((1, message((1, "a"), (3, 6))))):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(FileError, match=r"spiece.model is no tokenizer of t5 \(it .*\): copy it again"):
            open_tokenizer("t5", tmp_path)


def test_siglip_pads_with_the_end_and_knows_no_mask(file):
    tokenizer = open_tokenizer("siglip_text", file(unigram()))
    ids = tokenizer.encode(["  RED, (seven)! "])
    assert ids.shape == (1, 64)
    np.testing.assert_array_equal(ids[0, :4], [3, 4, 1, 1])
    assert (ids[0, 2:] == 1).all() and tokenizer.mask(ids).all()


def test_canonical_texts_stay_as_they_are():
    once = canonical("A Cat's  (red) tail: «no» ﬁ ÉTÉ.")
    assert once == "a cats red tail «no» ﬁ été" and canonical(once) == once


def test_what_is_no_tokenizer_of_a_kind_is_refused_in_one_sentence(file, tmp_path):
    with pytest.raises(FileError, match="has no tokenizer.json and no spiece.model"):
        open_tokenizer("t5", tmp_path)
    with pytest.raises(Missing):
        open_tokenizer("t5", tmp_path / "tokenizer.json")
    folder = file(wordpiece())
    with pytest.raises(FileError, match=r"is no tokenizer of t5 \(it has no </s>\): copy it again"):
        open_tokenizer("t5", folder)
    for damaged in ("[]", "{", json.dumps({"model": {"type": "Unigram"}})):
        with pytest.raises(FileError, match=r"is no tokenizer of sentence_bert"):
            open_tokenizer("sentence_bert", file(damaged))
    with pytest.raises(UserError, match="one of clip_text, t5, sentence_bert, siglip_text"):
        open_tokenizer("gpt", folder)
    with pytest.raises(UserError, match="3 or more, got 2"):
        open_tokenizer("sentence_bert", folder, length=2)
