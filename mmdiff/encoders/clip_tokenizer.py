"""CLIP's tokenizer from its published files: the byte pairs, cleaning included, give the ids of OpenAI's and open_clip's.

    text -> repaired (ftfy), HTML entities replaced twice, single blanks, lower case -> words -> bytes -> pairs -> start, ids, end, padding

Without ftfy letters are composed (NFC), which is the most of it, and a warning says so once. transformers leaves HTML entities as they are,
lowers every sigma alike, and finds special tokens within punctuation, too; all else is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import html
import io
import logging
import os
import pathlib
import re
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmdiff import files
from mmdiff.errors import UserError, import_extra

log = logging.getLogger(__name__)
MERGES = 49152 - 256 - 2  # of bpe_simple_vocab_16e6.txt, which lists more than CLIP has
END_OF_WORD = "</w>"
SPECIAL = {"openai": ("<|startoftext|>", "<|endoftext|>"), "open_clip": ("<start_of_text>", "<end_of_text>")}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
ITSELF = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves; the vocabulary begins with them
ALPHABET = {chr(byte): byte for byte in ITSELF} | {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(ITSELF)))}
BYTES = [*ALPHABET, *(character + END_OF_WORD for character in ALPHABET)]  # the first 512 pieces
LARGEST = 1 << 26  # bytes of a file: the published ones have less than 4 MiB


@dataclasses.dataclass(frozen=True)
class CLIPTokenizer:
    """A vocabulary of CLIP's. Its fields are plain values, so a cache or a checkpoint can keep them and compare them.

    Attributes:
      rules: vocabulary and merges, the JSON of the `tokenizers` package.
      length: ids of a text, start and end included.
      padding: the id after the end: 0 in OpenAI's and open_clip's code, Stable Diffusion 2.x and the second text encoder of SDXL; the
        end's in Stable Diffusion 1.x and the first of SDXL. `CLIPText`'s embeddings do not depend on it, its states after the end do.
      special: spellings of start and end that are these tokens in a text, too, as in the original; without them any text is only text.
    """

    rules: str
    length: int
    padding: int
    special: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of ids."""
        return _parsed(self.rules).size

    @property
    def start(self) -> int:
        """The id that begins a text."""
        return _parsed(self.rules).start

    @property
    def end(self) -> int:
        """The id that ends a text."""
        return _parsed(self.rules).end

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> ids int32 [n, length]: start, pieces, end, padding. Of a text that is too long the last pieces are cut, not the end."""
        texts = [clean(text) for text in texts]
        parts = [self._parts(text) for text in texts]
        encodings = iter(_parsed(self.rules).model.encode_batch([part for of in parts for part in of[::2]]))
        ids = np.full((len(texts), self.length), self.padding, np.int32)
        for row, of in zip(ids, parts):
            pieces = [piece for i, part in enumerate(of) for piece in (self._special(part) if i % 2 else next(encodings).ids)]
            pieces = pieces[: self.length - 2]
            row[: len(pieces) + 2] = [self.start, *pieces, self.end]
        return ids

    def decode(self, ids: np.ndarray) -> list[str]:
        """Ids [n, length] -> texts, lower-cased, with blanks between words: what stands before the first end. Absent texts are empty.

        Raises:
          ValueError: ids that the vocabulary has not.
        """
        found, pieces = [], _parsed(self.rules).pieces
        unknown = set(np.unique(ids).tolist()) - pieces.keys()
        if unknown:
            raise ValueError(f"this tokenizer has the ids 0..{self.size - 1}, got {min(unknown)}.")
        for row in np.asarray(ids):
            row = row[: np.argmax(row == self.end)] if self.end in row else row[: 0 if (row == self.padding).all() else None]
            text = "".join(pieces[piece] for piece in row.tolist() if piece != self.start)
            words = (bytes(ALPHABET[character] for character in word) for word in text.split(END_OF_WORD))
            found.append(b" ".join(words).decode("utf-8", "replace").strip())
        return found

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """CLIP was trained without an attention mask: all 1, int32 [n, length]."""
        return np.ones(np.shape(ids), np.int32)

    def unseen(self, text: str) -> list[str]:
        """The words of a text that the vocabulary has no piece for: none, for all bytes are pieces."""
        return []

    def _parts(self, text: str) -> list[str]:
        """Text, special token, text, ...: a special token begins where a word does, not within a row of punctuation."""
        parts, begin = [], 0
        for match in re.finditer("|".join(map(re.escape, self.special)) or "$^", text):
            before = text[match.start() - 1] if match.start() > begin else " "
            if before == " " or unicodedata.category(before)[0] in "LN":
                parts += [text[begin : match.start()], match[0]]
                begin = match.end()
        return [*parts, text[begin:]]

    def _special(self, spelled: str) -> list[int]:
        return [self.start if spelled == self.special[0] else self.end]


def clean(text: str) -> str:
    """What the original makes of a text before it looks for words.

    >>> clean(" A &amp;lt;b&gt;  CAT ")
    'a <b> cat'
    """
    text = html.unescape(html.unescape(_repair()(text)))
    # In the original, the iota below is neither a letter nor anything else, thus it falls out and parts words.
    return " ".join(text.split()).lower().replace("\u0345", " ")


@functools.cache
def _repair() -> Callable[[str], str]:
    try:
        return import_extra("ftfy", "text").fix_text
    except UserError:
        log.warning(
            "CLIP's ids of texts with curly quotes, ligatures, full-width, control or wrongly decoded characters are not the original's, "
            "for ftfy is not installed: pip install 'mmdiff[text]'.")
        return functools.partial(unicodedata.normalize, "NFC")


def read_clip_tokenizer(
    path: str | os.PathLike, length: int = 77, *, padding: int | None = None, special: bool = True
) -> CLIPTokenizer:
    """The tokenizer of CLIP's published files.

    Args:
      path: bpe_simple_vocab_16e6.txt.gz (in the package open_clip_torch), a tokenizer.json, or a folder with one or with vocab.json and
        merges.txt; also a pipeline's folder with such a folder "tokenizer".
      length: ids of a text.
      padding: see `CLIPTokenizer`. By default what the folder's tokenizer_config.json states (without one the end, as transformers has
        it), and 0 for bpe_simple_vocab_16e6.txt.gz.
      special: a text that spells "<|endoftext|>" (the first kind of file: "<end_of_text>") has that token, as in the original. Without
        it text is only text, which is safer where others write the texts.

    Raises:
      Missing, FileError: no such files, or files of another tokenizer.
      UserError: a length or padding that cannot be.
    """
    path = files.expand(path)
    if files.is_folder(path) and files.is_folder(path / "tokenizer"):
        path /= "tokenizer"
    if files.is_folder(path) and os.path.lexists(path / "tokenizer.json"):
        path /= "tokenizer.json"
    try:
        if files.is_folder(path):
            vocabulary, merges = files.read_json(path / "vocab.json"), _merges(path / "merges.txt")
        elif path.suffix == ".json":
            model = files.read_json(path)["model"]
            vocabulary, merges = model["vocab"], [tuple(pair.split() if isinstance(pair, str) else pair) for pair in model["merges"]]
        else:
            merges = _merges(path)[:MERGES]
            pieces = [*BYTES, *map("".join, merges), *SPECIAL["open_clip"]]
            vocabulary = {piece: i for i, piece in enumerate(pieces)}
        rules = _rules(vocabulary, merges)
        parsed = _parsed(rules)
        if padding is None:
            of_transformers = parsed.pieces[parsed.end] == SPECIAL["openai"][1]
            padding = _stated_padding(path if files.is_folder(path) else path.parent, parsed) if of_transformers else 0
    except files.FileError:
        raise
    except Exception as error:  # whatever damaged vocabularies make the package raise
        why = f"is no vocabulary of CLIP ({(str(error).splitlines() or [''])[0][:80]})"
        raise files.FileError(path, why, "copy it again, or give bpe_simple_vocab_16e6.txt.gz") from error
    if length < 3 or not 0 <= padding < parsed.size:
        raise UserError(f"CLIP's tokenizer needs length >= 3 and padding in 0..{parsed.size - 1}, got {length} and {padding}.")
    return CLIPTokenizer(rules, length, padding, (parsed.pieces[parsed.start], parsed.pieces[parsed.end]) if special else ())


def _merges(path: pathlib.Path) -> list[tuple[str, str]]:
    """The pairs of a text file, compressed or not, after its first line."""
    content = files.read_bytes(path)
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(LARGEST)
        except (OSError, EOFError, zlib.error) as error:
            raise files.FileError(path, f"cannot be decompressed ({error})", "copy it again") from error
    return [tuple(line.split()) for line in files.decode(content, path).split("\n")[1:] if line.strip()]


def _stated_padding(folder: pathlib.Path, parsed: _Parsed) -> int:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if os.path.lexists(folder / name):
            stated = files.read_json(folder / name).get("pad_token")
            stated = stated["content"] if isinstance(stated, dict) else stated
            if stated is not None:
                return {piece: i for i, piece in parsed.pieces.items()}[stated]
    return parsed.end


def _rules(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> str:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    rules = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=END_OF_WORD, continuing_subword_prefix="", fuse_unk=False))
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    rules.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return rules.to_str()


class _Parsed(NamedTuple):
    model: Any
    pieces: dict[int, str]
    start: int
    end: int

    @property
    def size(self) -> int:
        return max(self.pieces) + 1


@functools.lru_cache(maxsize=8)
def _parsed(rules: str) -> _Parsed:
    from tokenizers import Tokenizer

    model = Tokenizer.from_str(rules)
    vocabulary = model.get_vocab()
    start, end = next((pair for pair in SPECIAL.values() if vocabulary.keys() >= set(pair)), SPECIAL["openai"])
    missing = [piece for piece in (*BYTES, start, end) if piece not in vocabulary]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    return _Parsed(model, {i: piece for piece, i in vocabulary.items()}, vocabulary[start], vocabulary[end])
