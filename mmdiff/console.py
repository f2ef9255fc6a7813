"""What a person sees: every message passes `say` (stderr) or `out` (stdout), and neither ever stops the program.

A terminal can be closed, a disk be full, the reader of a pipe be gone: the work goes on, and what could not be shown is dropped.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import Any

_failed: dict[str, OSError | ValueError] = {}  # "stderr" or "stdout" -> what its last message met


def say(text: str, end: str = "\n") -> bool:
    """A message on stderr; false if it could not be written."""
    return _write("stderr", text, end)


def out(text: Any) -> bool:
    """A line of a command's answer on stdout; false if it could not be written."""
    return _write("stdout", str(text), "\n")


def is_terminal() -> bool:
    """Whether stderr is a terminal, which shows a line that renews itself."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError, OSError):  # it is closed
        return False


def failure() -> str:
    """Why the answer on stdout is not whole: "" if it is, "pipe" if its reader has gone, else what the operating system says."""
    error = _failed.get("stdout")
    return "" if error is None else "pipe" if isinstance(error, BrokenPipeError) else getattr(error, "strerror", None) or str(error)


def open_standard_files() -> None:
    """Opens /dev/null as stdin, stdout or stderr if the process was started without: else the next file that is opened, a checkpoint
    perhaps, would take its number, and get the messages of compilers and libraries."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _write(name: str, text: str, end: str) -> bool:
    stream = getattr(sys, name)
    if stream is None:  # print would take stdout
        return False
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        if not _failed:
            atexit.register(_forget)
        _failed[name] = error
        return False
    return True


def _forget() -> None:
    """What is still in the buffers of a stream that fails would make Python end with a status of its own (120)."""
    for name in _failed:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            getattr(sys, name).flush()
            continue
        setattr(sys, name, open(os.devnull, "w"))
