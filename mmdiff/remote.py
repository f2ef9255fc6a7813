"""Files at addresses, gs://bucket/folder, s3:// and whatever else fsspec opens: all of the library that reads or writes one does it here.

What is read is copied to this machine first (`local_copy`), where it can be mapped, searched and listed as any file. The copies stay in
~/.cache/mmdiff/remote (XDG_CACHE_HOME), and whenever one is opened it is made what is there: files that have changed are copied again,
and those that are gone are removed.

What is written goes to a `RemotePath`, a file at a time, whole: a bucket shows an object only when all of it has arrived. Nothing there is
renamed, locked or appended to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import logging
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmdiff.errors import UserError, import_extra

log = logging.getLogger(__name__)
THREADS = 8  # that copy files
LARGE = 2**28  # bytes, whose copying takes so long that it is said
TRIES = 3  # to copy a folder that is written meanwhile, as that of a run is
VERSION = (  # what file systems say of a file that changes with its content: the first of them that one says
    "generation", "etag", "ETag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
OBJECT_STORES = ("gs", "gcs", "s3", "s3a", "az", "abfs", "memory")  # which have no folders that must be made


class Changed(OSError):
    """What was listed has been removed or replaced before it was copied."""


def is_remote(path: Any) -> bool:
    """Whether a path is an address."""
    return "://" in str(path)


def cache_folder(name: str) -> pathlib.Path:
    """Where mmdiff keeps on this machine what can be had again."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(home, "mmdiff", name)


@contextlib.contextmanager
def _file_system(url: str) -> Iterator[tuple[Any, str]]:
    """-> (fsspec's file system, the path in it) of an address.

    Raises:
      UserError: no file system of that name, or its package is not installed. FileNotFoundError: what is asked for is not there. OSError:
        whatever else a file system raises, each its own errors.
    """
    core, registry = import_extra("fsspec.core", "remote"), import_extra("fsspec.registry", "remote")
    protocol = url.partition("://")[0]
    try:
        file_system, path = core.url_to_fs(url, use_listings_cache=False)  # lists of files are of now
    except ImportError as error:
        package = registry.known_implementations.get(protocol, {}).get("class", protocol).partition(".")[0]
        package = package if package != "fsspec" else f"more packages ({error})"
        raise UserError(f"{url} needs {package}: pip install 'mmdiff[remote]' or that, or mount the bucket (gcsfuse, s3fs).") from error
    except ValueError as error:
        raise UserError(f"{url} is no address that fsspec knows ({error}): mount the bucket, or copy it to a disk.") from error
    except Exception as error:
        raise _reported(error, url) from error
    try:
        yield file_system, path
    except (UserError, FileNotFoundError, Changed):
        raise
    except Exception as error:
        raise _reported(error, url) from error


def _reported(error: Exception, url: str) -> OSError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
    return OSError(getattr(error, "errno", None) or errno.EIO, reason, url)


# ------------------------------------------------------------------------------------------------------------------------ reading


def local_copy(url: str, kind: str = "remote", without: Sequence[str] = ()) -> pathlib.Path:
    """A file or folder on this machine that holds what is at an address now.

    Args:
      kind: copies of another kind are other ones. without: folders in it that are left out.

    Raises:
      FileNotFoundError: nothing is there. UserError, OSError: as `_file_system`; a copy that is cut short, a full disk.
    """
    for _ in range(TRIES - 1):
        with contextlib.suppress(Changed):
            return _updated(url.rstrip("/"), kind, without)
    return _updated(url.rstrip("/"), kind, without)


def _updated(url: str, kind: str, without: Sequence[str]) -> pathlib.Path:
    with _file_system(url) as (file_system, root):
        info = file_system.info(root)
        copy, wanted = place_of(url, kind), {}
        for name, each in ({"": info} if info["type"] == "file" else _listed(file_system, root)).items():
            if name.partition("/")[0] not in without:
                wanted[copy.joinpath(*_parts(name, url)) if name else copy] = each
        locks = cache_folder("remote") / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / hashlib.sha256(url.encode()).hexdigest()[:2], "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes of a machine one copies
            old = {path: each for path, each in wanted.items() if not is_copy(path, each)}
            size = sum(each.get("size") or 0 for each in old.values())
            if size > LARGE:
                log.warning("copying %s (%.1f GB) to %s", url, size / 1e9, copy)
            with ThreadPoolExecutor(THREADS, "remote") as threads:
                list(threads.map(lambda path: _copy(file_system, path, old[path]), old))
            if info["type"] != "file":
                copy.mkdir(parents=True, exist_ok=True)
                for path in sorted(copy.rglob("*"), reverse=True):  # what is in a folder comes before it
                    if path.is_dir():
                        with contextlib.suppress(OSError):  # it holds something
                            path.rmdir()
                    elif path not in wanted:
                        path.unlink(missing_ok=True)
    return copy


def place_of(url: str, kind: str = "remote") -> pathlib.Path:
    """Where the copy of an address lies."""
    protocol, _, place = url.partition("://")
    return cache_folder(kind).joinpath(protocol, *_parts(place, url))


def listed(url: str) -> dict[str, Mapping[str, Any]]:
    """What is said of each file in a folder, by its path from there; nothing where there is no such folder."""
    with _file_system(url) as (file_system, root):
        return _listed(file_system, root)


def _listed(file_system, root):
    found = file_system.find(root, detail=True)
    return {name[len(root) :].strip("/"): each for name, each in found.items() if not name.endswith("/")}  # which stands for a folder


