"""Published tokenizers where a config names them: captions to ids that a model diffuses, and back. See `named_encoders`.

    "tokenizer": {"kind": "clip_text", "path": "", "size": 49408, "length": 64}     in get_config
    ids = CaptionIds(config.tokenizer)                                               in build; `Texts(ids.tokenizer)` shows them
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.data.named_encoders import NamedEncoder
from mmdiff.encoders.clip_tokenizer import CLIPTokenizer, read_clip_tokenizer
from mmdiff.encoders.published_tokenizers import PublishedTokenizer, open_tokenizer
from mmdiff.errors import UserError


@dataclasses.dataclass(frozen=True)
class NamedTokenizer:
    """A published tokenizer that is opened when it is first used, so that a network can be built before its files are there.

    Attributes:
      kind, path: as of `encoders.open_tokenizer`. key: the config's section, for messages.
      size: of the model's vocabulary, at least the tokenizer's.
      length: ids of a text.
      padding: the id after the end. CLIP's tokenizer fills up with 0 here, T5's and BERT's do.
    """

    kind: str
    path: str
    size: int
    length: int
    key: str = "tokenizer"
    padding = 0

    @functools.cached_property
    def opened(self) -> CLIPTokenizer | PublishedTokenizer:
        """Raises UserError for an empty path, one without the tokenizer's files, or one of more ids than `size`."""
        if not self.path:
            raise UserError(
                f"config.{self.key}.path is empty: name the published tokenizer of the kind {self.kind}, a file or the folder that it lies "
                f"in, by --config.{self.key}.path=PATH (the config's head says which).")
        if self.kind == "clip_text":
            found = read_clip_tokenizer(files.expand(self.path), self.length, padding=self.padding)
        else:
            found = open_tokenizer(self.kind, self.path, self.length)
        if found.size > self.size:
            raise UserError(f"the tokenizer in {self.path} has {found.size:,} ids: set --config.{self.key}.size={found.size}.")
        return found

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> ids int32 [n, length]."""
        return self.opened.encode(texts)

    def decode(self, ids: np.ndarray) -> list[str]:
        """Ids [n, length] -> texts; ids of the model that the tokenizer has not say nothing."""
        ids = np.asarray(ids)
        return self.opened.decode(np.where(ids < self.opened.size, ids, self.padding))

    def unseen(self, text: str) -> list[str]:
        """The words of a text that the vocabulary has no piece for."""
        return self.opened.unseen(text)


class CaptionIds(NamedEncoder):
    """Captions -> ids int32 [n, length] of a published tokenizer; there is no network.

    Attributes:
      tokenizer: the `NamedTokenizer` of the section {"kind", "path", "size", "length"}.
    """

    kinds, what, of = ("clip_text", "t5", "sentence_bert"), "captions' tokenizer", "caption"

    def __init__(self, section: Mapping[str, Any], key: str = "tokenizer", modality: str = "text"):
        super().__init__(section, key)
        self.tokenizer = NamedTokenizer(self.kind, self.path, section["size"], section["length"], key)
        self.modalities = (modality,)

    @property
    def opened(self):
        return self.tokenizer.opened

    def fingerprint(self):
        if not self.path:
            return None
        stated = f"{self.kind} {self.opened.rules} {self.opened.length} {self.tokenizer.padding}"
        return hashlib.sha256(stated.encode()).hexdigest()

    def described(self):
        return {"kind": self.kind, "fingerprint": self.fingerprint()}

    def encode(self, batch):
        return {self.modalities[0]: self.tokenizer.encode(list(batch))}
