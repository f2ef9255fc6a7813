"""Addresses: what is read is what is there now, what is written is there whole, and nothing of a bucket is taken for what it is not."""

import json
import pathlib

import numpy as np
import pytest

from mmdiff import files, remote
from mmdiff.__main__ import main
from mmdiff.data.arrays import read_array
from mmdiff.errors import UserError
from mmdiff.evals import image_sets
from mmdiff.remote import RemotePath
from mmdiff.training import lock


def test_a_copy_is_what_is_there_now(bucket, monkeypatch):
    for name in ("a.txt", "below/b.txt", "below/.c"):
        (bucket / "folder" / name).write_bytes(name.encode())
    copied, copy = [], remote._copy
    monkeypatch.setattr(remote, "_copy", lambda *args: copied.append(args[1].name) or copy(*args))
    folder = files.expand(f"{bucket}/folder/")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {"a.txt", "below/b.txt", "below/.c"}
    assert files.read_text(f"{bucket}/folder/below/b.txt") == "below/b.txt" and sorted(copied) == [".c", "a.txt", "b.txt"]
    (bucket / "folder" / "a.txt").write_bytes(b"again")  # of as many bytes
    (bucket / "folder" / "below" / "b.txt").unlink()
    (folder / "below" / ".c").write_bytes(b"another one's")
    assert files.expand(f"{bucket}/folder") == folder and sorted(copied[3:]) == [".c", "a.txt"]
    assert files.read_bytes(folder / "a.txt") == b"again" and not (folder / "below" / "b.txt").exists()
    assert files.read_bytes(folder / "below" / ".c") == b"below/.c"


def test_arrays_and_sets_of_images_are_read_at_an_address(bucket):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    with files.whole(bucket / "set.npz") as file:
        np.savez(file.open("wb"), arr_0=images)
    image_sets.write_statistics(f"{bucket}/statistics.npz", {"mu": (np.zeros(2), np.eye(2))}, {"count": 3})
    assert np.array_equal(read_array(f"{bucket}/set.npz"), images)
    found, statistics = image_sets.open_reference(f"{bucket}/set.npz"), image_sets.open_reference(f"{bucket}/statistics.npz")[1]
    assert np.array_equal(next(found[0].read(3, range(3))), images) and statistics.count == 3
    with pytest.raises(UserError, match="no such file: memory://bucket/none.npz"):
        image_sets.open_images(f"{bucket}/none.npz")


def test_a_folder_that_is_written_meanwhile_is_copied_as_it_is_at_last(bucket, monkeypatch):
    """As that of a run which is trained: a checkpoint is removed, and lines are added, between the list of files and the copies."""
    memory, changes = type(pytest.importorskip("fsspec").filesystem("memory")), {"old", "lines"}
    for name in ("old", "lines"):
        (bucket / "run" / name).write_bytes(b"1")
    get = memory.get_file

    def get_file(self, there, here):
        if (name := there.rpartition("/")[2]) in changes:
            changes.remove(name)
            self.rm_file(there) if name == "old" else self.pipe_file(there, b"12")
        return get(self, there, here)

    monkeypatch.setattr(memory, "get_file", get_file)
    folder = files.expand(f"{bucket}/run")
    assert not changes and {path.name: path.read_bytes() for path in folder.iterdir()} == {"lines": b"12"}


def test_what_is_cut_short_on_its_way_is_never_whole(bucket, monkeypatch, tmp_path):
    memory, name = type(pytest.importorskip("fsspec").filesystem("memory")), bucket / "a.bin"
    name.write_bytes(b"x" * 100)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "get_file", lambda self, there, here: pathlib.Path(here).write_bytes(b"x" * 99))
        with pytest.raises(UserError, match=r"memory://bucket/a.bin cannot be read \(99 of 100 bytes have arrived\)"):
            files.expand(str(name))
    assert files.read_bytes(name) == b"x" * 100
    with monkeypatch.context() as patch:
        patch.setattr(memory, "put_file", lambda self, here, there: self.pipe_file(there, b"x"))
        with pytest.raises(OSError, match="1 of 3 bytes have arrived"), files.whole(bucket / "b.bin") as file:
            file.write_bytes(b"xyz")
    with pytest.raises(KeyboardInterrupt), files.whole(name) as file:
        file.write_bytes(b"half")
        raise KeyboardInterrupt
    assert name.read_bytes() == b"x" * 100


