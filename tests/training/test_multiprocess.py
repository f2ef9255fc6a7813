"""Processes that talk through gloo: they find each other, give the numbers of one, and stop, save and die together."""

import json
import pathlib
import random
import signal
import socket

import numpy as np
import pytest
import toy
from test_resume import LIVELY, assert_same_leaves, lines

from mmdiff.__main__ import main
from mmdiff.data import order
from mmdiff.training import checkpoint_files, distributed, lock

# The kernels are large enough to be split over fsdp.
RUN = {"model.width": 4096, "train.steps": 18, "train.checkpoint_every": 6, "train.eval_every": 6}
TOY = str(pathlib.Path(toy.__file__))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def pair(workdir, **job):
    """The two jobs of one run, with one device each; the machine may stand still for a while without anybody being dead."""
    shared = {"workdir": str(workdir), "constants": {"HEARTBEAT_SECONDS": 600}, **job}
    port = free_port()
    return [{**shared, "process": [index, 2, port]} for index in range(2)]


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def statuses(answers):
    return [answer["status"] for answer in answers]


def log_of(workdir, process):
    return pathlib.Path(f"{workdir}.error{process}.log").read_text()


@pytest.fixture(scope="module")
def alone(server, tmp_path_factory):
    """One process, on its own from the first step to the last."""
    folder = tmp_path_factory.mktemp("alone")
    [answer] = server.run({"workdir": str(folder / "run"), "overrides": RUN, "leaves": str(folder / "leaves.npz")})
    assert answer["status"] == 0, answer
    return rows(folder / "run"), np.load(folder / "leaves.npz")


def assert_same_run(alone, workdir, leaves):
    expected_rows, expected = alone
    assert [row["step"] for row in rows(workdir)] == [row["step"] for row in expected_rows]
    for row, wanted in zip(rows(workdir), expected_rows):
        name = "loss" if "loss" in row else "val/loss"
        np.testing.assert_allclose(row[name], wanted[name], rtol=1e-6)
    found = np.load(leaves)
    for name in expected.files:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


# ---- One run on one, two or other processes ----


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_two_processes_are_one_and_one_takes_over_from_them(axis, alone, server, tmp_path):
    # fsdp: each process feeds half the rows and holds half of every kernel. tensor: both feed the same rows.
    mesh = {f"train.mesh.{name}": 2 if name == axis else 1 for name in ("data", "fsdp", "tensor")}
    answers = server.run(*pair(tmp_path / "run", overrides={**RUN, **mesh, "train.steps": 12}))
    assert statuses(answers) == [0, 0], answers
    [answer] = server.run({"workdir": str(tmp_path / "run"), "overrides": RUN, "leaves": str(tmp_path / "leaves.npz")})
    assert answer["status"] == 0, answer
    assert_same_run(alone, tmp_path / "run", tmp_path / "leaves.npz")


@pytest.mark.slow
def test_two_processes_keep_snapshots_beside_their_checkpoints(server, tmp_path):
    """At every step both are on their way to the disk at once."""
    averages = {"train.ema_widths": (0.05, 0.1), "train.checkpoint_every": 1, "train.steps": 12, "train.eval_every": 0}
    answers = server.run(*pair(tmp_path / "run", overrides={**RUN, **averages}))
    assert statuses(answers) == [0, 0], answers
    folder = tmp_path / "run" / "snapshots" / "checkpoints"
    assert checkpoint_files.intact(folder) == ([*range(1, 13)], {})


