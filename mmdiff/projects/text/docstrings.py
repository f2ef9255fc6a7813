"""Technical English that every Python has: the documentation strings of its standard library (PSF licence), or of any folder of modules.

A paragraph of prose (`is_prose`) becomes one or more rows: as many whole words, in the tokenizer's pieces, as fit between start and end. A
row that occurred before, in any module, is left out, and so is a paragraph with a word that is longer than a row.

**Held out** are whole modules; a package counts as one. The third byte of the SHA-256 of a module's name decides: below 26 (a tenth) it is
for the test, below 52 for validation. Which texts there are depends on the version of Python; a run refuses another one's tokenizer.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import pathlib
import re
import sysconfig
from collections.abc import Iterator

import numpy as np

from mmdiff import console, files
from mmdiff.data import bpe
from mmdiff.data.sources import ArraySource
from mmdiff.errors import UserError

SPLITS = ("train", "validation", "test")
LENGTH, VOCABULARY = 40, 1024  # ids of a row, start and end included; ids at most
HELD_OUT = {"test": range(26), "validation": range(26, 52)}
# What is not documentation of the library: other people's packages, tests, and sources that are examples of errors.
OTHERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
SHORTEST = 20  # characters of a paragraph


def docstring_source(split: str, folder: str = "") -> ArraySource:
    """Rows of text of a split's modules: text int32 [n, 40].

    Args:
      split: train, validation or test.
      folder: of Python modules; that of the standard library by default.

    Raises:
      UserError: another split, no such folder, or too few modules with documentation.
    """
    if split not in SPLITS:
        raise UserError(f"the documentation strings have no split {split!r}: choose one of {', '.join(SPLITS)}.")
    return ArraySource({"text": docstring_tokenizer(folder).encode(docstring_rows(folder)[split])})


def docstring_tokenizer(folder: str = "") -> bpe.Tokenizer:
    """Byte pairs of the training modules' paragraphs alone."""
    return _tokenizer(_path(folder))


def docstring_rows(folder: str = "") -> dict[str, tuple[str, ...]]:
    """The rows of each split, in words."""
    return _rows(_path(folder))


def split_of(module: str) -> str:
    """Where a module's documentation belongs.

    >>> split_of("asyncio"), split_of("ssl"), split_of("json")
    ('train', 'validation', 'test')
    """
    byte = hashlib.sha256(module.encode()).digest()[2]
    return next((split for split, held in HELD_OUT.items() if byte in held), "train")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences rather than a table or a session: nine of ten characters are letters, blanks or , . and the like.

    >>> is_prose("Return the absolute value of x."), is_prose(">>> abs(-1) + [3] == {}; 1 +++ 2")
    (True, False)
    """
    plain = sum(each.isalpha() or each in " ,.'-" for each in paragraph)
    return len(paragraph) >= SHORTEST and ">>>" not in paragraph and plain >= 0.9 * len(paragraph)


def paragraphs(source: str) -> Iterator[str]:
    """Those of the documentation strings of a module's source, in lower case with single blanks."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                words = " ".join(paragraph.lower().split())
                if words.isascii() and is_prose(words):
                    yield words


def _path(folder: str) -> pathlib.Path:
    return files.expand(folder) if folder else pathlib.Path(sysconfig.get_path("stdlib"))


@functools.lru_cache(maxsize=2)
def _paragraphs(root: pathlib.Path) -> dict[str, list[str]]:
    """Every paragraph once, in the order of the files, in the first split that has it."""
    console.say(f"mmdiff: reading the documentation strings of the Python modules in {root}")
    found = {split: {} for split in SPLITS}
    seen = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if OTHERS & {*parts} or parts[-1].startswith("test_"):
            continue
        try:
            texts = list(paragraphs(path.read_text("utf-8")))
        except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):  # of another version, or unreadable: not a text
            continue
        rows = found[split_of(parts[0].removesuffix(".py"))]
        rows.update(dict.fromkeys(text for text in texts if text not in seen))
        seen.update(texts)
    if few := [split for split, rows in found.items() if len(rows) < 2]:
        raise UserError(
            f"{root} has too few Python modules with documentation: there is none for {few[0]} data. Name a folder with their sources, "
            "as --config.data.dir=FOLDER.")
    return {split: list(rows) for split, rows in found.items()}


@functools.lru_cache(maxsize=2)
def _tokenizer(root: pathlib.Path) -> bpe.Tokenizer:
    return bpe.train(_paragraphs(root)["train"], LENGTH, VOCABULARY)


@functools.lru_cache(maxsize=2)
def _rows(root: pathlib.Path) -> dict[str, tuple[str, ...]]:
    tokenizer, found = _tokenizer(root), _paragraphs(root)
    words = sorted({word for texts in found.values() for text in texts for word in text.split()})
    # Words are encoded one by one, so the pieces of a text are those of its words.
    ids = tokenizer.encode(words)
    pieces = dict(zip(words, (np.argmax(ids == tokenizer.end, axis=1) - 1).tolist()))
    seen, result = set(), {}
    for split, texts in found.items():
        fitting = (words for words in map(str.split, texts) if max(pieces[word] for word in words) < LENGTH - 2)
        rows = dict.fromkeys(row for words in fitting for row in _packed(words, pieces) if row not in seen)
        seen.update(rows)
        result[split] = tuple(rows)
    return result


def _packed(words: list[str], pieces: dict[str, int]) -> Iterator[str]:
    """Whole words in rows of at most `LENGTH` - 2 pieces."""
    room, row, used = LENGTH - 2, [], 0
    for word in words:
        if row and used + pieces[word] > room:
            yield " ".join(row)
            row, used = [], 0
        row.append(word)
        used += pieces[word]
    yield " ".join(row)
