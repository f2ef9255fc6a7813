"""Messages: shown where that is possible, and never the end of the work."""

import errno
import io
import os
import signal
import subprocess
import sys
import types

import pytest

from mmdiff import __main__ as command_line
from mmdiff import commands, console


class Failing(io.StringIO):
    def __init__(self, number):
        super().__init__()
        self._error = OSError(number, os.strerror(number)) if number != errno.EPIPE else BrokenPipeError(number, "Broken pipe")

    def write(self, text):
        raise self._error

    def isatty(self):
        raise self._error


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(console, "_failed", {})
    monkeypatch.setattr(console.atexit, "register", lambda call: None)


@pytest.mark.parametrize("stream", [None, closed(), Failing(errno.ENOSPC), Failing(errno.EPIPE), Failing(errno.EIO)])
def test_what_cannot_be_shown_is_dropped(stream, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert console.say("lost") is False and console.is_terminal() is False
    assert console.say("seen") is True
    assert capsys.readouterr() == ("", "seen\n")  # nothing of it went to stdout


@pytest.mark.parametrize(
    "stream, status, words", [(None, 0, ""), (Failing(errno.EPIPE), 128 + signal.SIGPIPE, ""), (Failing(errno.ENOSPC), 2, "No space left")]
)
def test_an_answer_that_cannot_be_shown_shows_in_the_status(stream, status, words, monkeypatch, capsys):
    monkeypatch.setitem(commands.COMMANDS, "configs", lambda args: console.out("the answer"))
    monkeypatch.setattr(sys, "stdout", stream)
    assert command_line.main(["configs"]) == status
    assert words in capsys.readouterr().err


def test_streams_of_a_process_that_are_full_or_closed_do_not_change_its_end():
    work = "from mmdiff import console\nconsole.open_standard_files()\n"
    work += "console.say('a'); console.out('b'); console.say('c')\nprint(open('/dev/null').fileno() > 2, file=open(3, 'w'))\n"
    for where in ("2>/dev/full", "1>/dev/full", "2>&-", "1>&- 2>&- 0<&-", "2>&1 | true"):
        done = subprocess.run(
            ["bash", "-c", f'exec 3>&1; set -o pipefail; "{sys.executable}" -c "$0" {where}', work], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "True" and "Exception" not in done.stderr, (where, done)


def test_every_message_passes_here():
    package = os.path.dirname(console.__file__)
    found = []
    for folder, _, files in os.walk(package):
        for file in files:
            if file.endswith(".py") and file != "console.py":
                with open(os.path.join(folder, file)) as opened:
                    found += [(file, line) for line in opened if "sys.stderr" in line or line.lstrip().startswith("print(")]
    assert not found


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_with_lines_above_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = console.Bar(4, start=1)
    bar.say("a line")
    bar.update(3, "loss 0.5")
    bar.close()
    written = sys.stderr.getvalue()
    assert bar.shown and "a line\n" in written and written.rindex("3/4") > written.index("1/4") and "loss 0.5" in written


def test_a_log_file_gets_plain_lines(monkeypatch, capsys):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert list(console.progress("abcde", "batch")) == list("abcde")
    err = capsys.readouterr().err
    assert err.splitlines() == ["mmdiff: batch 2 of 5", "mmdiff: batch 4 of 5"] and "\r" not in err


def test_a_bar_on_a_terminal_that_is_gone_ends_nothing(monkeypatch):
    class Gone(Terminal):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(console, "_failed", {})
    monkeypatch.setattr(sys, "stderr", Gone())
    assert list(console.progress(range(3), "batch")) == [0, 1, 2]


def test_a_rate_tells_the_speed_of_all_processes_and_the_time_that_is_left(monkeypatch, capsys):
    now = iter([100.0, 160.0, 220.0])  # the first two images are compiled for, and not counted
    monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    first = console.Rate(8, "image", 0, 2)
    for count in (2, 3, 3):
        first.add(count)
    first.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "mmdiff: image 5 of 8 of process 0 of 2, 0.1 images/s, 1.0 min left", "mmdiff: image 8 of 8 of process 0 of 2, 0.1 images/s"]
    monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: 0.0))
    console.Rate(1, "image", 1, 2).add(1)
    assert not capsys.readouterr().err
