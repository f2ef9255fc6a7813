"""A sentencepiece model (spiece.model, as T5 and SigLIP are published with) as the content of a tokenizer.json.

The file is a protocol buffer; of its fields these matter (number: meaning):

    1: a piece {1: text, 2: its log-probability, 3: its type}     2: training {3: algorithm, 40: the unknown piece's id}
    3: normalization {2: table of characters, 3: a blank before the text, 4: blanks at the ends and double ones are removed}
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

UNKNOWN, CONTROL, USER, BYTE = 2, 3, 4, 6  # types of pieces; 1 for words and their parts
UNIGRAM = 1
BLANK = "▁"


def tokenizer_json(content: bytes, extra: int = 0) -> str:
    """The same tokenizer for the `tokenizers` package.

    Args:
      content: of the file.
      extra: special tokens <extra_id_0>, ... that T5 counts from the end of the vocabulary.

    Raises:
      ValueError: what is no such file, or holds what the package cannot do.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    fields = list(_fields(content))
    pieces = [dict(_fields(value)) for number, value in fields if number == 1]
    training, normalization = ({key: value for number, part in fields if number == of for key, value in _fields(part)} for of in (2, 3))
    vocabulary = [(piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]) for piece in pieces]
    types = [piece.get(3, 1) for piece in pieces]
    if training.get(3, UNIGRAM) != UNIGRAM or BYTE in types or USER in types:
        raise ValueError("it is of another algorithm than T5's and SigLIP's")
    if not vocabulary or not all(normalization.get(flag, 1) for flag in (3, 4)):
        raise ValueError("it does not treat blanks as T5's and SigLIP's do")
    special = [text for (text, _), kind in zip(vocabulary, types) if kind in (UNKNOWN, CONTROL)]
    more = [f"<extra_id_{i}>" for i in reversed(range(extra))]
    rules = Tokenizer(models.Unigram(vocabulary + [(token, 0.0) for token in more], unk_id=training.get(40, 0)))
    steps = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    table = normalization.get(2)
    rules.normalizer = normalizers.Sequence(([normalizers.Precompiled(table)] if table else []) + steps)
    rules.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="always")
    rules.decoder = decoders.Metaspace(BLANK, prepend_scheme="always")
    rules.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*special, *more)])
    return rules.to_str()


def _fields(content: Any) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an int, or the bytes of anything else."""
    at, end = 0, len(content)

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            if at >= end or shift > 63:
                raise ValueError("it is cut off or damaged")
            byte = content[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < end:
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:
            if tag & 7 != 2:
                raise ValueError("it is no sentencepiece model")
            size = varint()
        if at + size > end:
            raise ValueError("it is cut off or damaged")
        yield tag >> 3, content[at : at + size]
        at += size
