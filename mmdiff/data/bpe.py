"""Captions as token ids: a byte-level BPE, trained on the captions themselves.

Any text has ids and comes back from them, for at worst it is spelled in bytes; thus there is no "unknown" token. What a model was never
shown it cannot read, though: `Tokenizer.unseen` names the words that hold a piece of no training caption, and what reads a person's
text (`data.modalities.Texts`) refuses them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mmdiff import console, files

LONG = 100_000  # characters, of which learning takes so long that it is said
SPECIAL = ("<padding>", "<start>", "<end>")  # the first of a vocabulary that is trained here; a text that is all padding is absent


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A trained tokenizer. Its fields are plain values, so a cache or a checkpoint can keep them and compare them.

    >>> tokenizer = train(["a small red seven", "a large red one"], length=16)
    >>> tokenizer.decode(tokenizer.encode(["A large  red seven"]))
    ['a large red seven']
    >>> tokenizer.unseen("a blue one")
    ['blue']

    Attributes:
      rules: vocabulary and merges, the JSON of the `tokenizers` package.
      length: ids of a text, start and end included.
      seen: the ids that occur in the training captions, ascending.
    """

    rules: str
    length: int
    seen: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of ids, padding included."""
        return _parsed(self.rules).get_vocab_size()

    @property
    def padding(self) -> int:
        """The id after the end, and of all of an absent text."""
        return _special_ids(self.rules)[0]

    @property
    def start(self) -> int:
        """The id that begins a text."""
        return _special_ids(self.rules)[1]

    @property
    def end(self) -> int:
        """The id that ends a text."""
        return _special_ids(self.rules)[2]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> ids int32 [n, length]: start, pieces, end, padding. Of a text that is too long the last pieces are cut, not the end."""
        ids = np.full((len(texts), self.length), self.padding, np.int32)
        for row, encoding in zip(ids, _parsed(self.rules).encode_batch(list(texts))):
            pieces = encoding.ids[: self.length - 2]
            row[: len(pieces) + 2] = [self.start, *pieces, self.end]
        return ids

    def decode(self, ids: np.ndarray) -> list[str]:
        """Ids [n, length] -> texts, lower-cased and with single spaces: what stands before the end. Absent texts are empty.

        Raises:
          ValueError: ids outside 0..size-1.
        """
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= self.size):
            raise ValueError(f"this tokenizer has the ids 0..{self.size - 1}, got {ids.min()}..{ids.max()}.")
        rows = [row[: np.argmax(row == self.end)] if self.end in row else row for row in ids]
        pieces = [row[~np.isin(row, _special_ids(self.rules))].tolist() for row in rows]
        return [text.lstrip() for text in _parsed(self.rules).decode_batch(pieces)]

    def unseen(self, text: str) -> list[str]:
        """The words of a text that hold pieces of no training caption, in their order."""
        encoding = _parsed(self.rules).encode(text)
        words = [word for piece, word in zip(encoding.ids, encoding.word_ids) if piece not in self.seen]
        return [text[slice(*encoding.word_to_chars(word))].strip() for word in dict.fromkeys(words)]


def train(texts: Iterable[str], length: int, size: int = 512) -> Tokenizer:
    """A `Tokenizer` of at most `size` ids for these texts: lower-cased, byte pairs merged by their frequency (Sennrich et al. 2016).

    The same texts give the same tokenizer, in any order. 259 ids are spoken for: padding, start, end and the 256 bytes.

    Raises:
      ValueError: no texts, no room for a piece between start and end, or for the bytes.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Rules

    texts = list(texts)
    if not texts or length < 3 or size < 259:
        raise ValueError(f"a tokenizer needs texts, length >= 3 and size >= 259, got {len(texts)} texts, {length} and {size}.")
    if (characters := sum(map(len, texts))) > LONG:
        console.say(f"mmdiff: learning the tokenizer of {len(texts):,} texts ({characters:,} characters)")
    rules = Rules(models.BPE())
    steps = [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    rules.normalizer = normalizers.Sequence(steps)
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rules.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    rules.train_from_iterator(texts, trainer)
    seen = {piece for encoding in rules.encode_batch(texts) for piece in encoding.ids}
    return Tokenizer(rules.to_str(), length, tuple(sorted(seen)))


def read(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer whose fields a JSON file holds.

    Raises:
      Missing, FileError: as `files.read_json`; no such fields, or rules that the `tokenizers` package does not read.
    """
    stored = files.read_json(path)
    try:
        found = Tokenizer(stored["rules"], operator.index(stored["length"]), tuple(map(operator.index, stored["seen"])))
        if None in _special_ids(found.rules) or found.length < 3:
            raise ValueError(f"{found.size} ids, length {found.length}")
        return found
    except Exception as error:  # whatever damaged rules make the package raise
        raise files.FileError(path, f"is no tokenizer ({(str(error).splitlines() or [''])[0][:80]})", "copy it again") from error


@functools.lru_cache(maxsize=8)
def _parsed(rules: str) -> Any:
    from tokenizers import Tokenizer as Rules

    parsed = Rules.from_str(rules)
    parsed.encode_special_tokens = True  # a text that spells "<end>" does not end there
    return parsed


@functools.lru_cache(maxsize=8)
def _special_ids(rules: str) -> tuple[int, ...]:
    return tuple(map(_parsed(rules).token_to_id, SPECIAL))
