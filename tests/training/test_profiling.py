"""Traces of training steps."""

import gzip
import json

import numpy as np
import pytest

from mmdiff import arguments
from mmdiff.errors import UserError
from mmdiff.training.profiling import Profile


def test_a_trace_has_the_steps_that_were_asked_for(server, tmp_path):
    """In a process of its own, which the profiler could end."""
    overrides = {"train.steps": 8, "train.eval_every": 0, "train.checkpoint_every": 8}
    traced, plain = (
        {"workdir": str(tmp_path / name), "overrides": overrides, "leaves": f"{tmp_path / name}.npz"} for name in ("run", "plain"))
    assert [answer["status"] for answer in server.run({**traced, "profile": (3, 5)}, plain)] == [0, 0]
    [path] = (tmp_path / "run/profile/plugins/profile").glob("*/*.trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {int(event["args"]["step_num"]) for event in events if event.get("name") == "train"} == {3, 4, 5}
    assert f"a trace of the steps 3 to 5 is in {tmp_path / 'run/profile'}" in (tmp_path / "run.error0.log").read_text()
    with np.load(traced["leaves"]) as one, np.load(plain["leaves"]) as other:
        assert set(one) == set(other) and all((one[name] == other[name]).all() for name in one)


def test_steps_are_after_the_first_ten_and_within_the_run(tmp_path):
    def steps(asked, start, last):
        found = Profile(asked, tmp_path, start, last, print)
        return found.first, found.last

    assert steps((None, 10), 0, 100) == (11, 20) and steps((None, 10), 50, 100) == (61, 70)
    assert steps((None, 10), 0, 12) == (3, 12) and steps((None, 10), 0, 4) == (1, 4)
    assert steps((95, 110), 0, 100) == (95, 100)
    with pytest.raises(UserError, match="--profile: steps 3 to 5 do not come: this run takes the steps 7 to 8"):
        Profile((3, 5), tmp_path, 6, 8, print)
    train = ["train", "--config", "c", "--workdir", "w", "--profile"]
    assert arguments.parse([*train, "10"]).profile == (None, 10) and arguments.parse([*train, "100:110"]).profile == (100, 110)
    for wrong, said in {"0": "an integer of 1 or more", "9:3": "it must begin before it ends", "a:b": "an integer of 1"}.items():
        with pytest.raises(UserError, match=said):
            arguments.parse([*train, wrong])
