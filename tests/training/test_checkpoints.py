"""Checkpoints: exact, on any mesh, never half, never of another run."""

import functools
import logging
import math
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from clu.metrics import Average
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmdiff import former_names, nets
from mmdiff.errors import UserError
from mmdiff.training import averaged_weights, checkpoint_files, checkpoints, integrity, sharding
from mmdiff.training.averaged_weights import restore_for_inference
from mmdiff.training.checkpoints import Checkpoints
from mmdiff.training.run_metadata import write_config
from mmdiff.training.step import make_step

WIDTH = sharding.FSDP_MIN_SIZE // 4
INIT = functools.partial(toy.init, width=WIDTH)


@functools.cache
def optimizer():
    return toy.optimizer()


def mesh_of(data, fsdp=1):
    return sharding.make_mesh({"data": data, "fsdp": fsdp}, jax.devices()[: data * fsdp])


def abstract(mesh, rules=((".*", "fsdp"),)):
    state = sharding.abstract_state(INIT, optimizer(), mesh, rules)
    scalar = functools.partial(jax.ShapeDtypeStruct, (), sharding=NamedSharding(mesh, P()))
    return state, {"loss/x": Average(total=scalar(jnp.float32), count=scalar(jnp.int32))}


def make(mesh, step, seed=0):
    """A state at `step` and running means."""
    state = sharding.init_sharded_state(INIT, optimizer(), jax.random.key(seed), mesh, ((".*", "fsdp"),))
    return state.replace(step=state.step + step), {"loss/x": Average(total=jnp.float32(2.5), count=jnp.int32(step))}


def meta(**metrics):
    return {"position": 7, "train_seconds": 1.5, "metrics": metrics}


def save(workdir, *steps, keep=5):
    with Checkpoints(workdir, keep=keep) as saved:
        for step in steps:
            saved.save(*make(mesh_of(1), step), meta())


def steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def assert_same(one, other):
    def same(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype

    jax.tree.map(same, one, other)


def test_eight_devices_then_one_then_four(tmp_path):
    state, averages = make(mesh_of(2, 4), 5)
    original = state
    for mesh in (mesh_of(2, 4), mesh_of(1), mesh_of(1, 4)):
        with Checkpoints(tmp_path, keep=1) as saved:
            saved.save(state, averages, meta())
        with Checkpoints(tmp_path, keep=1) as saved:
            state, averages, found = saved.restore(*abstract(mesh))
        assert_same(original.replace(step=state.step), state)
        assert found == {**meta(), "step": int(state.step)}
        assert jax.tree.map(lambda x: x.sharding, (state.params, state.ema)) == jax.tree.map(
            lambda x: x.sharding, (abstract(mesh)[0].params, abstract(mesh)[0].ema)
        )
        state = state.replace(step=state.step + 1)
    assert state.params["params"]["first"]["kernel"].sharding.spec == P(None, "fsdp")
    assert averages["loss/x"].total == 2.5 and averages["loss/x"].count == 5


def test_running_means_are_read_under_their_former_names(tmp_path, monkeypatch):
    save(tmp_path, 5)
    monkeypatch.setattr(former_names, "METRICS", {"loss/x": "loss/image"})
    state, averages = abstract(mesh_of(1))
    with Checkpoints(tmp_path, keep=1) as saved:
        assert saved.restore(state, {"loss/image": averages["loss/x"]})[1]["loss/image"].count == 5
        assert saved.restore(state, averages)[1]["loss/x"].total == 2.5  # of a config of a user's own, which kept the name


@pytest.mark.slow
def test_a_transformer_goes_from_two_slices_to_one_device_to_a_tensor_mesh(tmp_path):
    net = nets.DiT(nets.Patches(16, 16, 2, 2), 10, depth=2, width=64, heads=4)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 16, 16, 2)), jnp.ones(1), jnp.zeros(1, jnp.int32))

    def init(key):
        blocks = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size) + leaf.ndim).reshape(leaf.shape), shapes["params"]["blocks"])
        return {"params": {"blocks": blocks}}

    def target(axes):
        mesh = sharding.make_mesh(axes, jax.devices()[: math.prod(axes.values())])
        return sharding.abstract_state(init, optimizer(), mesh, sharding.TRANSFORMER_RULES), mesh

    def parts(state):
        kernel = state.opt[1][0].mu["params"]["blocks"]["mlp"]["in"]["kernel"]
        return kernel.size / kernel.addressable_shards[0].data.size

    first, mesh = target({"slices": 2, "fsdp": 2, "tensor": 2})
    state = sharding.init_sharded_state(init, optimizer(), jax.random.key(1), mesh, sharding.TRANSFORMER_RULES)
    original = state = state.replace(opt=jax.jit(lambda opt: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), opt))(state.opt))
    assert parts(state) == 4
    for axes, split in (({"data": 1}, 1), ({"fsdp": 2, "tensor": 2}, 4)):
        with Checkpoints(tmp_path, keep=1) as saved:
            saved.save(state, {}, meta())
        with Checkpoints(tmp_path, keep=1) as saved:
            state, _, _ = saved.restore(target(axes)[0], {})
        assert_same(original.replace(step=state.step), state)
        assert parts(state) == split and state.ema["params"]["blocks"]["mlp"]["in"]["kernel"].sharding.mesh.shape == target(axes)[1].shape
        state = state.replace(step=state.step + 1)


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    # The next step overwrites the donated state while the save goes on.
    mesh = mesh_of(1)
    batch = {"x": np.ones((4, 4), np.float32), "index": np.arange(4, dtype=np.uint32)}
    state, averages = make(mesh, 0)
    step = make_step(toy.loss, optimizer())
    program = sharding.lower_step(step, abstract(mesh)[0], batch, mesh).compile()
    batch = sharding.shard_batch(batch, mesh)
    kept = {}
    with Checkpoints(tmp_path, keep=5) as saved:
        for _ in range(3):
            state, _ = program(state, batch)
            kept[int(state.step)] = jax.tree.map(np.array, (state.params, state.opt, state.ema))
            saved.save(state, averages, meta())
            for _ in range(5):
                state, _ = program(state, batch)
    while steps(tmp_path):
        with Checkpoints(tmp_path, keep=5) as saved:
            found, _, _ = saved.restore(*abstract(mesh))
        assert_same(kept[int(found.step)], (found.params, found.opt, found.ema))
        shutil.rmtree(tmp_path / "checkpoints" / str(int(found.step)))


