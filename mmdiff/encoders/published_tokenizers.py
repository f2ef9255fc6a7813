"""The tokenizers of T5, BERT and SigLIP from their published tokenizer.json or spiece.model, by the `tokenizers` package.

The special ids are the vocabulary's own. What a file states of truncation and padding is replaced, for it is rarely what the network was
trained with: MiniLM's cuts texts at 128 tokens and pads every one to 128.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmdiff import files
from mmdiff.encoders import sentencepiece_files
from mmdiff.encoders.clip_tokenizer import CLIPTokenizer, read_clip_tokenizer
from mmdiff.errors import UserError


class Kind(NamedTuple):
    """How the tokenizers of one family frame a text: what stands around it, what follows, and up to how many ids."""

    before: tuple[str, ...]
    after: str
    padding: str
    length: int
    canonical: bool = False  # SigLIP: lower case without punctuation
    extra: int = 0  # ids of T5 that its spiece.model does not list


KINDS = {
    "t5": Kind((), "</s>", "<pad>", 512, extra=100),
    "sentence_bert": Kind(("[CLS]",), "[SEP]", "[PAD]", 256),
    "siglip_text": Kind((), "</s>", "</s>", 64, canonical=True),
}
FILES = ("tokenizer.json", "spiece.model")


@dataclasses.dataclass(frozen=True)
class PublishedTokenizer:
    """A published tokenizer. Its fields are plain values, so a cache or a checkpoint can keep them and compare them.

    As in the original, a text that spells a special token ("</s>") has that token.

    Attributes:
      kind: of `KINDS`.
      rules: the content of tokenizer.json.
      length: ids of a text, special ones included.
    """

    kind: str
    rules: str
    length: int

    @property
    def size(self) -> int:
        """The number of ids."""
        return _parsed(self).get_vocab_size()

    @property
    def padding(self) -> int:
        """The id that fills a text up."""
        return _parsed(self).token_to_id(KINDS[self.kind].padding)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> ids int32 [n, length]. Of a text that is too long the last pieces are cut, not the special id after them."""
        if KINDS[self.kind].canonical:
            texts = [canonical(text) for text in texts]
        ids = [encoding.ids for encoding in _parsed(self).encode_batch(list(texts))]
        return np.array(ids, np.int32).reshape(len(ids), self.length)

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """The attention mask int32 [n, length] of ids: 1 up to the last one that is no padding. SigLIP was trained without one: all 1."""
        if KINDS[self.kind].padding == KINDS[self.kind].after:
            return np.ones_like(ids)
        return np.maximum.accumulate((np.asarray(ids) != self.padding)[:, ::-1], axis=1)[:, ::-1].astype(np.int32)

    def decode(self, ids: np.ndarray) -> list[str]:
        """Ids [n, length] -> texts, without special ids."""
        return [text.strip() for text in _parsed(self).decode_batch(np.asarray(ids).tolist())]

    def unseen(self, text: str) -> list[str]:
        """The words of a text that the vocabulary has no piece for."""
        model = json.loads(self.rules)["model"]
        unknown = model["unk_id"] if "unk_id" in model else _parsed(self).token_to_id(model.get("unk_token") or "")
        text = canonical(text) if KINDS[self.kind].canonical else text
        encoding = _parsed(self).encode(text)
        words = [word for piece, word in zip(encoding.ids, encoding.word_ids) if piece == unknown and word is not None]
        return list(dict.fromkeys(text[slice(*encoding.word_to_chars(word))].strip() for word in words))


def open_tokenizer(kind: str, path: str | os.PathLike, length: int | None = None) -> PublishedTokenizer | CLIPTokenizer:
    """The tokenizer of a published network.

    Args:
      kind: of `KINDS`, or "clip_text".
      path: a tokenizer.json, a spiece.model, or the folder that holds one (of both the former is read); of CLIP what
        `read_clip_tokenizer` takes.
      length: ids of a text; by default what the network is used with (T5 512, MiniLM 256, SigLIP 64, CLIP 77).

    Raises:
      UserError: no such kind, or a length that leaves no room for a piece.
      FileError: no such file, or not the tokenizer of this kind.
    """
    if kind == "clip_text":
        return read_clip_tokenizer(path, 77 if length is None else length)
    if kind not in KINDS:
        raise UserError(f"there is no tokenizer of {kind!r}: choose one of clip_text, {', '.join(KINDS)}.")
    length = KINDS[kind].length if length is None else length
    if length < 2 + len(KINDS[kind].before):
        raise UserError(f"a tokenizer of {kind} needs a length of {2 + len(KINDS[kind].before)} or more, got {length}.")
    path = files.expand(path)
    if files.is_folder(path):
        folder, names = path, [name for name in FILES if (path / name).exists()]
        if not names:
            raise files.FileError(folder, f"has no {' and no '.join(FILES)}", "get one from where the weights were published")
        path = folder / names[0]
    try:
        if path.suffix == ".model":
            rules = sentencepiece_files.tokenizer_json(files.read_bytes(path), KINDS[kind].extra)
        else:
            rules = files.read_text(path)
        found = PublishedTokenizer(kind, rules, length)
        _parsed(found)
    except files.FileError:
        raise
    except Exception as error:  # whatever damaged rules make the package raise
        why = f"is no tokenizer of {kind} ({(str(error).splitlines() or [''])[0][:80]})"
        raise files.FileError(path, why, "copy it again") from error
    return found


def canonical(text: str) -> str:
    """A text as SigLIP was trained with: lower case, without ASCII punctuation, single spaces.

    >>> canonical(" A cat's  tail, (red).")
    'a cats tail red'
    """
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


@functools.lru_cache(maxsize=8)
def _parsed(tokenizer: PublishedTokenizer) -> Any:
    from tokenizers import Tokenizer, processors

    kind, rules = KINDS[tokenizer.kind], Tokenizer.from_str(tokenizer.rules)
    ids = {token: rules.token_to_id(token) for token in (*kind.before, kind.after, kind.padding)}
    missing = [token for token, found in ids.items() if found is None]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    around = [(token, ids[token]) for token in dict.fromkeys((*kind.before, kind.after))]
    rules.post_processor = processors.TemplateProcessing(single=[*kind.before, "$A", kind.after], special_tokens=around)
    rules.enable_truncation(tokenizer.length)
    rules.enable_padding(length=tokenizer.length, pad_id=ids[kind.padding], pad_token=kind.padding)
    return rules
