"""A run whose workdir is an address, gs://bucket/run: it is trained in a copy on this machine, which is sent there while it trains.

The address is what counts: when a trainer starts, its copy is made what is there, and what was not sent in time is gone. Of what is sent
config.json and metrics.jsonl come first, and the manifest.json of a checkpoint after all its other files: without it a checkpoint is known
to be cut short, and the one before it is opened. One process writes, and holds the lock of the address.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from mmdiff import files, remote
from mmdiff.errors import UserError
from mmdiff.remote import RemotePath
from mmdiff.training import lock, run_metadata
from mmdiff.training.integrity import MANIFEST

log = logging.getLogger(__name__)
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
        with _reported(target, "run the same command again"):
            run = _Copy(target, stack.enter_context(lock.held_at(target)))
        ended, sender = threading.Event(), threading.Thread(target=lambda: run.keep_sending(ended), daemon=True)
        sender.start()
        try:
            yield run.folder
        finally:
            ended.set()
            sender.join()
            with _reported(target, f"the run is whole in {run.folder}, copy it there"):
                run.send()


@contextlib.contextmanager
def _reported(target: RemotePath, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the workdir {target} cannot be used ({error.strerror or error}): {remedy}.") from error


class _Copy:
    def __init__(self, target: RemotePath, held: Any):
        self._target, self._held, self._sent = target, held, []
        self.folder = remote.place_of(str(target), KIND)
        other = target.names() - {lock.WRITER, "samples"}
        if other and run_metadata.CONFIG not in other:  # perhaps a whole bucket, which would be copied
            raise UserError(f"{target} holds {min(other)} and no run: choose another workdir.")
        try:
            remote.local_copy(str(target), KIND, without="samples")
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
        """Makes the address what the copy is, but for what others have put there."""
        self._held.check()
        there = remote.listed(str(self._target))
        here = {name: path for path in self.folder.rglob("*") if _is_kept(name := path.relative_to(self.folder).as_posix(), path)}
        for name in sorted(here, key=lambda name: (name.startswith("checkpoints/"), name.endswith(f"/{MANIFEST}"), name)):
            try:
                if not remote.is_copy(here[name], there.get(name)):
                    self._send(name, here[name])
            except FileNotFoundError:
                if here[name].exists():  # else a checkpoint has just been removed
                    raise
        gone = [name for name in there if name.startswith("checkpoints/") and name not in here]
        for name in sorted(gone, key=lambda name: not name.endswith(f"/{MANIFEST}")):
            (self._target / name).unlink(missing_ok=True)

    def _send(self, name: str, path: pathlib.Path) -> None:
        if name.startswith("checkpoints/"):
            (self._target / name).send(path)
            return
        with path.open("rb") as stream, tempfile.NamedTemporaryFile() as copy:  # lines may be added, or another file take its place
            shutil.copyfileobj(stream, copy)
            copy.flush()
            (self._target / name).send(pathlib.Path(copy.name))
            os.utime(stream.fileno(), ns=(os.stat(copy.name).st_mtime_ns,) * 2)


def _is_kept(name: str, path: pathlib.Path) -> bool:
    """Whether a path is a file of the run, and neither a draft nor a lock."""
    first, second = f"{name}/".split("/")[:2]
    if first in ("damaged", "trainer.json", lock.WRITER) or first == "checkpoints" and not second.isdecimal():
        return False
    return path.is_file() and not path.name.startswith(".")
