"""CLIP's tokenizer with a small vocabulary: the ids that open_clip's has (golden file), its files, and what it is as a text modality."""

import importlib.util
import json
import logging
import sys

import numpy as np
import odd_captions
import published
import pytest

from mmdiff.data.token_modalities import Texts
from mmdiff.encoders import clip_tokenizer
from mmdiff.encoders.clip_tokenizer import read_clip_tokenizer
from mmdiff.encoders.published_tokenizers import open_tokenizer
from mmdiff.errors import UserError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return odd_captions.write_vocabulary(tmp_path_factory.mktemp("clip") / "vocabulary.txt.gz")


@pytest.fixture(scope="module")
def tokenizer(path):
    return read_clip_tokenizer(path)


def transformers_files(tokenizer, folder, of=("vocab.json", "merges.txt", "tokenizer.json")):
    """The same vocabulary as transformers writes it."""
    model = json.loads(tokenizer.rules)["model"]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    contents = {
        "vocab.json": json.dumps(vocabulary), "tokenizer.json": json.dumps({"model": model | {"vocab": vocabulary}}),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""])}  # fmt: skip
    for name in of:
        (folder / name).write_text(contents[name], encoding="utf-8")
    return folder


def test_ids_are_open_clips(tokenizer):
    golden, texts = published.golden("clip_ids"), odd_captions.ODD + odd_captions.captions(30)
    rows = golden["plain"] | (importlib.util.find_spec("ftfy") is not None)
    assert golden["plain"].sum() >= 30
    np.testing.assert_array_equal(tokenizer.encode(texts)[rows], golden["ids"][rows])


def test_what_is_too_long_is_cut_and_keeps_its_end(tokenizer):
    row = tokenizer.encode(["dog " * 300])[0]
    assert row.dtype == np.int32 and row[0] == tokenizer.start and row[-1] == tokenizer.end and (row[1:-1] < tokenizer.start).all()


def test_without_ftfy_a_warning_says_so_once(tokenizer, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    clip_tokenizer._repair.cache_clear()
    with caplog.at_level(logging.WARNING):
        tokenizer.encode(["a dog", "a cat"])
        tokenizer.encode(["a dog"])
    assert len(caplog.records) == 1 and "pip install 'mmdiff[text]'" in caplog.text
    clip_tokenizer._repair.cache_clear()


def test_special_tokens_in_a_text_are_tokens_or_text(path, tokenizer):
    spelled, literal = "a dog<end_of_text>", read_clip_tokenizer(path, special=False)
    assert (tokenizer.encode([spelled]) == tokenizer.end).sum() == 2
    assert (literal.encode([spelled]) == literal.end).sum() == 1
    assert literal.decode(literal.encode([spelled])) == ["a dog < end _ of _ text >"]


def test_ids_give_the_text(tokenizer):
    texts = ["A photo of the  dogs, 1984!", "naïve été 日本 \U0001f600", ""]
    assert tokenizer.decode(tokenizer.encode(texts)) == ["a photo of the dogs , 1 9 8 4 !", "naïve été 日本 \U0001f600", ""]
    assert tokenizer.decode(np.full((1, 77), tokenizer.padding)) == [""]
    with pytest.raises(ValueError, match="has the ids 0.."):
        tokenizer.decode([[tokenizer.size]])


def test_transformers_files_hold_the_same_vocabulary(tokenizer, tmp_path):
    text = ["the dogs &amp; the cat", "a <|endoftext|> b"]
    folders = [tmp_path / name for name in ("two", "one", "pipeline/tokenizer")]
    for folder in folders:
        folder.mkdir(parents=True)
    two = read_clip_tokenizer(transformers_files(tokenizer, folders[0], ("vocab.json", "merges.txt")))
    one = read_clip_tokenizer(transformers_files(tokenizer, folders[1], ("tokenizer.json",)))
    assert one == two == open_tokenizer("clip_text", folders[0]) and two.padding == two.end == tokenizer.end
    assert (one.encode(text)[0, :5] == tokenizer.encode(text)[0, :5]).all() and (one.encode(text)[1] == one.end).sum() == 77 - 3
    (transformers_files(tokenizer, folders[2]) / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    assert read_clip_tokenizer(tmp_path / "pipeline").padding == 0
    assert read_clip_tokenizer(folders[2] / "tokenizer.json", 12, padding=5).encode(["dog"])[0, 3:].tolist() == [5] * 9


def test_other_files_are_a_sentence(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": []}}')
    with pytest.raises(UserError, match=r"tokenizer.json is no vocabulary of CLIP \(it has no !\)"):
        read_clip_tokenizer(tmp_path)
    (tmp_path / "pairs.txt.gz").write_bytes(b"\x1f\x8bno")
    with pytest.raises(UserError, match="pairs.txt.gz cannot be decompressed"):
        read_clip_tokenizer(tmp_path / "pairs.txt.gz")
    (tmp_path / "words.txt").write_text("first\none two three\n")
    with pytest.raises(UserError, match="words.txt is no vocabulary of CLIP"):
        read_clip_tokenizer(tmp_path / "words.txt")
    with pytest.raises(UserError, match="needs length >= 3 and padding in"):
        read_clip_tokenizer(odd_captions.write_vocabulary(tmp_path / "v.txt.gz"), 2)


def test_it_is_a_tokenizer_of_a_text_modality(tokenizer):
    texts = Texts(tokenizer)
    assert texts.shape == (77,) and texts.states == tokenizer.size
    ids = texts.parse("A red dog — quixotic 日本")
    assert texts.show(ids) == ["a red dog — quixotic 日本"] and texts.show(np.zeros((1, 77), int)) == ["-"]
