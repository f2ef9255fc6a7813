"""DiT and MMDiT on meshes: the same numbers everywhere, and every axis takes its share of the memory and of the products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mmdiff import losses, nets, times
from mmdiff.processes import Gaussian, Given, Joint, absorbing, velocity
from mmdiff.schedules import flow
from mmdiff.training import sharding
from mmdiff.training.step import make_step

SHAPE = {"image": (16, 16, 2), "label": ()}
SIZE = {"depth": 2, "width": 64, "heads": 4}
CASES = [
    ("dit", {"tensor": 4, "data": 2}),
    ("dit", {"seq": 4, "fsdp": 2}),
    ("streams", {"slices": 2, "fsdp": 2, "tensor": 2}),
    ("shared", {"seq": 2, "fsdp": 2, "tensor": 2}),
]


def system(kind, **options):
    image = nets.Patches(16, 16, 2, 2)
    if kind == "dit":
        process = Joint(image=Gaussian(flow(), velocity), label=Given(null=10))
        return process, nets.DiT(image, 10, **SIZE, **options)
    process = Joint(image=Gaussian(flow(), velocity), label=absorbing(10))
    return process, nets.MMDiT({"image": image, "label": nets.Label(11, 10)}, shared=kind == "shared", **SIZE, **options)


def batch(size=16):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(size, 16, 16, 2)).astype(np.float32)
    return {"image": images, "label": np.arange(size, dtype=np.int32) % 10, "index": np.arange(size, dtype=np.uint32)}


@functools.cache
def compiled(kind, mesh, **options):
    """-> (abstract state, program, sharded start): one step of SGD, whose update is the gradient itself."""
    process, net = system(kind, **options)
    apply = nets.as_joint(net) if kind == "dit" else net.apply
    x = {"image": jnp.zeros((1, 16, 16, 2)), "label": jnp.zeros(1, jnp.int32)}
    t = {"image": jnp.ones(1), "label": jnp.ones(1)}
    shapes = jax.eval_shape(net.init, jax.random.key(0), *((x["image"], t["image"], x["label"]) if kind == "dit" else (x, t)))
    loss = losses.diffusion(process, apply, times.joint(image=times.uniform(), label=times.uniform()))

    def init(key):  # away from adaLN-Zero, where most gradients vanish; without random numbers, which are slow to compile
        return jax.tree.map(lambda leaf: 0.1 * jnp.sin(7.0 * jnp.arange(leaf.size)).reshape(leaf.shape), shapes)

    axes = dict(mesh)
    here = sharding.make_mesh(axes, jax.devices()[: int(np.prod([*axes.values(), 1]))])
    optimizer = optax.sgd(1.0)
    state = sharding.abstract_state(init, optimizer, here, sharding.TRANSFORMER_RULES)
    program = sharding.lower_step(make_step(loss, optimizer), state, batch(), here).compile()
    start = sharding.init_sharded_state(init, optimizer, jax.random.key(0), here, sharding.TRANSFORMER_RULES)
    return state, program, program(start, sharding.shard_batch(batch(), here))


@pytest.mark.slow
@pytest.mark.parametrize("kind, mesh", CASES)
def test_the_step_is_the_same_on_every_mesh(kind, mesh):
    _, _, (wanted, wanted_metrics) = compiled(kind, ())
    _, _, (found, metrics) = compiled(kind, tuple(mesh.items()))
    for name in wanted_metrics:
        np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=1e-5, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), jax.device_get(found.params), jax.device_get(wanted.params))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", ["dit", "shared", "streams"])
def test_heads_and_hidden_units_are_split(kind, scan):
    process, net = system(kind, scan=scan)
    args = (jnp.zeros((1, 16, 16, 2)), jnp.ones(1), jnp.zeros(1, jnp.int32))
    inputs = args if kind == "dit" else ({"image": args[0], "label": args[2]}, {"image": args[1], "label": args[1]})
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    specs = sharding.partition_specs({"ema": params}, sharding.TRANSFORMER_RULES, mesh, min_size=2**8)
    layer = [None] if scan else []  # the layers of a stack
    wanted = {
        "qkv/kernel": P(*layer, "fsdp", "tensor"), "mlp/in/kernel": P(*layer, "fsdp", "tensor"), "mlp/in/bias": P(*layer, "tensor"),
        "attention/out/kernel": P(*layer, "tensor", "fsdp"), "mlp/out/kernel": P(*layer, "tensor", "fsdp"),
        "adaln/kernel": P(*layer, "tensor", "fsdp"),
    }  # fmt: skip
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in jax.tree.leaves_with_path(specs)}
    for end, spec in wanted.items():
        end = end if kind == "dit" else end.replace("attention/", "")
        hits = [name for name in found if "block" in name and name.replace("_mlp", "/mlp").replace("_", "/").endswith("/" + end)]
        if end == "out/kernel":
            hits = [name for name in hits if "mlp" not in name]
        assert len(hits) == {"dit": 1, "shared": 1, "streams": 2}[kind] * (1 if scan else 2), (end, list(found))
        for name in hits:
            assert found[name] == spec, name


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "seq"])
def test_every_axis_takes_its_share_of_the_products(axis):
    # Half the products, but for those per example: embeddings and modulations, which the tensor axis splits by what they read.
    _, whole, _ = compiled("dit", (), scan=False)
    _, half, _ = compiled("dit", ((axis, 2),), scan=False)
    flops = [program.cost_analysis()["flops"] for program in (whole, half)]
    assert 0.5 <= flops[1] / flops[0] < 0.62


def test_the_state_is_split_and_never_whole():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    init = lambda key: {"blocks": {"mlp": {"in": {"kernel": jax.random.normal(key, (4, 256, 1024))}}}}  # noqa: E731
    optimizer = optax.adamw(1e-3)
    state = sharding.abstract_state(init, optimizer, mesh, sharding.TRANSFORMER_RULES)
    size = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.replace(key=None)))
    program = sharding.lower_init(init, optimizer, jax.random.key(0), mesh, sharding.TRANSFORMER_RULES).compile()
    memory = program.memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 2 * size / 8
    placed = program(jax.random.key(0))
    for device in range(8):
        held = sum(x.addressable_shards[device].data.nbytes for x in jax.tree.leaves(placed.replace(key=None)))
        assert held < 1.1 * size / 8