@pytest.mark.slow
def test_one_of_two_is_killed_and_one_and_then_two_go_on(alone, server, tmp_path):
    workdir = tmp_path / "run"

    def part(name, *jobs, **overrides):
        overrides = {**RUN, "train.delay": 0.04, "train.checkpoint_every": 3, **overrides}
        jobs = [job | {"overrides": overrides, "takes": str(tmp_path / f"{name}{i}")} for i, job in enumerate(jobs)]
        return server.run(*jobs)

    first, second = pair(workdir)
    answers = part("killed", first, {**second, "kill": [signal.SIGKILL, 8, 0.0], "waits": [10, str(tmp_path / "never")]})
    assert_ended_well(answers, 0, workdir)
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
    assert saved in (3, 6, 9)  # a later one was on its way
    answers = part("one", {"workdir": str(workdir)}, **{"train.steps": 12})
    assert statuses(answers) == [0], answers
    first, second = pair(workdir)
    answers = part("two", {**first, "leaves": str(tmp_path / "leaves.npz")}, second)
    assert statuses(answers) == [0, 0], answers
    assert_same_run(alone, workdir, tmp_path / "leaves.npz")

    # Each process reads its rows of every batch, in the order of one process, and nothing else: a row to see the shapes, then batches.
    for name, count, start, least in (("killed", 2, 0, 8), ("one", 1, saved, 12 - saved), ("two", 2, 12, 6)):
        for process in range(count):
            mine = slice(process * 16 // count, (process + 1) * 16 // count)
            peek, *batches = [json.loads(line) for line in (tmp_path / f"{name}{process}").read_text().splitlines()]
            assert peek == [indices(0)[mine][0]] and len(batches) >= least
            for step, read in enumerate(batches, start):
                assert read == indices(step)[mine], (name, process, step)


def indices(step):
    """The examples of the global batch of a step."""
    return order.indices(toy.get_config().seed, order.positions(step, 16), len(toy.data(50, 0))).tolist()


@pytest.mark.slow
def test_eight_kills_of_two_processes_change_nothing(server, tmp_path):
    steps = {**LIVELY, "train.steps": 96, "train.checkpoint_every": 4}
    first, second = pair(tmp_path / "whole", overrides=steps)
    answers = server.run({**first, "leaves": str(tmp_path / "whole.npz")}, second)
    assert statuses(answers) == [0, 0], answers

    moments = random.Random(0)
    for attempt in range(8):
        when = "save" if attempt % 2 else 4 * attempt
        jobs = pair(tmp_path / "torn", overrides=steps)
        victims = [[0], [1], [0, 1]][attempt % 3]
        for victim in victims:
            jobs[victim]["kill"] = [signal.SIGKILL, when, moments.uniform(0, 0.2)]
        answers = server.run(*jobs)
        assert 0 not in statuses(answers), answers
        if len(victims) == 1:  # whether the other computes or waits for its part of a checkpoint
            assert_ended_well(answers, 1 - victims[0], tmp_path / "torn")
    first, second = pair(tmp_path / "torn", overrides=steps)
    answers = server.run({**first, "leaves": str(tmp_path / "torn.npz")}, second)
    assert statuses(answers) == [0, 0], answers
    assert_same_leaves(tmp_path / "whole.npz", tmp_path / "torn.npz")
    assert lines(tmp_path / "torn") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_decide_alike_about_damage_and_about_a_lock(server, tmp_path):
    overrides = {**RUN, "train.eval_every": 0, "train.steps": 12}
    answers = server.run(*pair(tmp_path / "run", overrides=overrides))
    assert statuses(answers) == [0, 0], answers
    # One bit of the newest checkpoint: only the process whose share it is in sees it.
    file = max((p for p in (tmp_path / "run/checkpoints/12/state").rglob("d/*")), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    answers = server.run(*pair(tmp_path / "run", overrides={**overrides, "train.steps": 14}))
    assert statuses(answers) == [0, 0], answers
    assert "checkpoints/12 is damaged" in log_of(tmp_path / "run", 0)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["12", "14"] and (tmp_path / "run/damaged/12").is_dir()
    with lock.held(tmp_path / "run"):
        answers = server.run(*pair(tmp_path / "run", overrides={**overrides, "train.steps": 16}, constants={"LEAVE_SECONDS": 10}))
    assert statuses(answers) == [2, 2], answers
    assert all("is being trained by process" in answer["error"] for answer in answers)


# ---- The end of one is the end of all ----


def assert_ended_well(answers, survivor, workdir, within=300):
    """The other was killed: this one has ended soon, with one sentence, a status after which it is started again, and no stack."""
    assert answers[survivor]["status"] == 1 and answers[1 - survivor]["status"] == -signal.SIGKILL, answers
    assert answers[survivor]["seconds"] < within
    last = log_of(workdir, survivor).rpartition("connected peer ranks is : 1\n")[2]  # the log of several runs
    assert last.count("mmdiff: error: ") == 1 and last.endswith("the same command continues from the last checkpoint.\n"), last
    assert "***" not in last and "Traceback" not in last and "Terminating process" not in last


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_the_other_with_a_sentence(killed, server, tmp_path):
    jobs = pair(tmp_path / "run", overrides={"train.steps": 500, "train.delay": 0.01, "train.eval_every": 0})
    jobs[killed]["kill"] = [signal.SIGKILL, 8, 0.0]
    assert_ended_well(server.run(*jobs), 1 - killed, tmp_path / "run")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(server, tmp_path):
    overrides = {"train.steps": 500, "train.checkpoint_every": 1000, "train.eval_every": 0, "train.delay": 0.01}
    first, second = pair(tmp_path / "run", overrides=overrides)
    answers = server.run(first, {**second, "kill": [signal.SIGTERM, 8, 0.0]})
    assert statuses(answers) == [128 + signal.SIGTERM] * 2, answers
    [saved] = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()]
    assert 8 < saved < 500
    assert f"saved step {saved}" in log_of(tmp_path / "run", 0)


@pytest.mark.slow
def test_a_process_that_falls_silent_counts_as_dead(server, tmp_path):
    # It is stopped, as if its machine had lost its network: no connection breaks.
    overrides = {"train.steps": 500, "train.delay": 0.01}
    first, second = pair(tmp_path / "run", overrides=overrides, constants={"HEARTBEAT_SECONDS": 3})
    answers = server.run(first, {**second, "kill": [signal.SIGSTOP, 8, 0.0]})
    answers[1]["status"] = -signal.SIGKILL  # by the server, at the end
    assert_ended_well(answers, 0, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_the_failure_of_one_process_ends_the_other(process, server, tmp_path):
    jobs = pair(tmp_path / "run", overrides={"train.steps": 500, "train.delay": 0.01}, constants={"LEAVE_SECONDS": 1})
    jobs[process]["bad_read"] = 20
    answers = server.run(*jobs)
    assert answers[process]["status"] in (1, 2) and "the disk is gone" in answers[process]["error"], answers
    assert answers[1 - process]["status"] == 1 and answers[1 - process]["seconds"] - answers[process]["seconds"] < 300, answers


# ---- How they find each other ----


def command(workdir, *flags):
    return ["train", "--config", TOY, "--workdir", str(workdir), "--config.train.steps=2", *flags]


@pytest.mark.slow
def test_processes_find_each_other_through_slurm(server, tmp_path):
    job = next(number for number in range(4096) if not in_use(61440 + number))  # JAX makes a port of the number of the job
    env = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    found = server.run(*[
        {"workdir": str(tmp_path / "run"), "name": i, "argv": command(tmp_path / "run", "--distributed"),
         "env": {**env, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}
        for i in range(2)
    ])  # fmt: skip
    assert statuses(found) == [0, 0], log_of(tmp_path / "run", 0)
    assert json.loads((tmp_path / "run/run.json").read_text())["device"] == "2 x cpu"


@pytest.mark.slow
def test_processes_find_each_other_by_flags_and_by_variables(server, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    by_flags = command(tmp_path / "run", "--distributed", "--coordinator", address, "--processes", "2", "--process", "0")
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    found = server.run(
        {"workdir": str(tmp_path / "run"), "name": 0, "argv": by_flags},
        {"workdir": str(tmp_path / "run"), "name": 1, "argv": command(tmp_path / "run"), "env": variables},
    )
    assert statuses(found) == [0, 0], log_of(tmp_path / "run", 0)
    assert json.loads((tmp_path / "run/run.json").read_text())["device"] == "2 x cpu"


def in_use(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def test_a_process_that_finds_no_other_says_so(server, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    flags = ["--coordinator", address, "--processes", "2", "--process", "1"]
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", "0"]
        found = server.run(
            {"workdir": str(tmp_path / "a"), "argv": command(tmp_path / "a", *flags), "constants": {"JOIN_SECONDS": 1}},
            {"workdir": str(tmp_path / "b"), "argv": command(tmp_path / "b", *busy)},
            {"workdir": str(tmp_path / "c"), "argv": command(tmp_path / "c", "--distributed")},
        )
    assert statuses(found) == [1, 2, 2]
    said = [log_of(tmp_path / name, 0).splitlines()[-1] for name in "abc"]
    assert said[0] == (
        "mmdiff: error: the processes of this run did not find each other within 1 s: start all 2 of them, "
        f"and let each reach process 0 at {address}."
    )
    assert said[1] == f"mmdiff: error: process 0 cannot serve at 127.0.0.1:{port} (Address already in use): name a free port."
    assert "cannot join the other processes" in said[2] and "--coordinator HOST:PORT --processes N --process I" in said[2]


@pytest.mark.parametrize(
    "flags, variables, words",
    [
        (["--coordinator", "a:1"], {}, "--processes and --process is missing"),
        (["--process", "0", "--processes", "2"], {"JAX_COORDINATOR_ADDRESS": "a:1"}, "--coordinator is missing"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], {}, "--process is 2, but --processes is 2: it must be 0 to 1"),
        (["--coordinator", "a:1", "--processes", "0", "--process", "0"], {}, "--processes must be an integer of 1 or more, not '0'"),
        (["--coordinator", "a", "--processes", "2", "--process", "0"], {}, "HOST:PORT of process 0, with a port of 1 to 65535, not 'a'"),
        ([], {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID must be an integer of 0 or more, not 'one'"),
        ([], {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "5"}, "JAX_PROCESS_ID is 5, but JAX_NUM_PROCESSES is 2"),
    ],
)
def test_half_an_address_is_refused(flags, variables, words, monkeypatch, capsys, tmp_path):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(command(tmp_path / "run", *flags)) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_flags_go_before_variables_and_these_may_leave_some_to_be_found(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "there:2")
    assert distributed.address() == {"coordinator": "there:2"}
    assert distributed.address("here:1", "2", "0") == {"coordinator": "here:1", "processes": 2, "process": 0}


@pytest.mark.parametrize(
    "nodes, first", [("node7,node9", "node7"), ("gpu[003-004,7]", "gpu003"), ("gpu[3,7],x", "gpu3"), ("a-b", "a-b"), ("", None)]
)
def test_where_slurm_has_put_process_0(nodes, first, monkeypatch):
    for name, value in {"JOB_ID": "8193", "STEP_NODELIST": nodes, "PROCID": "5"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert distributed._slurm() == ({"coordinator": f"{first}:61441", "process": 5} if first else {})


@pytest.mark.parametrize("variable", distributed.RANKS)
def test_only_the_first_process_samples_and_evaluates(variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "3")
    for name in "sample", "eval":
        assert main([name, "--config", "no such file", "--workdir", "no such folder"]) == 0
        assert f"nothing to do in process 3 ({variable})" in capsys.readouterr().err
