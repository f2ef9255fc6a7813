"""The documentation strings as texts: whole words in rows that fit, every row once, held out by module."""

import re

import numpy as np
import pytest

from mmdiff.errors import UserError
from mmdiff.projects.text import docstrings
from tests.small_sets import python_modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return python_modules(tmp_path_factory.mktemp("modules"))


def test_rows_are_whole_words_that_the_tokenizer_holds(folder):
    tokenizer = docstrings.docstring_tokenizer(str(folder))
    rows = docstrings.docstring_rows(str(folder))
    for split in docstrings.SPLITS:
        ids = docstrings.docstring_source(split, str(folder)).arrays["text"]
        assert ids.shape == (len(rows[split]), docstrings.LENGTH) and tokenizer.decode(ids) == list(rows[split])
        assert ((ids == tokenizer.start).sum(1) == 1).all() and ((ids == tokenizer.end).sum(1) == 1).all()
    assert max(np.sum(docstrings.docstring_source("train", str(folder)).arrays["text"] != tokenizer.padding, 1)) == docstrings.LENGTH


def test_no_row_is_in_two_splits_or_twice(folder):
    rows = docstrings.docstring_rows(str(folder))
    every = [row for split in docstrings.SPLITS for row in rows[split]]
    assert len(set(every)) == len(every) and not any("the same in all modules" in row for row in rows["test"])
    assert not any("x" * 50 in row for row in every)  # a word that is longer than a row


def test_a_package_is_one_module_and_tests_are_none(folder):
    rows = docstrings.docstring_rows(str(folder))
    assert any("nested deep in the package" in row for row in rows["test"])
    assert not any("pytest" in row for split in rows.values() for row in split)


def test_tables_sessions_and_short_ones_are_no_prose():
    assert docstrings.is_prose("a sentence, with a comma - and a dash.")
    for text in ("too short", ">>> print('a long session of python')", "key 1 = 2; key 2 = [3, 4]; key 5 = {6: 7}"):
        assert not docstrings.is_prose(text)


def test_the_standard_library_has_them_in_the_order_of_a_megabyte():
    # Only what reading costs little: the paragraphs of some of its files.
    import argparse
    import pathlib

    found = list(docstrings.paragraphs(pathlib.Path(argparse.__file__).read_text("utf-8")))
    assert len(found) > 20 and all(re.fullmatch(r"\S+( \S+)*", text) and text == text.lower() for text in found)


def test_what_is_no_folder_of_documented_modules_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"too few Python modules with documentation: there is none for train data"):
        docstrings.docstring_source("train", str(tmp_path))
    with pytest.raises(UserError, match="no split 'valid'"):
        docstrings.docstring_source("valid")
