"""What survives a crash: everything. Runs are killed, cut off and refused space in processes of their own."""

import json
import random
import re
import signal

import numpy as np
import pytest

from mmdiff.training.metrics_logger import TIMING

# A batch takes 15 ms to read, so that a kill falls between any two instructions of a run and not mostly before or after it.
LIVELY = {"train.steps": 60, "train.checkpoint_every": 5, "train.log_every": 4, "train.eval_every": 10, "train.delay": 0.015}


def lines(workdir):
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def assert_same_leaves(one, other):
    one, other = np.load(one), np.load(other)
    assert set(one.files) == set(other.files)
    for name in one.files:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("kills", [20, pytest.param(80, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(kills, server, tmp_path):
    # A third of the kills come while a run starts, a third while a checkpoint is written. A run that is done all the same is compared, and
    # the kills go on in another.
    steps = {**LIVELY, "train.steps": 80, "train.checkpoint_every": 4}
    [answer] = server.run({"workdir": str(tmp_path / "whole"), "overrides": steps, "leaves": str(tmp_path / "whole.npz")})
    assert answer["status"] == 0, answer["error"]

    moments = random.Random(kills)
    killed, runs = 0, 0
    while True:
        name = f"torn{runs}"
        job = {"workdir": str(tmp_path / name), "overrides": steps, "leaves": str(tmp_path / f"{name}.npz")}
        if killed < kills:
            when = ["start", moments.randrange(80), "save"][killed % 3]
            job["kill"] = [signal.SIGKILL, when, moments.uniform(0, 1.5 if when == "start" else 0.1)]
        [answer] = server.run(job)
        assert answer["status"] in (0, -signal.SIGKILL), answer["error"]
        if answer["status"]:
            killed += 1
            continue
        assert_same_leaves(tmp_path / "whole.npz", tmp_path / f"{name}.npz")
        assert lines(tmp_path / name) == lines(tmp_path / "whole")
        # Killed between a checkpoint and the removal of older ones, which may happen twice, a run has more until it saves again.
        kept = sorted(int(p.name) for p in (tmp_path / name / "checkpoints").iterdir())
        assert kept[-2:] == [76, 80] and kept[:-2] in ([], [68], [72], [68, 72])
        metas = [json.loads((tmp_path / run / "checkpoints/80/meta/metadata").read_text()) for run in ("whole", name)]
        assert metas[0]["position"] == metas[1]["position"] == 80 * 16
        if killed == kills:
            break
        runs += 1


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(server, tmp_path):
    workdir = tmp_path / "run"
    job = {"workdir": str(workdir), "overrides": {"train.steps": 6, "model.width": 512}}
    assert server.run(job)[0]["status"] == 0
    job["overrides"]["train.steps"] = 18
    [answer] = server.run({**job, "file_limit": 8192})
    assert answer["status"] == 2, answer["error"]
    assert "step 12" in answer["error"] and "File too large" in answer["error"] and "last good one is of step 6" in answer["error"]
    assert "orbax" not in (tmp_path / "run.error0.log").read_text()  # the sentence is enough
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["6"]
    assert server.run(job)[0]["status"] == 0  # with room again, the same command continues
    assert lines(workdir)[-1]["step"] == 18


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(server, tmp_path):
    job = {"workdir": str(tmp_path / "run"), "overrides": {**LIVELY, "train.checkpoint_every": 1000, "train.steps": 200}}
    [answer] = server.run({**job, "kill": [signal.SIGTERM, 12, 0.0]})
    assert answer["status"] == 128 + signal.SIGTERM, answer["error"]
    [stopped] = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()]
    assert 12 < stopped < 200
    [seconds] = re.findall(rf"SIGTERM: saved step {stopped} (.*) s after it came", (tmp_path / "run.error0.log").read_text())
    assert float(seconds) < 20
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"] is False
    assert server.run(job)[0]["status"] == 0
    assert f"continuing from step {stopped}" in (tmp_path / "run.error0.log").read_text()


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_two_trainers_of_one_run_are_one(times, server, tmp_path):
    # Started together, and one while the other trains: one goes on as if it were alone, and waits until the other has been refused.
    overrides = {**LIVELY, "train.steps": 16}
    [answer] = server.run({"workdir": str(tmp_path / "alone"), "overrides": overrides, "leaves": str(tmp_path / "alone.npz")})
    assert answer["status"] == 0, answer["error"]
    for attempt in range(times):
        for when, after in (("together", 0), ("into", 4)):
            workdir = tmp_path / f"{when}{attempt}"
            jobs = [
                {"workdir": str(workdir), "name": name, "overrides": overrides, "leaves": f"{workdir}.{name}.npz", "after": name * after,
                 "waits": [14, f"{workdir}.error{1 - name}"]}
                for name in range(2)
            ]
            answers = server.run(*jobs)
            assert sorted(answer["status"] for answer in answers) == [0, 2], answers
            [refused] = [answer["error"] for answer in answers if answer["status"] == 2]
            assert re.search(rf"{workdir} is being trained by process \d+ on", refused) and refused.count("\n") == 0
            winner = [answer["status"] for answer in answers].index(0)
            assert winner == 0 or when == "together"
            assert_same_leaves(tmp_path / "alone.npz", f"{workdir}.{winner}.npz")
            assert lines(workdir) == lines(tmp_path / "alone")
            assert not (workdir / "trainer.json").exists()