def test_a_bucket_cannot_write_elsewhere_on_this_machine(bucket):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.store["/bucket/folder/../../../evil"] = memory.open("/bucket/x", "wb")
    with pytest.raises(UserError, match="which no folder can hold"):
        files.expand(f"{bucket}/folder")
    assert not list(remote.cache_folder("remote").rglob("evil"))


@pytest.mark.parametrize(("path", "culprit"), [
    ("nope://bucket/x", "Protocol not known: nope"), ("file://x", "write file:///FOLDER/FILE"), (pathlib.Path("gs://bucket/x"), "as text")])
def test_no_address_of_a_file_is_a_sentence(bucket, path, culprit):
    with pytest.raises(UserError, match=culprit):
        files.expand(path)


def test_a_missing_package_is_named_before_anything_is_done(monkeypatch, tmp_path, capsys):
    core = pytest.importorskip("fsspec.core")
    monkeypatch.setattr(core, "url_to_fs", lambda *_, **__: (_ for _ in ()).throw(ImportError("Please install gcsfs")))
    for words in (["train", "--config", "digits_joint", "--workdir"], ["bench", "--config", "digits_joint", "--json"]):
        assert main([*words, "gs://bucket/x"]) == 2
        assert "gcsfs: pip install 'mmdiff[remote]'" in capsys.readouterr().err


def test_a_bucket_that_is_not_there_is_named(bucket, monkeypatch, capsys):
    def pipe_file(self, path, value):
        raise FileNotFoundError("The specified bucket does not exist")  # as that of s3fs, without a number or strerror

    monkeypatch.setattr(type(pytest.importorskip("fsspec").filesystem("memory")), "pipe_file", pipe_file)
    assert main(["train", "--config", "digits_joint", "--workdir", f"{bucket}/run"]) == 2
    assert "cannot write to memory://bucket/run (no such bucket): choose a folder" in capsys.readouterr().err


def test_what_must_be_renamed_or_changed_in_place_goes_to_a_disk(bucket, capsys):
    assert main(["configs", "digits_joint", "--to", f"{bucket}/mine.py"]) == 2
    assert f"{bucket}/mine.py is an address, and this is written to a disk" in capsys.readouterr().err


def test_file_is_the_disk(tmp_path):
    assert files.expand(f"file://{tmp_path}/a") == files.target(f"file://{tmp_path}/a") == tmp_path / "a"


def test_a_folder_at_an_address_has_one_writer(bucket, monkeypatch):
    holder = bucket / "run" / lock.WRITER
    with lock.held_at(bucket / "run") as held:
        held.check()
        with pytest.raises(UserError, match="bucket/run is being written by process"), lock.held_at(bucket / "run"):
            pass
        holder.write_bytes(json.dumps({**json.loads(holder.read_bytes()), "token": "another"}).encode())
        with pytest.raises(UserError, match="is being written by process"):
            held.check()
    assert holder.exists()  # the other's

    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.3)  # of another machine, from which nothing comes
    holder.write_bytes(json.dumps({"host": "far", "process": 1, "token": "x", "boot": "y", "namespace": "", "beat": 2e10}).encode())
    with lock.held_at(bucket / "run"):
        assert json.loads(holder.read_bytes())["host"] != "far"
    assert not holder.exists()

    def silent(self):
        raise OSError(5, "no answer")

    monkeypatch.setattr(RemotePath, "read_bytes", silent)  # which does not say that nobody is there
    with pytest.raises(OSError, match="no answer"), lock.held_at(bucket / "run"):
        pass