def _parts(place: str, url: str) -> list[str]:
    parts = place.strip("/").split("/")
    if {"", ".", ".."} & set(parts):
        raise OSError(errno.EINVAL, f"it holds {place[:80]!r}, which no folder can hold", url)
    return parts


def _stamp(info: Mapping[str, Any]) -> int | None:
    """A number, which the time of the copy's last change is set to, that another version of a file has not; None where it is not known."""
    version = next((info[name] for name in VERSION if info.get(name) is not None), None)
    version = version.timestamp() if hasattr(version, "timestamp") else version
    return None if version is None else int.from_bytes(hashlib.sha256(str(version).encode()).digest()[:7], "big")


def is_copy(path: pathlib.Path, info: Mapping[str, Any] | None) -> bool:
    """Whether a file of this machine is a copy of the one that this is said of, by its size and its stamp."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return bool(info) and status.st_mtime_ns == _stamp(info) and status.st_size == info.get("size", status.st_size)
    return False


def _copy(file_system: Any, path: pathlib.Path, info: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, stamp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial"), _stamp(info)
    try:
        file_system.get_file(info["name"], str(draft))
        if (size := draft.stat().st_size) != (info.get("size") or size):
            raise Changed(errno.EIO, f"{size} of {info['size']} bytes have arrived", info["name"])
        if stamp is not None:
            os.utime(draft, ns=(stamp, stamp))
        os.replace(draft, path)
    except FileNotFoundError as error:
        raise Changed(errno.EIO, "a file is gone that was listed", info["name"]) from error
    finally:
        draft.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------------------ writing


@dataclasses.dataclass(frozen=True)
class RemotePath:
    """The address of a file or folder that is written, with the methods of `pathlib.Path` that writers use. Each may raise as
    `_file_system`.

    >>> folder = RemotePath("memory://example")
    >>> (folder / "a.txt").write_bytes(b"text")
    >>> folder.names(), (folder / "a.txt").read_bytes(), (folder / "b.txt").exists()
    ({'a.txt'}, b'text', False)
    """

    url: str

    def __post_init__(self):
        protocol, _, place = self.url.partition("://")
        object.__setattr__(self, "url", f"{protocol}://{place.strip('/')}")

    def __str__(self):
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parents(self) -> list[RemotePath]:
        protocol, _, place = self.url.partition("://")
        parts = place.split("/")
        return [RemotePath(f"{protocol}://{'/'.join(parts[:n])}") for n in range(len(parts) - 1, 0, -1)]

    @property
    def parent(self) -> RemotePath:
        return next(iter(self.parents), self)

    def resolve(self) -> RemotePath:
        return self

    def mkdir(self, **_: Any) -> None:
        """Nothing: there are no folders without files."""

    def exists(self) -> bool:
        with _file_system(self.url) as (file_system, path):
            try:
                return bool(file_system.info(path))
            except FileNotFoundError:
                return False

    def names(self) -> set[str]:
        """Of the files and folders directly in it; none where there is no such folder."""
        with _file_system(self.url) as (file_system, path):
            try:
                return {name.rstrip("/").rpartition("/")[2] for name in file_system.ls(path, detail=False)}
            except FileNotFoundError:
                return set()

    def read_bytes(self) -> bytes:
        with _file_system(self.url) as (file_system, path):
            return bytes(file_system.cat_file(path))

    def write_bytes(self, content: bytes) -> None:
        with _file_system(self.url) as (file_system, path):
            self._with_folder(file_system, path, lambda: file_system.pipe_file(path, content))

    def send(self, file: pathlib.Path) -> None:
        """Makes it a copy of a file of this machine, which does not change meanwhile."""
        with _file_system(self.url) as (file_system, path):
            self._with_folder(file_system, path, lambda: file_system.put_file(str(file), path))
            info = file_system.info(path)
            if info.get("size") != (wanted := file.stat().st_size):
                raise OSError(errno.EIO, f"{info.get('size')} of {wanted} bytes have arrived", self.url)
            if (stamp := _stamp(info)) is not None:
                os.utime(file, ns=(stamp, stamp))

    def unlink(self, missing_ok: bool = False) -> None:
        with _file_system(self.url) as (file_system, path):
            try:
                file_system.rm_file(path)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove(self) -> None:
        """With all that is in it, and its copy on this machine; nothing where there is no such file or folder."""
        shutil.rmtree(place_of(self.url), ignore_errors=True)
        with _file_system(self.url) as (file_system, path), contextlib.suppress(FileNotFoundError):
            file_system.rm(path, recursive=True)

    def check_writable(self, what: str) -> None:
        """Raises OSError unless files can be made in this folder, UserError, which says what it is, where no file system opens it."""
        probe = self / f".{uuid.uuid4().hex[:12]}.partial"
        try:
            with _file_system(self.url):
                probe.write_bytes(b"")
            probe.unlink()
        except UserError as error:
            raise UserError(f"{what} {error}") from error

    @staticmethod
    def _with_folder(file_system, path, write):
        try:
            write()
        except FileNotFoundError as error:
            if file_system.protocol in OBJECT_STORES or set(OBJECT_STORES) & set(file_system.protocol):
                raise FileNotFoundError(errno.ENOENT, "no such bucket", path) from error  # and none is made
            file_system.makedirs(file_system._parent(path), exist_ok=True)
            write()