def files(checkpoint):
    """One file of every kind (the names of data files are random, the others are not)."""
    kinds = {}
    for file in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        kind = "/".join("DATA" if len(part) == 32 else part for part in file.relative_to(checkpoint).parts)
        if file.name != "commit_success.txt":  # only says that the rename was due
            kinds[kind] = file
    return kinds


def test_a_damaged_checkpoint_is_not_opened_whichever_file_it_is(tmp_path):
    save(tmp_path / "good", 1, 2)
    kinds = files(tmp_path / "good/checkpoints/2")
    assert {"manifest.json", "_CHECKPOINT_METADATA", "meta/metadata", "ema/d/DATA", "state/manifest.ocdbt"} <= set(kinds)
    for kind, file in kinds.items():
        for damage in ("cut", "gone"):
            workdir = tmp_path / "damaged"
            shutil.copytree(tmp_path / "good", workdir)
            victim = workdir / file.relative_to(tmp_path / "good")
            if damage == "cut":
                victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
            else:
                victim.unlink()
            assert checkpoint_files.intact(workdir / "checkpoints")[0] == [1], (kind, damage)
            shutil.rmtree(workdir)


def cut_in_half(checkpoint):
    victim = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return victim


def test_the_checkpoint_before_a_damaged_one_is_used_and_the_log_says_so(tmp_path, caplog):
    save(tmp_path, 1, 2)
    victim = cut_in_half(tmp_path / "checkpoints/2")
    with caplog.at_level(logging.WARNING, "mmdiff"), Checkpoints(tmp_path, keep=5) as saved:
        state, averages, _ = saved.restore(*abstract(mesh_of(1)))
        assert int(state.step) == 1
        saved.save(state.replace(step=state.step + 1), averages, meta())  # its number is free again
    [message] = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert victim.name in message and "bytes" in message and f"continuing from {tmp_path / 'checkpoints/1'}" in message
    assert steps(tmp_path) == [1, 2] and (tmp_path / "damaged/2").is_dir()


def test_a_checkpoint_under_another_step_is_refused(tmp_path):
    """`cp -r 4 8` continued from step 8 with the weights of step 4."""
    config = toy.get_config()
    config.model.width = WIDTH
    write_config(tmp_path, config)
    save(tmp_path, 4)
    shutil.copytree(tmp_path / "checkpoints/4", tmp_path / "checkpoints/8")
    said = f"{tmp_path}/checkpoints/8 is a copy of that of step 4, not of step 8: move it away"
    with Checkpoints(tmp_path, keep=5) as saved, pytest.raises(UserError, match=said):
        saved.restore(*abstract(mesh_of(1)))
    for step in (None, 8):
        with pytest.raises(UserError, match=said):
            averaged_weights.choose(tmp_path, step)
    assert averaged_weights.choose(tmp_path, 4) == (tmp_path / "checkpoints/4", [8])
    shutil.copytree(tmp_path / "checkpoints/4", tmp_path / "checkpoints/9")
    (tmp_path / "checkpoints/9/meta/metadata").write_text("{}")  # as earlier versions wrote it: the state says it all the same
    integrity.write_manifest(tmp_path / "checkpoints/9")
    with Checkpoints(tmp_path, keep=5) as saved, pytest.raises(UserError, match="copy of that of step 4, not of step 9"):
        saved.restore(*abstract(mesh_of(1)))
    for text in ("null", "{"):
        (tmp_path / "checkpoints/9/meta/metadata").write_text(text)
        integrity.write_manifest(tmp_path / "checkpoints/9")
        with pytest.raises(UserError, match="checkpoints/9 cannot be read"):
            averaged_weights.choose(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/9/meta")
    integrity.write_manifest(tmp_path / "checkpoints/9")
    assert averaged_weights.choose(tmp_path)[0].name == "9"


def test_an_interrupted_save_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints/1", tmp_path / "checkpoints/2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, keep=5) as saved:
        assert saved.latest() == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_the_last_and_the_best_are_kept(tmp_path):
    values = {1: 5.0, 2: 3.0, 3: 4.0, 4: float("nan"), 5: 4.5}
    mesh = mesh_of(1)
    for step, value in values.items():  # opened anew each time: the best is known from the disk
        with Checkpoints(tmp_path, keep=2, best="val/loss") as saved:
            saved.save(*make(mesh, step, seed=step), meta(**{"val/loss": value}))
    assert steps(tmp_path) == [2, 4, 5]

    class Experiment:
        init, frozen_deps = staticmethod(INIT), {}

    config = toy.get_config()
    config.train.best = "val/loss"
    ema, step = restore_for_inference(Experiment, config, tmp_path, step="best")
    assert step == 2
    assert_same(ema, make(mesh, 2, seed=2)[0].ema)
    config.train.best = ""
    with pytest.raises(UserError, match="config.train.best of the run in .* names no metric, so no checkpoint is its best"):
        restore_for_inference(Experiment, config, tmp_path, step="best")


