"""CLIP's tokenizer against open_clip's, with its vocabulary, and transformers' files of it."""

import gzip
import json

import numpy as np
import odd_captions
import pytest
import transformers
from open_clip import tokenizer as open_clip

from mmdiff.encoders.clip_tokenizer import read_clip_tokenizer

VOCABULARY = open_clip.default_bpe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("vocabulary")
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): i for piece, i in open_clip.SimpleTokenizer().encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = gzip.open(VOCABULARY).read().decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def test_ids_are_open_clips():
    texts, tokenizer = odd_captions.ODD + odd_captions.captions(1000, seed=1), read_clip_tokenizer(VOCABULARY)
    assert (tokenizer.size, tokenizer.start, tokenizer.end, tokenizer.padding) == (49408, 49406, 49407, 0)
    found, expected = tokenizer.encode(texts), open_clip.tokenize(texts).numpy()
    assert [text for text, ours, theirs in zip(texts, found, expected) if (ours != theirs).any()] == []


def test_every_character_but_the_newest_has_open_clips_ids():
    # The `regex` and `tokenizers` packages know different versions of Unicode: letters of one are none of the other.
    texts = [f"a{chr(code)}b" for code in range(0x20, 0x3000)]
    differ = (read_clip_tokenizer(VOCABULARY, 16).encode(texts) != open_clip.tokenize(texts, 16).numpy()).any(1)
    assert differ.sum() < 20 and differ[: 0x530 - 0x20].sum() == 0  # none of Latin, Greek and Cyrillic


def test_transformers_files_hold_the_same_vocabulary(folder, tmp_path):
    ours = read_clip_tokenizer(folder)
    theirs = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    fast = transformers.CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    fast.save_pretrained(tmp_path)
    assert read_clip_tokenizer(tmp_path / "tokenizer.json") == read_clip_tokenizer(tmp_path) == ours
    texts = ["A photo of a DOG, isn't it?", "naïve café 1984", "dog " * 100, "a <|endoftext|> b <|startoftext|>", "日本"]
    for each in (theirs, fast):
        ids = np.array(each(texts, padding="max_length", truncation=True, max_length=77).input_ids)
        np.testing.assert_array_equal(ours.encode(texts), ids)
