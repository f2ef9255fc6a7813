"""Meshes, rules and batches on eight simulated devices."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmdiff.errors import UserError
from mmdiff.training import sharding
from mmdiff.training.step import make_step

WIDTH = sharding.FSDP_MIN_SIZE // 4  # kernels of 4 x WIDTH are just large enough to be split
TENSOR = [("first/kernel", P(None, "tensor")), ("second/kernel", P("tensor", None))]
MESHES = {
    "1": ({}, []),
    "data 2": ({"data": 2}, []),
    "data 8": ({"data": 8}, []),
    "fsdp 8": ({"fsdp": 8}, [(".*", "fsdp")]),
    "data 2 fsdp 2 tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, [*TENSOR, (".*", "fsdp")]),
    "slices 2 fsdp 2 seq 2": ({"slices": 2, "fsdp": 2, "seq": 2}, [(".*", "fsdp")]),
}


def mesh_of(data=1, fsdp=1, **others):
    axes = {"data": data, "fsdp": fsdp, **others}
    return sharding.make_mesh(axes, jax.devices()[: math.prod(axes.values())])


def batch(step, size=32):
    index = np.arange(step * size, (step + 1) * size, dtype=np.uint32)
    return {"x": np.random.default_rng(step).normal(size=(size, 4)).astype(np.float32), "index": index}


def setup(mesh, rules, microbatches=1):
    init, optimizer = functools.partial(toy.init, width=WIDTH), toy.optimizer()
    abstract = sharding.abstract_state(init, optimizer, mesh, rules)
    state = sharding.init_sharded_state(init, optimizer, jax.random.key(0), mesh, rules)
    step = make_step(toy.loss, optimizer, microbatches=microbatches)
    return state, sharding.lower_step(step, abstract, batch(0), mesh).compile()


@functools.cache
def reference():
    return trained("1", 1)


def trained(name, microbatches):
    axes, rules = MESHES[name]
    mesh, seen = mesh_of(**axes), []
    state, program = setup(mesh, rules, microbatches)
    for i in range(4):
        state, metrics = program(state, sharding.shard_batch(batch(i), mesh))
        seen.append(jax.device_get(metrics))
    return jax.device_get((state.params, state.ema)), seen


@pytest.mark.parametrize(
    "name, microbatches",
    [
        ("1", 4), ("data 2", 1), ("data 2", 4), ("data 8", 1), ("data 8", 4), ("fsdp 8", 1), ("data 2 fsdp 2 tensor 2", 4),
        ("slices 2 fsdp 2 seq 2", 1),
    ],
)
def test_loss_and_weights_do_not_depend_on_the_mesh(name, microbatches):
    arrays, metrics = trained(name, microbatches)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), metrics[0], reference()[1][0])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (arrays, metrics), reference())


def test_microbatches_move_no_data():
    # Only sums over devices are left: had micro-batches been blocks of rows, the batch would have to be moved between them.
    _, program = setup(mesh_of(8), [], 4)
    text = program.as_text()
    assert "all-reduce" in text
    assert not [op for op in ("all-to-all", "collective-permute", "all-gather") if op in text]


def test_state_is_made_in_place_and_donated():
    mesh = mesh_of(2, 4)
    state, program = setup(mesh, [(".*", "fsdp")])
    kernel = ["params", "first", "kernel"]
    trees = [state.params, state.ema, state.opt[1][0].mu, state.opt[1][0].nu]
    leaves = [functools.reduce(lambda tree, name: tree[name], kernel, tree) for tree in trees]
    for leaf in leaves:
        assert leaf.sharding == NamedSharding(mesh, P(None, "fsdp"))
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(4, WIDTH // 4)}
    after, _ = program(state, sharding.shard_batch(batch(0), mesh))
    assert all(leaf.is_deleted() for leaf in leaves) and after.params["params"]["first"]["kernel"].sharding == leaves[0].sharding


def test_specs_go_by_path_and_the_first_rule_wins():
    tree = {"mlp": {"kernel": jnp.zeros((8, 12)), "bias": jnp.zeros(12)}, "count": jnp.zeros((), jnp.int32)}
    mesh = mesh_of(1, 4, tensor=2)
    rules = [("mlp/kernel$", P("tensor", "fsdp")), ("kernel", P("tensor")), ("mlp", "fsdp")]
    found = sharding.partition_specs({"params": tree, "opt": ({"mu": tree},)}, rules, mesh, min_size=1)
    one = {"mlp": {"kernel": P("tensor", "fsdp"), "bias": P("fsdp")}, "count": P()}
    assert found == {"params": one, "opt": ({"mu": one},)}


@pytest.mark.parametrize(
    "shape, expected",
    [((64, 128), P(None, "fsdp")), ((128, 64), P("fsdp")), ((64, 64), P(None, "fsdp")), ((7, 9), P()), ((126, 64), P(None, "fsdp"))],
)
def test_fsdp_splits_the_largest_dimension_that_divides(shape, expected):
    assert sharding.partition_specs({"w": jnp.zeros(shape)}, [(".*", "fsdp")], mesh_of(1, 4), min_size=1) == {"w": expected}


def test_a_rule_by_axis_leaves_the_rest_to_fsdp():
    rules = [("in/kernel", {"tensor": -1}), ("in/bias", {"tensor": -1, "fsdp": None}), (".*", "fsdp")]
    tree = {"in": {"kernel": jnp.zeros((4, 32, 64)), "bias": jnp.zeros((4, 64))}}

    def found(**axes):
        return sharding.partition_specs(tree, rules, mesh_of(**axes), min_size=1)["in"]

    assert found(fsdp=4, tensor=2) == {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")}
    assert found(fsdp=4) == {"kernel": P(None, None, "fsdp"), "bias": P()}  # no tensor axis: as if it were not named


def test_fsdp_leaves_small_arrays_and_single_meshes_whole():
    rules, tree = [(".*", "fsdp")], {"w": jnp.zeros((8, 8))}
    assert sharding.partition_specs(tree, rules, mesh_of(1, 4), min_size=65) == {"w": P()}
    assert sharding.partition_specs(tree, rules, mesh_of(4, 1), min_size=1) == {"w": P()}


@pytest.mark.parametrize(
    "rule, message",
    [
        (P("fsdp"), r"splits a dimension of 6 in 4.*shape is \(6, 8\)"),
        (P(None, None, "fsdp"), "more dimensions"),
        (P("model"), "names 'model': the mesh has slices, data, fsdp, seq, tensor"),
        ("zero3", "must be a PartitionSpec, 'fsdp' or a dict"),
        ({"tensor": -3}, "asks for dimension -3"),
    ],
)
def test_a_rule_that_does_not_fit_names_the_path(rule, message):
    with pytest.raises(UserError, match=f"of mlp/kernel .*{message}"):
        sharding.partition_specs({"mlp": {"kernel": jnp.zeros((6, 8))}}, [("kernel", rule)], mesh_of(1, 4))


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"data": 3}, "data=3, fsdp=1, seq=1, tensor=1 does not fit the 8 device"),
        ({"data": -1, "tensor": 3}, "does not fit the 8 device"),
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0}, "must be positive"),
        ({"dta": 8}, "no axis 'dta': its axes are slices, data, fsdp, seq, tensor"),
    ],
)
def test_bad_meshes_are_refused(axes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(axes)


def test_one_axis_takes_what_is_left():
    assert sharding.make_mesh({"data": -1, "fsdp": 2}).shape == {"slices": 1, "data": 4, "fsdp": 2, "seq": 1, "tensor": 1}


@pytest.mark.parametrize("size, microbatches, nearest", [(100, 1, 96), (3, 1, 8), (20, 4, 32), (0, 1, 8)])
def test_a_batch_that_the_mesh_does_not_divide_is_refused(size, microbatches, nearest):
    with pytest.raises(UserError, match=f"global batch {size}.*global_batch={nearest}\\."):
        sharding.check_batch(size, mesh_of(4, 2), microbatches)
    sharding.check_batch(nearest, mesh_of(4, 2), microbatches)


def test_one_process_feeds_the_whole_batch():
    assert sharding.process_shard(mesh_of(4, 2), 16) == (0, 1)
    placed = sharding.shard_batch(batch(0), mesh_of(4, 2))
    assert placed["x"].sharding.spec == P(("slices", "data", "fsdp"))
    np.testing.assert_array_equal(placed["x"], batch(0)["x"])


def test_rings_are_turned_off_where_the_compiler_knows_how():
    class Lowered:
        def compile(self, options=None):
            asked.append(options)
            if options and unknown:
                raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option: 'xla_...'")
            return options

    def mesh(platform="tpu", **axes):
        return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]), shape={"fsdp": 16, "tensor": 1, **axes})

    asked, unknown = [], False
    assert sharding.compile_lowered(Lowered(), mesh()) == {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    assert not any(sharding.compile_lowered(Lowered(), mesh(*a, **k)) for a, k in ((["cpu"], {}), ([], {"tensor": 2}), ([], {"fsdp": 1})))
    unknown = True
    assert sharding.compile_lowered(Lowered(), mesh()) is None and asked[-2] and asked[-1] is None
