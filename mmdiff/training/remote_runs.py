"""Folders at an address, gs://bucket/run, that are made on this machine: a run, whose copy is sent there while it trains, and a folder
that is sent when it is whole.

The address is what counts: when a trainer starts, its copy is made what is there, and what was not sent in time is gone. Of what is sent
config.json and metrics.jsonl come first, and the manifest.json of a checkpoint after all its other files: without it a checkpoint is known
to be cut short, and the one before it is opened. One process writes, and holds the lock of the address.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmdiff import files, remote
from mmdiff.data import drafts
from mmdiff.errors import UserError
from mmdiff.remote import RemotePath
from mmdiff.training import lock, run_metadata
from mmdiff.training.integrity import MANIFEST

log = logging.getLogger(__name__)
SNAPSHOTS = f"{run_metadata.SNAPSHOTS}/"
KIND, LOOK_SECONDS = "runs", 5  # where copies are kept, and the time between looks for a new checkpoint


@contextlib.contextmanager
def trained_at(workdir: str | os.PathLike) -> Iterator[str | os.PathLike]:
    """The folder to train in: a workdir itself, or the copy of an address, which is sent there at every checkpoint and at the end.

    Raises:
      UserError: another process writes there, or it cannot be read or written; the copy is whole then, and named.
    """
    target = files.target(workdir)
    if isinstance(target, pathlib.Path):
        yield target if remote.is_remote(workdir) else workdir  # file:///FOLDER
        return
    with contextlib.ExitStack() as stack:
        with _reported(f"the workdir {target}", "run the same command again"):
            run = _Copy(target, stack.enter_context(lock.held_at(target)))
        ended, sender = threading.Event(), threading.Thread(target=lambda: run.keep_sending(ended), daemon=True)
        sender.start()
        try:
            with _named(run.folder, target):
                yield run.folder
        finally:
            ended.set()
            sender.join()
            with _reported(f"the workdir {target}", f"the run is whole in {run.folder}, copy it there"):
                run.send()


@contextlib.contextmanager
def filled_at(folder: str | os.PathLike, last: str = "") -> Iterator[pathlib.Path]:
    """A folder to write: a path itself, or one of this machine whose files are sent to an address when the context ends.

    Args:
      last: the file that says what the folder holds. It is sent last, and put in the folder where the address has it: then nothing is sent.

    Raises:
      UserError: another process writes there, something else is there, or it cannot be written.
    """
    target = files.target(folder)
    if isinstance(target, pathlib.Path):
        yield target
        return
    here, mark = remote.place_of(str(target), "folders"), target / drafts.IDENTITY  # which lies there until all has been sent
    with _reported(str(target), "run the same command again"), lock.held_at(target):
        there = target.names() - {lock.WRITER}
        whole = last in there and mark.name not in there
        if there and not whole and mark.name not in there:
            raise UserError(f"{target} is there already (it holds {min(there)}): choose another folder, or remove it.")
        left = remote.listed(str(target)).keys() - {mark.name, lock.WRITER} if mark.name in there else set()  # by a call that was killed
        shutil.rmtree(here, ignore_errors=True)
        if whole:
            here.mkdir(parents=True)
            (here / last).write_bytes((target / last).read_bytes())
        with _named(here, target):
            yield here
        if not whole:
            files.write_json(mark, "a part")
            paths = {path.relative_to(here).as_posix(): path for path in here.rglob("*") if path.is_file()}
            for name in sorted(paths, key=lambda name: (name == last, name.endswith(".json"), name)):
                (target / name).send(paths[name])
            for name in left - paths.keys():
                (target / name).unlink(missing_ok=True)
            mark.unlink()
        shutil.rmtree(here)


@contextlib.contextmanager
def _reported(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be used ({error.strerror or error}): {remedy}.") from error


@contextlib.contextmanager
def _named(folder: pathlib.Path, target: RemotePath) -> Iterator[None]:
    """What is said of a copy is said of its address."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(folder), str(target))) from error


class _Copy:
    def __init__(self, target: RemotePath, held: Any):
        self._target, self._held, self._sent = target, held, []
        self.folder = remote.place_of(str(target), KIND)
        other = target.names() - {lock.WRITER, "samples"}
        if other and run_metadata.CONFIG not in other:  # perhaps a whole bucket, which would be copied
            raise UserError(f"{target} holds {min(other)} and no run: choose another workdir.")
        try:
            remote.local_copy(str(target), KIND, without=("samples",))
        except FileNotFoundError:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep_sending(self, ended: threading.Event) -> None:
        """Sends the run whenever there is another checkpoint."""
        while not ended.wait(LOOK_SECONDS):
            try:
                steps = run_metadata.steps(self.folder / "checkpoints")
                if steps != self._sent:
                    self.send()
                    self._sent = steps
            except (OSError, UserError) as error:  # what keeps it from being sent at the end, too, is said then
                log.warning("%s is not up to date (%s): trying again.", self._target, error)

    def send(self) -> None:
        """Makes the address what the copy is, but for what others have put there: the newest checkpoint first, which stays the longest."""
        self._held.check()
        there = remote.listed(str(self._target))
        here = {name: path for path in self.folder.rglob("*") if _is_kept(name := path.relative_to(self.folder).as_posix(), path)}
        changed = sorted((name for name in here if not remote.is_copy(here[name], there.get(name))), key=_turn)
        with ThreadPoolExecutor(remote.THREADS, "remote") as threads:
            for _, names in itertools.groupby(changed, _turn):
                list(threads.map(lambda name: self._send(name, here[name]), names))
        gone = [name for name in there if _step(name) and name not in here]
        for name in sorted(gone, key=lambda name: not name.endswith(f"/{MANIFEST}")):
            (self._target / name).unlink(missing_ok=True)

    def _send(self, name: str, path: pathlib.Path) -> None:
        try:
            if _step(name):
                return (self._target / name).send(path)
            with path.open("rb") as stream, tempfile.NamedTemporaryFile() as copy:  # lines may be added, or another file take its place
                shutil.copyfileobj(stream, copy)
                copy.flush()
                (self._target / name).send(pathlib.Path(copy.name))
                os.utime(stream.fileno(), ns=(os.stat(copy.name).st_mtime_ns,) * 2)
        except FileNotFoundError:
            if path.exists():  # else a checkpoint has just been removed
                raise


def _step(name: str) -> str:
    """The folder's name of the checkpoint, or of the snapshot of averages, that a file is of; "" of other files."""
    first, step = f"{name.removeprefix(SNAPSHOTS)}/".split("/")[:2]
    return step if first == "checkpoints" else ""


def _turn(name: str) -> tuple[bool, int, bool]:
    """When a file is sent: first what is of no checkpoint, then one checkpoint after another, and snapshots after all of them."""
    step = _step(name)
    return (name.startswith(SNAPSHOTS), -int(step), name.endswith(f"/{MANIFEST}")) if step else (False, -sys.maxsize, False)


def _is_kept(name: str, path: pathlib.Path) -> bool:
    """Whether a path is a file of the run, and neither a draft nor a lock."""
    if name.removeprefix(SNAPSHOTS).split("/")[0] in ("damaged", "trainer.json", lock.WRITER) or not (_step(name) or "0").isdecimal():
        return False
    return path.is_file() and not path.name.startswith(".")
