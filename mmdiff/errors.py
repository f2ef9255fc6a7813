"""The one error type of the library's front door, and imports of packages that are extras."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(ValueError):
    """A mistake the user can fix: its message is one sentence that says what, where and the remedy.

    The command line prints the message alone and exits with status 2; any other exception is a bug and keeps its traceback. The message
    is one line whatever it quotes: what would break a line or a terminal is a question mark.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text without characters that break a line or a terminal: names of files and words of a user can hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def import_extra(module: str, extra: str) -> ModuleType:
    """A module of a package that the base install does not bring, by the extra of setup.py that does.

    >>> import_extra("json", "audio").dumps([1])
    '[1]'

    Raises:
      UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UserError(f"this needs {error.name}, which is not installed: pip install 'mmdiff[{extra}]'.") from error
