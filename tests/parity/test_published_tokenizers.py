"""T5's and SigLIP's tokenizers against transformers' own, which run sentencepiece, for a model that sentencepiece trains here."""

import pathlib
import random

import numpy as np
import pytest
import sentencepiece
import transformers

from mmdiff.encoders import open_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = (
    "A small red seven", "", " ", "  two   spaces  ", "Ünïcödé naïve café ÉTÉ", "数字の七 on a blue background", "🙂 emoji 👩‍👩‍👧",
    "a\tb\nc", "▁ under ▁▁ x", "x" * 300, "word " * 200, "ﬁ ligature Ⅷ ½", "don't (stop) it's 3.14%", "&amp; <b>",
    "zero\u200bwidth \u00a0nbsp\u3000wide")  # fmt: skip


def texts():
    """Odd texts, and random ones, without what the `tokenizers` package, and with it transformers' other class, does differently: a
    combining mark after a character that normalization replaces is lost; blanks around a spelled special token count."""
    stream, letters = random.Random(0), "abc ÀéßŁ数\u00a0 ▁.,!()1²ﬃΩ\u2028\x07\u00ad"
    return [*TEXTS, *("".join(stream.choice(letters) for _ in range(stream.randrange(30))) for _ in range(1000))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spiece")
    lines = [line for path in sorted((ROOT / "mmdiff").rglob("*.py")) for line in path.read_text().splitlines() if line.strip()]
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines[:6000]), model_writer=file, vocab_size=1000, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            model_type="unigram", normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2)  # fmt: skip
    return folder


@pytest.mark.parametrize("kind, length", [("t5", 77), ("siglip_text", 64)])
def test_ids_are_those_of_sentencepiece(folder, kind, length):
    if kind == "t5":
        original = transformers.T5Tokenizer(str(folder / "spiece.model"), legacy=False)
    else:
        original = transformers.SiglipTokenizer(str(folder / "spiece.model"))
    tokenizer = open_tokenizer(kind, folder, length)
    batch = original(texts(), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    ids = tokenizer.encode(texts())
    wrong = [text for text, row, expected in zip(texts(), ids, batch["input_ids"]) if not np.array_equal(row, expected)]
    assert not wrong
    if kind == "t5":
        np.testing.assert_array_equal(tokenizer.mask(ids), batch["attention_mask"])
