"""Whether a checkpoint's files are what was written: a manifest with the size and the checksum of each, itself included.

    manifest.json   {"checksum": of the text of "files", "files": {NAME: {"size": bytes, "checksum": BLAKE2b}}}

Manifests of earlier versions, {NAME: bytes}, are still read: they know sizes only.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from mmdiff import files
from mmdiff.errors import UserError

MANIFEST = "manifest.json"
# Orbax completes these after the manifest is written: the first gets the time of the rename, the second is made just before it.
STAMPED, COMMITTED, STAMP, ITEMS = "_CHECKPOINT_METADATA", "commit_success.txt", "commit_timestamp_nsecs", "item_handlers"
STAMP_SECONDS = 10  # that a thread of Orbax gets to write the first, but for its stamp, before the manifest does without its checksum
SMALL = 2**20  # files up to this size are always read: what is said of a checkpoint (metrics, position) is in them
THREADS = 8


def write_manifest(checkpoint: pathlib.Path) -> None:
    """Notes all files of a checkpoint, which are then on the disk: a checksum says nothing about data that a power cut would lose."""
    told = _items_are_told(checkpoint / STAMPED)
    names = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())

    def entry(name):
        with (checkpoint / name).open("rb") as file:
            os.fsync(file.fileno())
        noted = {"size": (checkpoint / name).stat().st_size}
        return noted if name == STAMPED and not told else {**noted, "checksum": _checksum(checkpoint / name)}

    names = [name for name in names if name not in (MANIFEST, COMMITTED)]
    files.write_whole(checkpoint / MANIFEST, _text(dict(zip(names, _in_threads(entry, names)))))


def _items_are_told(path: pathlib.Path) -> bool:
    """Whether all but the stamp is in it: Orbax writes it in a thread that it waits for only after the manifest is written."""
    for _ in range(100 * STAMP_SECONDS):
        try:
            if json.loads(path.read_text()).get(ITEMS):
                return True
        except (FileNotFoundError, ValueError):
            pass  # not yet there, or half written
        time.sleep(0.01)
    return False


def damage(checkpoint: pathlib.Path, read: Callable[[str], bool] = lambda name: False, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None if they are whole.

    All sizes are compared, and the checksums of small files and of those that are to be `read`.

    Args:
      checkpoint: its folder.
      read: `name -> whether its contents matter`.
      part, parts: of several processes that share the work, this one and their number.

    Raises:
      UserError: this user may not read it.
    """
    try:
        sizes = _manifest(checkpoint)
        names = sorted(sizes, key=lambda name: (-sizes[name]["size"], name))[part::parts]
        found = _in_threads(lambda name: _damage(checkpoint / name, name, sizes[name], read(name)), names)
    except PermissionError as error:
        raise _not_readable(checkpoint, error) from error
    except _Damaged as error:
        return str(error)
    return next(filter(None, found), None)


class _Damaged(Exception):
    pass


def _manifest(checkpoint: pathlib.Path) -> dict[str, dict[str, Any]]:
    """name -> {"size", "checksum"}, without the checksum in a manifest of an earlier version."""
    try:
        text = (checkpoint / MANIFEST).read_text()
        found = json.loads(text)
    except FileNotFoundError:
        raise _Damaged(f"{MANIFEST} is missing") from None
    except (ValueError, RecursionError):
        raise _Damaged(f"{MANIFEST} is cut off or changed") from None
    except PermissionError:
        raise
    except OSError as error:
        raise _Damaged(f"{MANIFEST} cannot be read: {error.strerror}") from None
    if isinstance(found, dict) and found and all(type(size) is int for size in found.values()):
        return {name: {"size": size} for name, size in found.items()}
    try:
        files = found["files"]
        whole = text == _text(files)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise _Damaged(f"{MANIFEST} is not as it was written")
    return files


def _text(files: dict[str, dict[str, Any]]) -> str:
    body = json.dumps(files, indent=1, sort_keys=True)
    return json.dumps({"checksum": _digest(body.encode()), "files": files}, indent=1, sort_keys=True)


def _damage(path: pathlib.Path, name: str, noted: dict[str, Any], read: bool) -> str | None:
    try:
        if name == STAMPED:  # its size is not that of the manifest's time
            checksum = _checksum(path)
            return None if noted.get("checksum", checksum) == checksum else f"{name} is not as it was written"
        if (found := path.stat().st_size) != noted["size"]:
            return f"{name} has {found} of its {noted['size']} bytes"
        if "checksum" in noted and (read or noted["size"] <= SMALL) and _checksum(path) != noted["checksum"]:
            return f"{name} is not as it was written: its checksum differs"
    except FileNotFoundError:
        return f"{name} is missing"
    except (ValueError, TypeError, RecursionError):
        return f"{name} is cut off or changed"
    except PermissionError:
        raise
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def _checksum(path: pathlib.Path) -> str:
    if path.name == STAMPED:
        return _digest(json.dumps({**json.loads(path.read_text()), STAMP: None}, sort_keys=True).encode())
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _in_threads(work: Callable[[str], Any], names: list[str]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, names))


def _not_readable(checkpoint: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"{error.filename or checkpoint} may not be read by this user: ask its owner for it, or use another workdir.")
