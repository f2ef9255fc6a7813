"""What a person sees: every message passes `say` (stderr) or `out` (stdout), and neither ever stops the program.

A terminal can be closed, a disk be full, the reader of a pipe be gone: the work continues, and what could not be shown is dropped.
Long work has a progress bar on a terminal and in a notebook, and plain lines elsewhere, as in a log file.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
LINE_SECONDS = 30  # where there is no bar, a line comes as often as that
_failed: dict[str, OSError | ValueError] = {}  # "stderr" or "stdout" -> what its last message met


def say(text: str, end: str = "\n") -> bool:
    """A message on stderr; false if it could not be written."""
    return _write("stderr", text, end)


def out(text: Any) -> bool:
    """A line of a command's answer on stdout; false if it could not be written."""
    return _write("stdout", str(text), "\n")


def table(values: Mapping[str, object]) -> str:
    """Names and values in two columns, fractions with four decimals.

    >>> print(table({"steps": 3, "loss": 0.25}))
    steps  3
    loss   0.2500
    """
    width = max(map(len, values), default=0)
    texts = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return "\n".join(f"{name:<{width}}  {text}" for name, text in texts.items())


def is_terminal() -> bool:
    """Whether stderr is a terminal, which shows a line that renews itself."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError, OSError):  # it is closed
        return False


def shows_bars() -> bool:
    """Whether a line on stderr can renew itself: on a terminal, and in a notebook."""
    kernel = sys.modules.get("IPython")
    shell = kernel.get_ipython() if kernel else None
    return is_terminal() or hasattr(shell, "kernel")


class Bar:
    """A progress bar (tqdm) where one can be shown; elsewhere nothing, `shown` is false, and the caller's own lines tell the progress.

    >>> bar = Bar(3)
    >>> bar.update(1, "loss 0.5")
    >>> bar.close()

    Args:
      total: how many steps there are.
      start: how many are done.
      unit: what one is called.
      keeps: whether the bar stays when it is closed.
    """

    def __init__(self, total: int, *, start: int = 0, unit: str = "step", keeps: bool = True):
        self.shown, self._bar = shows_bars(), None
        if self.shown:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread
            width = shutil.get_terminal_size().columns
            self._bar = tqdm(
                total=total, initial=start, unit=f" {unit}", leave=keeps, file=_Stderr(), ncols=width, mininterval=0.5,
                delay=0 if keeps else 1)

    def update(self, done: int, note: str = "") -> None:
        """`done` steps are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is None:
            say(text)
        else:
            self._bar.clear()
            say(text)
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def progress(items: Sequence[T], unit: str) -> Iterator[T]:
    """The items one after another, with a bar where one can be shown, and elsewhere with a line every half minute."""
    bar, since = Bar(len(items), unit=unit, keeps=False), time.monotonic()
    with contextlib.closing(bar):
        for done, item in enumerate(items, 1):
            yield item
            bar.update(done)
            if not bar.shown and time.monotonic() - since > LINE_SECONDS:
                since = time.monotonic()
                say(f"mmdiff: {unit} {done} of {len(items)}")


class Rate:
    """The progress of a process that has a share of some work: how much is done, by all processes a second, and the time that is left.

    A bar or, where none can be shown, a line every half minute and one at the end. Process 0 speaks for all.

    >>> rate = Rate(2, "image")
    >>> rate.add(1), rate.close()
    (None, None)

    Args:
      total: the share of this process. unit: what one is called.
      process, processes: this one and their number.
    """

    def __init__(self, total: int, unit: str, process: int = 0, processes: int = 1):
        self._total, self._unit, self._processes, self._done = total, unit, processes, 0
        self._bar = None if process else Bar(total, unit=unit)

    def add(self, count: int) -> None:
        """So many more are done."""
        now, self._done = time.monotonic(), self._done + count
        if self._bar is None:
            return
        if self._done == count:  # what it takes to compile is not what one takes
            self._began, self._said, self._first = now, now, count
        per_second = (self._done - self._first) / max(now - self._began, 1e-9)
        speed = f"{per_second * self._processes:,.1f} {self._unit}s/s" if per_second else ""
        self._bar.update(self._done, speed)
        if not self._bar.shown and (now - self._said > LINE_SECONDS or self._done == self._total):
            self._said = now
            share = f" of process 0 of {self._processes}" if self._processes > 1 else ""
            left = f"{(self._total - self._done) / per_second / 60:.1f} min left" if per_second and self._done < self._total else ""
            say(f"mmdiff: {', '.join(filter(None, (f'{self._unit} {self._done:,} of {self._total:,}{share}', speed, left)))}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


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


class _Stderr:
    """The file of tqdm."""

    def write(self, text: str) -> None:
        _write("stderr", text, "")

    def flush(self) -> None:
        pass


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