def test_inference_opens_the_average_only(tmp_path, caplog):
    config = toy.get_config()
    config.model.width = WIDTH
    write_config(tmp_path, config)
    save(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "checkpoints/1/state")
    integrity.write_manifest(tmp_path / "checkpoints/1")
    cut_in_half(tmp_path / "checkpoints/2")
    before = sorted(map(str, tmp_path.rglob("*")))

    experiment = toy.build(config)
    expected = make(mesh_of(1), 1)[0].ema
    with caplog.at_level(logging.WARNING, "mmdiff"):
        ema, step = restore_for_inference(experiment, config, tmp_path)
    assert step == 1 and "checkpoints/2 is damaged" in caplog.text
    assert_same(ema, expected)
    assert ema["params"]["first"]["kernel"].devices() == {jax.devices()[0]}
    ema, _ = restore_for_inference(experiment, config, tmp_path, mesh=mesh_of(1, 8))
    assert_same(ema, expected)
    assert len(ema["params"]["first"]["kernel"].devices()) == 8
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_inference_needs_a_checkpoint_of_this_config(tmp_path):
    config = toy.get_config()
    with pytest.raises(UserError, match="no checkpoint in .*train first"):
        restore_for_inference(toy.build(config), config, tmp_path)
    config.model.width = WIDTH
    write_config(tmp_path, config)
    save(tmp_path, 1)
    with pytest.raises(UserError, match="no checkpoint of step 4 .*there are 1"):
        restore_for_inference(toy.build(config), config, tmp_path, step=4)
    config.seed, config.sample.steps, config.train.ema = 1, 99, 0.5  # of no concern to the weights
    restore_for_inference(toy.build(config), config, tmp_path)
    config.model.width = 32
    with pytest.raises(UserError, match=r"another config: model.width \(there 4096, here 32\)"):
        restore_for_inference(toy.build(config), config, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"another network, .* ema/params/first/kernel is \(4, 4096\) there and \(4, 32\) here"):
        restore_for_inference(toy.build(config), config, tmp_path)


def test_a_network_that_changed_under_the_same_config_is_refused(tmp_path):
    save(tmp_path, 1)
    state, averages = abstract(mesh_of(1))
    kernels = state.params["params"]
    wider = {**kernels, "first": {"kernel": jax.ShapeDtypeStruct((5, 8), jnp.float32)}}
    more = {**kernels, "third": kernels["first"]}
    fewer = {"first": kernels["first"]}
    for params, message in (
        (wider, r"params/first/kernel is \(4, 4096\) there and \(5, 8\) here"),
        (more, r"params/third/kernel is absent there and \(4, 4096\) here"),
        (fewer, r"params/second/kernel is \(4096, 4\) there and absent here"),
    ):
        with Checkpoints(tmp_path, keep=1) as saved, pytest.raises(UserError, match=f"state/state/params/{message}"):
            saved.restore(state.replace(params={"params": params}), averages)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file/run", pathlib.Path("/proc/run")):
        with pytest.raises(UserError, match=f"the workdir {workdir} cannot be written .*choose another"):
            write_config(workdir, toy.get_config())
        with pytest.raises(UserError, match=f"the workdir {workdir} cannot be written .*choose another"):
            Checkpoints(workdir, keep=1)
    with pytest.raises(UserError, match="gs://bucket/run is not a folder"):
        Checkpoints("gs://bucket/run", keep=1)


def test_what_a_failed_save_leaves_goes_though_its_threads_still_write(tmp_path, monkeypatch):
    draft, writes = tmp_path / "12.orbax-checkpoint-tmp", [1, 2, 3]

    def removed(folder, **options):
        shutil.rmtree(folder, **options)
        if writes:  # a thread that had the folder open
            writes.pop()
            draft.mkdir()

    monkeypatch.setattr(checkpoints, "shutil", types.SimpleNamespace(rmtree=removed))
    draft.mkdir()
    checkpoints._remove_drafts(tmp_path)
    assert not draft.exists() and not writes
