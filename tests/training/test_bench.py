"""`bench`: its metrics agree with each other, the peer is heard, and it needs no package beyond the core."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmdiff.errors import UserError
from mmdiff.training import bench, perf
from mmdiff.training.step import init_state, make_step

ROOT = pathlib.Path(__file__).resolve().parents[2]
# One linear map of images: what compiles fastest.
CONFIG = """
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mmdiff.data.modalities import Images
from mmdiff.experiment import Experiment
from mmdiff.processes import Process


def get_config():
    train = {"global_batch": 8, "microbatches": 1, "ema": 0.9, "prefetch": 2, "mesh": {"data": -1}}
    return ConfigDict({"seed": 0, "train": train})


def loss(params, batch, key):
    error = batch["image"].reshape(-1, 64) @ params - 1.0
    return (error**2).mean(), {}


def build(config):
    return Experiment(
        process=Process(), init=lambda key: jnp.zeros((64, 10)), apply=None, loss=loss, optimizer=optax.adam(1e-3), train_data=None,
        validation_data=None, test_data=None, shape={"image": (8, 8, 1)}, sample=None, modalities={"image": Images(8, 8)})
"""
PEER = """
import json, pathlib, sys
calls = pathlib.Path(sys.argv[1])
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
print("warming up")
print(json.dumps({"seconds_per_step": 0.25 * len(calls.read_text())}))
print(json.dumps(["not it"]))
"""


# What is not in the core, and what the core's own packages do not need either.
BEYOND = {
    "clu", "orbax", "tensorflow", "tensorflow_datasets", "tensorboard", "sklearn", "scipy", "matplotlib", "PIL",
    "pandas", "grain", "array_record", "torch",
}  # fmt: skip
BARE = f"""
import importlib.abc, sys

class Bare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BEYOND}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Bare())
from mmdiff.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command, on a machine with nothing but the core."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "bare.py").write_text(BARE)
    (folder / "config.py").write_text(CONFIG)
    (folder / "peer.py").write_text(PEER)
    command = [
        *("bench", "--config", "config.py", "--config.train.microbatches=2", "--config.train.global_batch=16"),
        *("--steps", "2", "--rounds", "3", "--json", "bench.json", "--peer", f"{sys.executable} peer.py calls"),
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "bare.py", *command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "bench.json").read_text())


@pytest.fixture
def found(run):
    return run[1]


def test_the_figures_agree_with_each_other(found):
    seconds = found["step_seconds"]
    assert seconds == np.median(found["step_seconds_rounds"]) > 0
    low, high = found["step_seconds_quartiles"]
    assert low <= seconds <= high and len(found["step_seconds_rounds"]) == found["rounds"] == 3
    assert found["images_per_second"] == pytest.approx(16 / seconds)
    assert found["images_per_second_per_chip"] == pytest.approx(16 / seconds / found["chips"]) and found["chips"] == 8
    rate = found["model_flops"] / seconds / 8
    assert found["model_flops_per_second_per_chip"] == pytest.approx(rate)
    assert found["mfu_measured"] == pytest.approx(rate / found["peak_measured"])
    assert found["peak_datasheet"] is found["mfu_datasheet"] is None  # of a CPU
    assert found["overhead"] > -1 and found["overhead_value_and_grad"] > -1
    assert 0 <= found["input_wait"] <= 1
    assert found["lowering_seconds"] > 0 and found["compile_seconds"] > 0


def test_the_model_is_counted_by_hand(found):
    assert found["parameters"] == 64 * 10 and found["dtype"] == "float32"
    assert found["model_flops"] == 3 * 2 * 16 * found["parameters"]  # a multiply-add with each weight for each example, three times


def test_memory_holds_the_state(found):
    memory = found["memory"]
    state = 4 * 4 * found["parameters"]  # weights, two moments and the average
    assert state <= memory["compiled"] < memory["resident"] and memory["peak"] is None
    assert memory["resident"] > 50e6  # bytes: an imported jax takes more


def test_the_peer_takes_turns_and_the_ratio_is_of_medians(found):
    assert found["peer"]["all"] == [0.25, 0.5, 0.75]
    assert found["peer"]["seconds_per_step"] == 0.5
    assert found["peer"]["ratio"] == pytest.approx(found["step_seconds"] / 0.5)


def test_every_figure_is_documented(found):
    assert [key for key in found if f'"{key}"' not in bench.measure.__doc__] == []


def test_the_command_prints_what_it_writes_and_says_how_far_it_is(run):
    done, found = run
    assert done.stdout == bench.table(found) + "\n"
    assert f"ours takes {found['peer']['ratio']:.3f} times as long" in done.stdout
    assert "MFU, datasheet  unknown" in done.stdout
    assert "round 3 of 3" in done.stderr and "the peer 0.75 s" in done.stderr


@pytest.mark.parametrize(
    "code, words",
    [
        ("import sys; print('note', file=sys.stderr); sys.exit('out of memory')", r"status 1 \(out of memory\)"),
        ("import sys; sys.exit(3)", r"status 3 \(it says nothing\)"),
        ("print('done')", 'no line of JSON with "seconds_per_step"'),
        ("print('{\"seconds_per_step\": null}')", 'no line of JSON with "seconds_per_step"'),
    ],
)
def test_a_peer_that_fails_is_one_sentence(code, words, tmp_path):
    (tmp_path / "peer.py").write_text(code)
    with pytest.raises(UserError, match=words):
        bench.ask(f"{sys.executable} {tmp_path / 'peer.py'}")


@pytest.mark.parametrize("command", ["no-such-program --fast", "'", " "])
def test_a_peer_that_is_not_there_is_refused_before_anything_is_compiled(command):
    with pytest.raises(UserError, match="--peer"):
        bench.measure(None, None, peer=command)


def test_the_time_of_a_call_is_that_of_all_calls_over_their_number(monkeypatch):
    now, done = [0.0], []
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def call():
        done.append(None)
        now[0] += 2.0
        return np.zeros(())

    assert bench._time(call, 7) == 2.0 and len(done) == 7


def test_the_type_of_the_network_is_that_of_most_products():
    def mixed(x):
        half = x.astype(jnp.bfloat16)
        return (x[:2] @ x).sum() + (half @ half).sum()

    assert perf.main_type(mixed, jnp.ones((8, 8))) == jnp.bfloat16
    assert perf.main_type(lambda x: (x[:2] @ x).sum(), jnp.ones((8, 8))) == jnp.float32
    assert perf.main_type(jnp.sum, jnp.ones(3)) == jnp.float32


@pytest.mark.slow
def test_the_programs_beside_training_leave_nothing_out():
    def loss(params, batch, key):
        return ((batch["x"] @ params) ** 2).mean(), {}

    parts = types.SimpleNamespace(loss=loss, optimizer=optax.adam(0.1))
    state = init_state(lambda key: jax.random.normal(key, (4,)), parts.optimizer, jax.random.key(0))
    batch = {"x": jnp.arange(8.0).reshape(2, 4)}
    after, metrics = jax.jit(bench._gradient(parts))(state, batch)
    value, grads = jax.value_and_grad(lambda params: loss(params, batch, None)[0])(state.params)
    np.testing.assert_allclose(after.ema, grads, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    after, _ = jax.jit(bench._update(parts))(state, batch)
    trained, _ = jax.jit(make_step(loss, parts.optimizer))(state, batch)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt), (trained.params, trained.opt))
