import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from mmdiff.data import bpe
from mmdiff.data.token_modalities import Texts
from mmdiff.errors import UserError

CAPTIONS = [
    f"a {size} {colour} {digit} on a {behind} background, {place}"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for digit in ("one", "seven")
    for behind in ("white", "black")
    for place in ("top left", "in the centre")
]
TOKENIZER = bpe.train(CAPTIONS, length=16)
LONG = bpe.train(CAPTIONS, length=80)


def test_captions_come_back():
    ids = TOKENIZER.encode(CAPTIONS)
    assert ids.shape == (len(CAPTIONS), 16) and ids.dtype == np.int32
    assert TOKENIZER.decode(ids) == CAPTIONS
    assert len(np.unique(ids, axis=0)) == len(CAPTIONS)
    # Merged into words: "a small red seven on a white background , top left" and the ends.
    assert (TOKENIZER.encode(["a small red seven on a white background, top left"])[0] > 0).sum() == 13


def test_start_end_and_padding():
    row = TOKENIZER.encode(["a red seven"])[0]
    count = (row != TOKENIZER.padding).sum()
    assert row[0] == TOKENIZER.start and row[count - 1] == TOKENIZER.end and (row[count:] == TOKENIZER.padding).all()
    assert (row[1 : count - 1] > TOKENIZER.end).all()
    np.testing.assert_array_equal(TOKENIZER.encode([""])[0, :3], [TOKENIZER.start, TOKENIZER.end, TOKENIZER.padding])
    assert TOKENIZER.decode(np.zeros((1, 16), int)) == [""]  # an absent text


def test_letters_are_lowered_and_spaces_tidied():
    np.testing.assert_array_equal(TOKENIZER.encode(["  A small\tRED\n seven "]), TOKENIZER.encode(["a small red seven"]))


def test_what_is_too_long_is_cut_and_keeps_its_end():
    words = " ".join(["seven"] * 30)
    row = TOKENIZER.encode([words])[0]
    assert row[0] == TOKENIZER.start and row[-1] == TOKENIZER.end and TOKENIZER.padding not in row
    np.testing.assert_array_equal(row[:-1], LONG.encode([words])[0, :15])
    assert TOKENIZER.decode([row]) == [" ".join(["seven"] * 14)]


@pytest.mark.parametrize("strange", ["quixotic zebras", "über 日本 ☃", "a <end> of <start>, <padding>", "don't 123!?"])
def test_any_text_comes_back(strange):
    ids = LONG.encode([strange])
    assert LONG.decode(ids) == [strange]
    assert (ids == TOKENIZER.end).sum() == (ids == TOKENIZER.start).sum() == 1


def test_special_ids_are_the_vocabularys_own():
    rules = json.loads(TOKENIZER.rules)
    moved = {piece: (i - 3) % TOKENIZER.size for piece, i in rules["model"]["vocab"].items()}  # the special ones are the last
    added = [token | {"id": moved[token["content"]]} for token in rules["added_tokens"]]
    rules = rules | {"model": rules["model"] | {"vocab": moved}, "added_tokens": added}
    other = dataclasses.replace(TOKENIZER, rules=json.dumps(rules))
    assert (other.padding, other.start, other.end) == (TOKENIZER.size - 3, TOKENIZER.size - 2, TOKENIZER.size - 1)
    ids = other.encode(CAPTIONS)
    np.testing.assert_array_equal(ids, (TOKENIZER.encode(CAPTIONS) - 3) % TOKENIZER.size)
    assert other.decode(ids) == CAPTIONS and other.decode(np.full((1, 16), other.padding)) == [""]


def test_unseen_words_are_named():
    assert TOKENIZER.unseen(CAPTIONS[0].upper()) == []
    # " top" is a word of the captions, "top" right after a comma is none.
    assert TOKENIZER.unseen("a purple seven on a  blue background, tip,top") == ["purple", "tip", "top"]


def test_the_same_captions_give_the_same_tokenizer_everywhere(capsys):
    assert bpe.train(CAPTIONS[::-1], length=16) == TOKENIZER and not capsys.readouterr().err
    bpe.train(["one text"] * 20_000, length=16)
    assert capsys.readouterr().err == "mmdiff: learning the tokenizer of 20,000 texts (160,000 characters)\n"
    code = "import json, sys; from mmdiff.data import bpe; print(bpe.train(json.loads(sys.argv[1]), 16).rules)"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(CAPTIONS)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TOKENIZER.rules


def test_a_tokenizer_is_plain_values():
    stored = json.loads(json.dumps(dataclasses.asdict(TOKENIZER)))
    again = bpe.Tokenizer(**{**stored, "seen": tuple(stored["seen"])})
    assert again == TOKENIZER and hash(again) == hash(TOKENIZER)
    np.testing.assert_array_equal(again.encode(CAPTIONS), TOKENIZER.encode(CAPTIONS))
    with pytest.raises(ValueError, match="ids 0.."):
        TOKENIZER.decode([[TOKENIZER.size] * 16])


@pytest.mark.parametrize("arguments", [([], 16), (CAPTIONS, 2), (CAPTIONS, 16, 258)])
def test_what_cannot_be_trained(arguments):
    with pytest.raises(ValueError, match="needs texts, length >= 3 and size >= 259"):
        bpe.train(*arguments)


def test_the_modality(tmp_path):
    texts = Texts(TOKENIZER)
    assert texts.shape == (16,)
    parsed = texts.parse("A small red seven on a white background, top left")
    assert parsed.shape == (1, 16) and texts.show(parsed) == ["a small red seven on a white background, top left"]
    (tmp_path / "captions.txt").write_text("a red one\n\na blue seven\n")
    assert texts.show(texts.parse(str(tmp_path / "captions.txt"))) == ["a red one", "a blue seven"]
    np.savez(tmp_path / "samples.npz", tokens=np.zeros((2, 4), int), text=parsed)
    np.testing.assert_array_equal(texts.parse(str(tmp_path / "samples.npz")), parsed)
    assert texts.show(np.zeros((1, 16), int)) == ["-"]
    drawn = texts.random(np.random.default_rng(0), 50)
    np.testing.assert_array_equal(texts.check(drawn), drawn)
    for wrong, message in {
        "a purple seven": "training texts has 'purple'",
        "  ": "no words",
        str(tmp_path / "none.txt"): "cannot be read",
        str(tmp_path / "none.npy"): "no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            texts.parse(wrong)
    for wrong in (np.zeros((1, 15), int), np.zeros((1, 16)), np.full((1, 16), TOKENIZER.size), np.full((1, 16), -1)):
        with pytest.raises(UserError, match="text: "):
            texts.check(wrong)
