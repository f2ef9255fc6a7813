"""One trainer per workdir: a lock that dies with its process, whatever ends it.

    WORKDIR/.trainer.lock   a POSIX record lock on it is the lock: the kernel gives it up when the process ends, on a network file system
                            the server does; forked workers that outlive the process do not hold it
    WORKDIR/trainer.json    who holds it, and a beat every BEAT_SECONDS: for file systems without such locks, or whose locks do not reach
                            other machines (mounted buckets)

Both are removed when training ends; after a crash the next trainer takes them over. A folder at an address, whose writer is one process
(`held_at`), has the second alone, as writer.json.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from mmdiff import files
from mmdiff.errors import UserError
from mmdiff.remote import RemotePath
from mmdiff.training import distributed, run_metadata

log = logging.getLogger(__name__)

WRITER = "writer.json"
BEAT_SECONDS = 10
SILENT_SECONDS = 30  # a trainer on another machine without a beat for so long is dead
FORGOTTEN_SECONDS = 3600  # no clock is that wrong: a beat of so long ago is not waited for
NOTED_SECONDS = 5  # after which a trainer that holds the lock has written down who it is, or one that ends has given it up
SETTLE_SECONDS = 1  # without record locks: of trainers that start in the same moment, the last one to write has the lock
SETTLE_SECONDS_REMOTE = 4  # longer than an answer of a bucket takes

_held: set[pathlib.Path | RemotePath] = set()  # record locks do not stop a process from locking twice


@contextlib.contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
    """A context in which no other process trains in `workdir`; process 0 of a run holds the lock for all.

    Raises:
      UserError: another trainer holds it (nothing is changed then), or the folder cannot be written.
    """
    lock = _Lock(run_metadata.checkpoint_folder(workdir).parent, workdir)

    def acquire():
        with run_metadata.writing(workdir):
            lock.acquire()

    distributed.from_first(acquire)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def held_at(folder: RemotePath) -> Iterator[_Lock]:
    """As `held`, of a folder at an address that one process writes to; gives the lock, whose `check` says that it still is this one.

    Raises:
      UserError: another process has it. OSError: the folder cannot be written.
    """
    lock = _Lock(folder, folder)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


class _Lock:
    def __init__(self, folder: pathlib.Path | RemotePath, workdir: str | os.PathLike | RemotePath):
        self._folder, self._workdir, self._remote = folder, workdir, isinstance(folder, RemotePath)
        self._path, self._holder = folder / ".trainer.lock", folder / (WRITER if self._remote else "trainer.json")
        self._file: int | None = None
        self._made: list[pathlib.Path] = []
        self._me = {"host": socket.gethostname(), "process": os.getpid(), "token": uuid.uuid4().hex, **_life(os.getpid())}
        self._ended = threading.Event()

    def acquire(self) -> None:
        if self._folder in _held:
            raise self._busy(self._me)
        if not self._remote:
            self._made = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        try:
            locks = not self._remote and self._lock()
            other = _read(self._holder)
            if other and self._lives(other, locks):
                raise self._busy(other)
            self._beat()
            if not locks:
                time.sleep(SETTLE_SECONDS_REMOTE if self._remote else SETTLE_SECONDS)
                if (other := _read(self._holder) or {}).get("token") != self._me["token"]:
                    raise self._busy(other)
        except BaseException:
            if self._file is not None:
                os.close(self._file)
            self._file = None
            self._remove_folders()
            raise
        _held.add(self._folder)
        threading.Thread(target=self._keep_beating, daemon=True).start()

    def check(self) -> None:
        """Raises UserError if another process has taken the lock over: this one was silent for too long."""
        if (other := _read(self._holder) or self._me)["token"] != self._me["token"]:
            raise self._busy(other)

    def release(self) -> None:
        if self._file is None and not self._remote:
            return
        self._ended.set()
        with contextlib.suppress(OSError):  # the folder may be gone or moved
            if (_read(self._holder) or {}).get("token") == self._me["token"]:
                self._holder.unlink()
                if not self._remote:
                    self._path.unlink()  # while it is held: who waits for it finds out that it is no longer this file
        if self._file is not None:
            os.close(self._file)
        self._file = None
        _held.discard(self._folder)
        self._remove_folders()

    def _lock(self) -> bool:
        """Locks the file; false where there are no record locks."""
        end = time.monotonic() + NOTED_SECONDS
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    other = _read(self._holder)
                    named = other is not None and not (self._is_here(other) and self._is_dead(other))
                    if named or time.monotonic() > end:
                        raise self._busy(other if named else {}) from None
                    os.close(self._file)  # in the moment between the lock and the note of its holder
                    time.sleep(0.01)
                    continue
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    return False
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                    return True
            os.close(self._file)  # its holder has just ended and removed it

    def _lives(self, other: dict[str, Any], locks: bool) -> bool:
        """Whether a holder that is written down, but is not known to hold a record lock, is alive."""
        if self._is_here(other):  # a process loses its record lock if it opens and closes the file again, as a copy would
            return other.get("process") != self._me["process"] and not self._is_dead(other)
        if other.get("boot") == self._me["boot"] and locks:
            return False
        if time.time() - other.get("beat", 0) > FORGOTTEN_SECONDS:
            return False
        host = other.get("host")
        log.warning("%s was trained on %s: waiting up to %d s to see whether it still is.", self._workdir, host, SILENT_SECONDS)
        end = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1, SILENT_SECONDS / 10))
            now = _read(self._holder)
            if now is None:
                return False
            if now.get("beat") != other.get("beat"):
                return True
        return False

    def _is_here(self, other: dict[str, Any]) -> bool:
        """Whether a holder that is written down is, or was, a process that this one can see."""
        return all(other.get(name) == self._me[name] for name in ("boot", "namespace"))

    @staticmethod
    def _is_dead(other: dict[str, Any]) -> bool:
        return _life(other.get("process", 0))["started"] != other.get("started")

    def _beat(self) -> None:
        files.write_whole(self._holder, json.dumps({**self._me, "beat": time.time()}) + "\n")

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk is reported where something is lost by it
                self._beat()

    def _busy(self, other: dict[str, Any]) -> UserError:
        who = f"process {other['process']} on {other['host']}" if {"process", "host"} <= set(other) else "another process"
        if self._remote:
            return UserError(f"{self._workdir} is being written by {who}: wait until it ends, or choose another folder.")
        return UserError(f"{self._workdir} is being trained by {who}: wait until it ends, or use another workdir.")

    def _remove_folders(self) -> None:
        """Those that were made for the lock and hold nothing else."""
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()
        self._made = []


def _read(path: pathlib.Path | RemotePath) -> dict[str, Any] | None:
    try:  # a bucket that does not answer does not say that nobody is there
        found = files.parse_json(path.read_bytes(), path) if isinstance(path, RemotePath) else files.read_json(path)
    except (UserError, FileNotFoundError):  # there is none, or it is damaged
        return None
    return found if isinstance(found, dict) and isinstance(found.get("beat"), (int, float)) else None


def _life(process: int) -> dict[str, str]:
    """What tells a process from others of its number: the boot of its machine, its namespace of numbers and the time of its start."""

    def read(path):
        with contextlib.suppress(OSError):
            return pathlib.Path(path).read_text()
        return ""

    boot = read("/proc/sys/kernel/random/boot_id").strip() or socket.gethostname()
    with contextlib.suppress(OSError):
        stat = read(f"/proc/{process}/stat").rpartition(")")[2].split()
        return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid"), "started": stat[19] if len(stat) > 19 else ""}
    return {"boot": boot, "namespace": "", "started": str(_exists(process))}


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
