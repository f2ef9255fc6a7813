"""Two processes that talk through gloo: the same numbers as one, one set of files, and one decision to stop."""

import json
import signal
import socket

import numpy as np
import pytest

# The kernels are large enough to be split over fsdp.
RUN = {"model.width": 4096, "train.steps": 18, "train.checkpoint_every": 6, "train.eval_every": 6}


def pair(workdir, **job):
    """The two jobs of one run, with one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [{"workdir": str(workdir), "process": [index, 2, port], **job} for index in range(2)]


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(server, tmp_path_factory):
    """One process, on its own from the first step to the last."""
    folder = tmp_path_factory.mktemp("alone")
    [answer] = server.run({"workdir": str(folder / "run"), "overrides": RUN, "leaves": str(folder / "leaves.npz")})
    assert answer["status"] == 0, answer
    return rows(folder / "run"), np.load(folder / "leaves.npz")


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_two_processes_are_one_and_one_takes_over_from_them(axis, alone, server, tmp_path):
    # data: each process feeds half the rows. fsdp: each holds half of every kernel, too. tensor: both feed the same rows.
    mesh = {f"train.mesh.{name}": 2 if name == axis else 1 for name in ("data", "fsdp", "tensor")}
    answers = server.run(*pair(tmp_path / "run", overrides={**RUN, **mesh, "train.steps": 12}))
    assert [answer["status"] for answer in answers] == [0, 0], answers
    [answer] = server.run({"workdir": str(tmp_path / "run"), "overrides": RUN, "leaves": str(tmp_path / "leaves.npz")})
    assert answer["status"] == 0, answer

    expected_rows, expected = alone
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in expected_rows]
    for row, wanted in zip(rows(tmp_path / "run"), expected_rows):
        name = "loss" if "loss" in row else "val/loss"
        np.testing.assert_allclose(row[name], wanted[name], rtol=1e-6 if row["step"] == 4 else 1e-5)
    found = np.load(tmp_path / "leaves.npz")
    for name in expected.files:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_signal_to_one_process_stops_both_at_the_same_step(server, tmp_path):
    overrides = {"train.steps": 500, "train.checkpoint_every": 1000, "train.eval_every": 0, "train.delay": 0.01}
    first, second = pair(tmp_path / "run", overrides=overrides)
    answers = server.run(first, {**second, "kill": [signal.SIGTERM, 8, 0.0]})
    assert [answer["status"] for answer in answers] == [128 + signal.SIGTERM] * 2, answers
    [saved] = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()]
    assert 8 < saved < 500
    assert f"saved step {saved}" in (tmp_path / "run.error0.log").read_text()
