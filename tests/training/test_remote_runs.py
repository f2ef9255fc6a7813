"""Runs at an address: the bits of one in a folder, continued from what is whole there, and used from there."""

import json
import pathlib

import pytest

from mmdiff import open_run, remote
from mmdiff.__main__ import main
from mmdiff.errors import UserError
from mmdiff.remote import RemotePath
from mmdiff.training import distributed, lock, remote_runs


@pytest.fixture
def config():
    return ["--config", str(pathlib.Path(__file__).parents[1] / "tiny.py")]


def test_a_run_at_an_address_continues_from_what_is_whole_and_is_used_there(config, bucket, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(remote_runs, "LOOK_SECONDS", 0.01)
    run, folder = bucket / "run", tmp_path / "run"
    assert main(["train", *config, "--workdir", str(folder)]) == 0
    assert main(["train", *config, "--workdir", str(run)]) == 0
    (run / "checkpoints" / "4" / "manifest.json").unlink()  # as where a machine is gone while it is sent
    (run / "samples" / "large.npz").write_bytes(b"another one's")
    copy = remote.place_of(str(run), remote_runs.KIND)
    (copy / "checkpoints" / "9").mkdir()  # which was never sent: what is there counts
    (copy / "metrics.jsonl").write_text("{}\n")
    assert main(["train", *config, "--workdir", str(run)]) == 0
    assert "checkpoints/4 is damaged (manifest.json is missing)" in caplog.text and "checkpoints/9" not in caplog.text
    assert "continuing from step 2" in capsys.readouterr().err
    assert not (copy / "samples").exists() and not (copy / "checkpoints" / "9").exists()
    assert run.names() == {"checkpoints", "config.json", "data.json", "metrics.jsonl", "run.json", "samples"}
    for command in (["sample", "--number", "3"], ["eval"]):
        for workdir in (folder, run):
            assert main([*command, *config, "--workdir", str(workdir)]) == 0
    assert (run / "samples" / "samples.npz").read_bytes() == (folder / "samples/samples.npz").read_bytes()  # the bits of the other
    assert json.loads((run / "report.json").read_bytes())["steps"] == 4 and (run / "report.html").exists()
    before = remote.listed(str(run))
    assert main(["train", *config, "--workdir", str(run)]) == 0  # nothing to do, and nothing is sent
    assert remote.listed(str(run)) == before


def test_the_newest_checkpoint_is_sent_first_and_each_manifest_after_its_checkpoint(config, bucket, monkeypatch):
    sent, send = [], RemotePath.send
    monkeypatch.setattr(remote_runs, "LOOK_SECONDS", 1000)  # all at the end
    monkeypatch.setattr(RemotePath, "send", lambda self, file: (send(self, file), sent.append(self.url.removeprefix(f"{bucket}/run/"))))
    assert main(["train", *config, "--workdir", f"{bucket}/run", "--config.train.ema_widths=(0.05, 0.1)"]) == 0
    behind = [name for name in sent if name.startswith("snapshots/")]
    sent, snapshots = sent[: -len(behind)], sent[-len(behind) :]
    assert snapshots == behind
    steps = [name.split("/")[1] for name in sent if name.startswith("checkpoints/")]
    assert steps == sorted(steps, reverse=True) and set(steps) == {"2", "4"} and sent.index("metrics.jsonl") < 4
    assert [name.split("/")[1] for name in sent if name.endswith("/manifest.json")] == ["4", "2"]
    assert sent[3 + steps.count("4")] == "checkpoints/4/manifest.json" and sent[-1] == "checkpoints/2/manifest.json"
    run, copy = open_run(config[1], f"{bucket}/run/"), remote.place_of(f"{bucket}/run")
    assert run.step == 4 and not (copy / "snapshots").exists()  # which an average of another width needs alone
    assert run.ema(0.1, at=2).step == 2 and (copy / "snapshots" / "checkpoints" / "4").is_dir()


def test_snapshots_of_averages_are_sent_behind_checkpoints_and_their_drafts_are_not(bucket, monkeypatch):
    sent, send = [], RemotePath.send
    monkeypatch.setattr(remote_runs, "LOOK_SECONDS", 1000)
    monkeypatch.setattr(RemotePath, "send", lambda self, file: (send(self, file), sent.append(self.url.removeprefix(f"{bucket}/run/"))))
    folder = remote.place_of(f"{bucket}/run", remote_runs.KIND) / "snapshots" / "checkpoints"
    snapshot, stale = "snapshots/checkpoints/4", ("9/manifest.json", "2.orbax-checkpoint-tmp/a")  # of another past, and cut short
    with remote_runs.trained_at(f"{bucket}/run"):
        for name in (f"{snapshot}/manifest.json", f"{snapshot}/ema/d", "checkpoints/2/manifest.json", "config.json"):
            (folder.parents[1] / name).parent.mkdir(parents=True, exist_ok=True)
            (folder.parents[1] / name).write_text("{}")
        for name in stale:
            (bucket / "run" / "snapshots" / "checkpoints" / name).write_bytes(b"")
        (folder / "5.orbax-checkpoint-tmp").mkdir()
        (folder / "5.orbax-checkpoint-tmp" / "a").write_text("half")
        (folder.parent / "damaged" / "3").mkdir(parents=True)
        (folder.parent / "damaged" / "3" / "a").write_text("half")
    assert sent == ["config.json", "checkpoints/2/manifest.json", f"{snapshot}/ema/d", f"{snapshot}/manifest.json"]
    assert set(remote.listed(f"{bucket}/run")) - {lock.WRITER} == set(sent)


def test_a_folder_that_is_sent_is_whole_with_its_last_file(bucket, monkeypatch):
    out, send = f"{bucket}/out", RemotePath.send

    def fill(seen=()):
        with remote_runs.filled_at(out, "meta.json") as folder:
            assert {path.name for path in folder.rglob("*")} == set(seen)
            for name in ("meta.json", "a.json", "part/b.npy") if not seen else ():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(name)

    def killed(self, file):
        if self.name == "meta.json":
            raise KeyboardInterrupt
        send(self, file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RemotePath, "send", killed)
        fill()
    assert set(remote.listed(out)) == {"made_of.json", "a.json", "part/b.npy"}
    (bucket / "out" / "part" / "c.npy").write_bytes(b"of another call that was killed")
    fill()
    before = remote.listed(out)
    assert set(before) == {"meta.json", "a.json", "part/b.npy"} and (bucket / "out" / "part" / "b.npy").read_bytes() == b"part/b.npy"
    fill(seen=["meta.json"])
    assert remote.listed(out) == before
    (bucket / "out" / "meta.json").unlink()
    with pytest.raises(UserError, match=r"memory://bucket/out is there already \(it holds a.json\): choose another folder, or remove it"):
        fill()
    with lock.held_at(bucket / "other"), pytest.raises(UserError, match="bucket/other is being written by process"):
        remote_runs.filled_at(f"{bucket}/other").__enter__()


def test_a_run_that_cannot_be_sent_is_named(config, bucket, monkeypatch, capsys):
    def full(self, file):
        raise OSError(28, "No space left", self.url)

    monkeypatch.setattr(RemotePath, "send", full)
    assert main(["train", *config, "--workdir", f"{bucket}/run"]) == 2
    copy = remote.place_of(f"{bucket}/run", remote_runs.KIND)
    assert f"(No space left): the run is whole in {copy}, copy it there" in capsys.readouterr().err
    assert (copy / "checkpoints" / "4" / "manifest.json").exists() and not (bucket / "run").exists()


def test_one_process_trains_at_an_address(bucket, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="one process trains at memory://bucket/run: for several mount the bucket"):
        distributed.check_one_writer(f"{bucket}/run", several=True)
    distributed.check_one_writer(tmp_path, several=True)
    with remote_runs.trained_at(tmp_path) as folder:
        assert folder == tmp_path
    with lock.held_at(bucket / "run"), pytest.raises(UserError, match="is being written by process"):
        remote_runs.trained_at(f"{bucket}/run").__enter__()
    with remote_runs.trained_at(f"file://{tmp_path}") as folder:
        assert folder == tmp_path


def test_what_is_no_run_is_not_copied(config, bucket, capsys):
    (bucket / "data" / "image.png").write_bytes(b"")
    assert main(["train", *config, "--workdir", str(bucket)]) == 2
    assert "memory://bucket holds data and no run: choose another workdir" in capsys.readouterr().err
    assert main(["sample", *config, "--workdir", str(bucket)]) == 2
    assert "there is no run in memory://bucket: train it first" in capsys.readouterr().err
    assert not remote.place_of(str(bucket)).exists() and bucket.names() == {"data"}
