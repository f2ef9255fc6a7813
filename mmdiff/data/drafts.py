"""Folders that are whole or absent: written next to their final place under another name, and continued if the writer was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

from mmdiff import files
from mmdiff.errors import UserError

CONTENT, IDENTITY, LOCK = "content", "made_of.json", "lock"


@contextlib.contextmanager
def draft(folder: pathlib.Path, identity: Any, keep: bool = False) -> Iterator[pathlib.Path]:
    """A folder to write in, which becomes `folder` (absent or empty until then) when the context ends.

    It is FOLDER/../.NAME.partial/content. What a killed process has left there is kept if it was made from the same `identity`, JSON
    values, so that its writer can continue; anything else that a killed one has left is removed. After an exception nothing is left, unless
    it is to be kept (`keep`): hours of work that Ctrl-C has interrupted.

    Raises:
      UserError: `folder` holds something, or another process writes it. OSError: what the disk says.
    """
    folder = pathlib.Path(os.path.realpath(folder))  # no folder takes the place of a link
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):  # said now, and not after hours
        raise UserError(f"{folder} is there already: choose another folder, or remove it.")
    own = folder.parent / f".{folder.name}.partial"
    made = [parent for parent in folder.parents if not parent.exists()]
    own.mkdir(parents=True, exist_ok=True)
    _remove_old(folder)
    with open(own / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process
        except BlockingIOError:
            raise UserError(f"another process is writing {folder}: wait for it, or choose another folder.") from None
        done = not keep
        try:
            if _stored(own / IDENTITY) != identity:
                shutil.rmtree(own / CONTENT, ignore_errors=True)
                (own / IDENTITY).unlink(missing_ok=True)
            (own / CONTENT).mkdir(exist_ok=True)
            files.write_json(own / IDENTITY, identity)
            yield own / CONTENT
            os.rename(own / CONTENT, folder)
            done = True
        finally:
            if done:
                shutil.rmtree(own, ignore_errors=True)
                with contextlib.suppress(OSError):  # until one holds something
                    for parent in made:
                        parent.rmdir()


def _stored(path: pathlib.Path) -> Any:
    with contextlib.suppress(UserError):
        return files.read_json(path)
    return None


def _remove_old(folder: pathlib.Path) -> None:
    """Removes what earlier versions left, under random names."""
    for path in folder.parent.glob(f".{folder.name}-*"):
        if re.fullmatch(r"[a-z0-9_]{8}", path.name[len(folder.name) + 2 :]) and set(os.listdir(path)) <= {"cache", "towers"}:
            shutil.rmtree(path, ignore_errors=True)
