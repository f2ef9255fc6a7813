"""One trainer to a workdir, and what becomes of its lock."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
import types

import pytest

from mmdiff.errors import UserError
from mmdiff.training import lock

HOLD = """
import sys, time
from mmdiff.training import lock
lock.BEAT_SECONDS = 600  # what it writes of itself stays as it is
with lock.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
SLOW = """
import sys
from mmdiff.training import lock
beat = lock._Lock._beat
lock._Lock._beat = lambda self: (print("locked", flush=True), sys.stdin.readline(), beat(self))
with lock.held(sys.argv[1]):
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.4)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def left_by(workdir, **other):
    """What a trainer that has been killed leaves."""
    workdir.mkdir(parents=True)
    dead = {"host": "elsewhere", "process": 7, "boot": "another", "namespace": "", "started": "1", "beat": time.time(), **other}
    (workdir / "trainer.json").write_text(json.dumps(dead))


def test_a_lock_leaves_nothing_behind(tmp_path):
    with lock.held(tmp_path / "runs/one"):
        assert set(files(tmp_path / "runs/one")) == {".trainer.lock", "trainer.json"}
        with pytest.raises(UserError, match=f"runs/one is being trained by process {os.getpid()} on .*use another workdir"):
            with lock.held(tmp_path / "runs/../runs/one"):
                pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), lock.held(tmp_path / "two"):
        (tmp_path / "two/kept").write_text("")
        raise KeyError
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["kept"]


def never(seconds):
    raise AssertionError("it waits")


def test_another_process_is_refused_until_the_first_one_is_dead(tmp_path, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        before = files(tmp_path)
        with pytest.raises(UserError, match=f"is being trained by process {child.pid} on "), lock.held(tmp_path):
            pass
        assert {name: data for name, data in files(tmp_path).items()} == before
    finally:
        child.kill()
        child.wait()
    assert set(files(tmp_path)) == set(before)
    monkeypatch.setattr(lock.time, "sleep", never)  # of the same machine: known at once
    with lock.held(tmp_path):
        assert json.loads((tmp_path / "trainer.json").read_text())["process"] == os.getpid()
    assert not files(tmp_path)


def test_a_holder_that_has_not_yet_written_who_it_is_is_waited_for(tmp_path, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "locked\n"
        dead = json.dumps({**lock._life(os.getpid()), "host": "here", "process": os.getpid(), "started": "12", "beat": time.time()})
        (tmp_path / "trainer.json").write_text(dead)  # by the trainer before
        monkeypatch.setattr(lock, "NOTED_SECONDS", 0.05)
        with pytest.raises(UserError, match="is being trained by another process: wait"), lock.held(tmp_path):
            pass
        assert (tmp_path / "trainer.json").read_text() == dead

        monkeypatch.setattr(lock, "NOTED_SECONDS", 600)
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: child.poll() or print(file=child.stdin, flush=True))  # now it may write
        with pytest.raises(UserError, match=f"is being trained by process {child.pid} on "), lock.held(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_holder_on_another_machine_is_known_by_its_beats(tmp_path, monkeypatch):
    left_by(tmp_path / "dead")
    with lock.held(tmp_path / "dead"):
        pass
    monkeypatch.setattr(lock, "SILENT_SECONDS", 600)
    left_by(tmp_path / "long_dead", beat=time.time() - 2 * lock.FORGOTTEN_SECONDS)
    left_by(tmp_path / "alive")
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            lock.files.write_whole(tmp_path / "alive/trainer.json", json.dumps({"host": "elsewhere", "process": 7, "beat": time.time()}))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="is being trained by process 7 on elsewhere"), lock.held(tmp_path / "alive"):
            pass
    finally:
        ended.set()
        thread.join()
    monkeypatch.setattr(lock.time, "sleep", never)
    with lock.held(tmp_path / "long_dead"):
        pass


def test_without_record_locks_the_process_itself_is_looked_for(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    alive = lock._life(os.getppid())
    left_by(tmp_path / "alive", process=os.getppid(), **alive)
    with pytest.raises(UserError, match=f"process {os.getppid()} on"), lock.held(tmp_path / "alive"):
        pass
    left_by(tmp_path / "reused", process=os.getppid(), **{**alive, "started": "12"})  # another process had this number
    with lock.held(tmp_path / "reused"):
        assert set(files(tmp_path / "reused")) == {".trainer.lock", "trainer.json"}
    # Of two that start in the same moment one gets it.
    outcomes, gate = [], threading.Barrier(2)
    clock = types.SimpleNamespace(sleep=lambda _: gate.wait(), time=time.time, monotonic=time.monotonic)  # both have written
    monkeypatch.setattr(lock, "time", clock)
    monkeypatch.setattr(lock._Lock, "_lives", lambda *_: False)
    monkeypatch.setattr(lock, "_held", set())

    def start():
        gate.wait()
        try:
            with lock.held(tmp_path / "race"):
                outcomes.append("held")
                gate.wait()
        except UserError:
            outcomes.append("refused")
            gate.wait()

    threads = [threading.Thread(target=start) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(outcomes) == ["held", "refused"]


def test_a_damaged_note_of_the_holder_does_not_stop_anybody(tmp_path):
    for text in ("", "[]", '{"beat":', "{}", '{"host": "h", "beat": "now"}', '{"boot": 5, "beat": null}', "[" * 10_000):
        (tmp_path / "trainer.json").write_text(text)
        with lock.held(tmp_path):
            pass
    (tmp_path / "trainer.json").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "trainer.json")  # nobody will ever write into it
    with lock.held(tmp_path):
        pass
