"""Traces of training steps."""

import gzip
import json

import jax
import pytest
import toy

from mmdiff import arguments
from mmdiff.errors import UserError
from mmdiff.training import loop, sharding
from mmdiff.training.profiling import Profile


@pytest.fixture
def config(config, monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))
    config.train.update(steps=8, eval_every=0, checkpoint_every=8)
    return config


@pytest.mark.slow  # the profiler can end a process that has compiled as much as one that runs all tests
def test_a_trace_has_the_steps_that_were_asked_for(config, tmp_path, capsys):
    traced = loop.train(toy.build(config), config, tmp_path / "run", profile=(3, 5))
    [path] = (tmp_path / "run/profile/plugins/profile").glob("*/*.trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {int(event["args"]["step_num"]) for event in events if event.get("name") == "train"} == {3, 4, 5}
    assert f"a trace of the steps 3 to 5 is in {tmp_path / 'run/profile'}" in capsys.readouterr().err
    plain = loop.train(toy.build(config), config, tmp_path / "plain")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), traced.params, plain.params)))


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
