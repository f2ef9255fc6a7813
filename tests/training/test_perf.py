"""FLOPs, the reading of compiled programs, and the roofline, against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmdiff import nets
from mmdiff.training import hlo, perf, sharding
from mmdiff.training.step import init_state, make_step

ROWS, WHOLE = sharding.BATCH_SPEC, P()
V5E = perf.chip("TPU v5 lite")


def shape(*lengths, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(lengths, dtype)


# ---- FLOPs ----


def test_products_and_convolutions_are_counted():
    assert perf.flops(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert perf.flops(functools.partial(jnp.einsum, "bnd,bmd->bnm"), shape(2, 3, 5), shape(2, 4, 5)) == 2 * 2 * 3 * 4 * 5
    convolve = functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding="SAME")
    image, kernel = shape(1, 4, 8, 8), shape(6, 4, 3, 3)
    forward = 2 * (6 * 4 * 4) * (4 * 3 * 3)
    assert perf.flops(convolve, image, kernel) == forward
    assert perf.flops(jax.grad(lambda x, k: convolve(x, k).sum()), image, kernel) == 2 * forward  # by the image, zeros put in between


def test_control_flow_is_followed():
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=6)[0]

    x, w = shape(3, 5), shape(5, 5)
    one = 2 * 3 * 5 * 5
    assert perf.flops(jax.jit(scanned), x, w) == 6 * one
    assert perf.flops(lambda x, w: jax.lax.fori_loop(0, 4, lambda _, x: x @ w, x), x, w) == 4 * one
    assert perf.flops(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x), x, w) == 2 * one
    with pytest.raises(ValueError, match="while loop"):
        perf.flops(lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x), x, w)


def test_what_is_computed_again_counts_again():
    def loss(w, x, policy):
        return jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w), policy=policy)(w, x).sum()

    def step(policy):
        return perf.flops(jax.grad(functools.partial(loss, policy=policy), argnums=(0, 1)), shape(5, 5), shape(3, 5))

    one = 2 * 3 * 5 * 5
    assert step(jax.checkpoint_policies.everything_saveable) == 6 * one
    assert step(jax.checkpoint_policies.nothing_saveable) == 8 * one


def dit_flops(depth, width, tokens, patch, size):
    """2 x the multiply-adds of a DiT: qkv, out and MLP; scores and values; adaLN per example; patches in and out; final adaLN; time."""
    layer = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    return 2 * (depth * layer + tokens * patch**2 * size * width + 2 * width**2 + 256 * width + width**2)


@pytest.mark.parametrize("published, size, scan", [(118.64e9, "XL", True), (6.06e9, "S", False)])
def test_dit_has_the_published_flops(published, size, scan):
    net = nets.DiT.preset(size, 2, scan=scan)
    depth, width, _ = nets.sizes(size)
    inputs = shape(1, 32, 32, 4), shape(1), shape(1, dtype=jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    counted = perf.flops(net.apply, params, *inputs)
    assert counted == dit_flops(depth, width, 256, 2, 4 + 8)
    assert counted == pytest.approx(2 * published, rel=1e-3)  # Peebles & Xie 2023, table 4, whose "Gflops" are multiply-adds


def test_mmdit_has_the_flops_of_its_formula():
    width, depth, batch = 32, 3, 5
    streams = {"image": nets.Patches(8, 8, 1, 2), "label": nets.Label(states=11, classes=10)}
    net = nets.MMDiT(modalities=streams, depth=depth, width=width, heads=4, shared=True)
    x = {"image": shape(batch, 8, 8, 1), "label": shape(batch, dtype=jnp.int32)}
    t = {"image": shape(batch), "label": shape(batch)}
    params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    layer = 12 * 17 * width**2 + 2 * 17**2 * width + 2 * 6 * width**2  # one adaLN per stream
    ends = 16 * (4 + 4) * width + 10 * width + 2 * (2 * width**2 + 256 * width + width**2)
    assert perf.flops(net.apply, params, x, t) == 2 * batch * (depth * layer + ends)


def test_a_gradient_that_is_stopped_does_not_count():
    def loss(params, batch, key):
        encoded = jax.lax.stop_gradient(jnp.tanh(batch["x"] @ params) @ params.T)
        return ((encoded @ params) ** 2).mean(), {}

    product = 2 * 6 * 4 * 8
    found = perf.model_flops(loss, shape(4, 8), {"x": shape(6, 4), "label": jax.ShapeDtypeStruct((6,), jnp.int32)}, jax.random.key(0))
    assert found == (1 + 1 + 2) * product  # no gradient of the first two, and none by what the third reads


def test_a_step_is_three_times_its_loss():
    def loss(params, batch, key):
        return ((jnp.tanh(batch["x"] @ params["first"]) @ params["second"]) ** 2).mean(), {}

    params = {"first": shape(4, 8), "second": shape(8, 4)}
    batch, key = {"x": shape(6, 4)}, jax.random.key(0)
    product = 2 * 6 * 4 * 8
    assert perf.model_flops(loss, params, batch, key) == 6 * product
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda: init_state(lambda key: jax.tree.map(lambda x: jnp.zeros(x.shape), params), optimizer, key))
    for microbatches in (1, 3):  # nothing needs the gradient by x
        assert perf.flops(make_step(loss, optimizer, microbatches=microbatches), state, batch) == 5 * product


# ---- Compiled programs ----


def compiled(function, mesh, in_specs, out_specs, *shapes):
    def place(specs):
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))

    return jax.jit(function, in_shardings=place(in_specs), out_shardings=place(out_specs)).lower(*shapes).compile().as_text()


def sent(text, mesh):
    return {(e.kind, e.axes): e.bytes for e in perf.collective_costs(hlo.Program(text), mesh, V5E)}


def test_a_product_split_over_its_sum_is_reduced_over_that_axis():
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    x, w = P("data", "tensor"), P("tensor", None)
    text = compiled(jnp.matmul, mesh, (x, w), P("data", None), shape(16, 32), shape(32, 64))
    assert sent(text, mesh) == {("all-reduce", ("tensor",)): 2 * 3 / 4 * (8 * 64 * 4)}
    assert sent(compiled(jnp.matmul, mesh, (x, w), x, shape(16, 32), shape(32, 64)), mesh).keys() <= {
        ("all-reduce", ("tensor",)),
        ("reduce-scatter", ("tensor",)),
    }


def test_layers_of_a_scan_are_gathered_once_each():
    mesh, layers, width = sharding.make_mesh({"data": 2, "fsdp": 4}), 3, 64
    weights, rows = P(None, None, "fsdp"), NamedSharding(mesh, ROWS)

    def loss(w, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return (jax.lax.scan(layer, x, w)[0] ** 2).sum()

    def step(w, x):
        return w - jax.grad(loss)(w, x)

    text = compiled(step, mesh, (weights, ROWS), weights, shape(layers, width, width), shape(16, width))
    part = width * width * 4 / 4
    found = sent(text, mesh)
    assert found.pop(("all-gather", ("fsdp",))) == 2 * layers * 3 * part  # for the layer, and for the gradient by its input
    assert found.pop(("all-reduce", ("data",))) == layers * 2 * 1 / 2 * part
    assert found == {("all-reduce", ("fsdp",)): layers * 2 * 3 / 4 * 4 * part}
    assert not hlo.Program(text).unknown_loops


def test_a_network_split_by_fsdp_sends_weights_and_no_activations():
    mesh, batch = sharding.make_mesh({"fsdp": 8}), 512
    net = nets.DiT(nets.Patches(8, 8, 1, 2), 10, depth=2, width=128, heads=4)

    def loss(params, batch, key):
        return (net.apply(params, batch["image"], batch["t"], batch["label"]) ** 2).mean(), {}

    def init(key):
        return net.init(key, jnp.zeros((1, 8, 8, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32))

    optimizer = optax.sgd(0.1)
    state = sharding.abstract_state(init, optimizer, mesh, sharding.TRANSFORMER_RULES)
    inputs = {"image": shape(batch, 8, 8, 1), "t": shape(batch), "label": shape(batch, dtype=jnp.int32)}
    text = sharding.lower_step(make_step(loss, optimizer), state, inputs, mesh).compile().as_text()
    total = sum(sent(text, mesh).values())
    # Weights are gathered forward and backward, gradients summed. The labels' embeddings are all that there is of each example.
    weights, activations = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params)), 4 * batch * 16 * 128
    assert total < 4 * weights * 7 / 8 + 4 * 4 * batch * 128 < activations * 7 / 8 * 2 * 2


def test_the_same_axis_is_found_however_the_devices_are_ordered():
    devices = jax.devices()[:8]
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices[4:] + devices[:4])
    for axis in ("data", "fsdp", "tensor"):
        text = compiled(lambda x: x.sum(0), mesh, (P(axis),), WHOLE, shape(8, 4))
        assert sent(text, mesh) == {("all-reduce", (axis,)): 2 * 1 / 2 * 16}


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [[0, 3], [1, 2]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("channel_id=3, source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_are_read_in_every_notation(text, groups):
    program = f"""HloModule m, num_partitions=8
ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %c = f32[4]{{0}} all-to-all(%p), channel_id=1, {text}, metadata={{op_name="f"}}
}}
"""
    [collective] = hlo.Program(program).collectives()
    np.testing.assert_array_equal(collective.groups, groups)


# What the TPU compiler writes: a loop that says nothing of its length, an all-gather that fusions carry along, fast memory S(1),
# tiles, a sum over slices, and one that shares the all-gather's channel number.
TPU = """HloModule m, is_scheduled=true, num_partitions=4

FileNames
1 "m.py"

%start (p.0: bf16[8,128]) -> (bf16[8,128], bf16[32,128], u32[]) {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gather.1 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %begin = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%carry (p.1: bf16[8,128], p.2: bf16[32,128], p.3: f32[8,128]) -> (f32[8,128], bf16[32,128]) {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.2 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  %p.3 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %gather.2 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  %twice = f32[8,128]{1,0:T(8,128)} add(%p.3, %p.3)
  ROOT %both = (f32[8,128]{1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)(2,1)}) tuple(%twice, %gather.2)
}

%save (p.4: f32[6,8,72], p.5: s32[], p.6: f32[8,72]) -> f32[6,8,72] {
  %p.4 = f32[6,8,72]{2,1,0:T(8,128)} parameter(0)
  %p.5 = s32[]{:T(128)S(6)} parameter(1)
  %p.6 = f32[8,72]{1,0:T(8,128)S(1)} parameter(2)
  %one = f32[1,8,72]{2,1,0:T(8,128)} bitcast(%p.6)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %put = f32[6,8,72]{2,1,0:T(8,128)} dynamic-update-slice(%p.4, %one, %p.5, %zero, %zero)
}

%body (p.7: (s32[], f32[6,8,72])) -> (s32[], f32[6,8,72]) {
  %p.7 = (s32[]{:T(128)}, f32[6,8,72]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.7), index=0
  %saved = f32[6,8,72]{2,1,0:T(8,128)} get-tuple-element(%p.7), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%i, %two)
  %new = f32[8,72]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %sum = f32[8,72]{1,0:T(8,128)S(1)} all-reduce(%new), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply=%add
  %updated = f32[6,8,72]{2,1,0:T(8,128)} fusion(%saved, %i, %sum), kind=kLoop, calls=%save
  ROOT %out = (s32[]{:T(128)}, f32[6,8,72]{2,1,0:T(8,128)}) tuple(%next, %updated)
}

%condition (p.8: (s32[], f32[6,8,72])) -> pred[] {
  %p.8 = (s32[]{:T(128)}, f32[6,8,72]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.8), index=0
  %end = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (a: bf16[8,128], b: f32[8,128], c: f32[6,8,72]) -> f32[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  %c = f32[6,8,72]{2,1,0:T(8,128)} parameter(2)
  %fetch = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %near = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%fetch)
  %first = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%near), kind=kCustom, calls=%start
  %all = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%first), index=1
  %second = (f32[8,128]{1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)(2,1)}) fusion(%near, %all, %b), kind=kCustom, calls=%carry
  %doubled = f32[8,128]{1,0:T(8,128)} get-tuple-element(%second), index=0
  %from = s32[]{:T(128)} constant(0)
  %begun = s32[]{:T(128)S(6)} copy(%from)
  %state = (s32[]{:T(128)}, f32[6,8,72]{2,1,0:T(8,128)}) tuple(%begun, %c)
  %loop = (s32[]{:T(128)}, f32[6,8,72]{2,1,0:T(8,128)}) while(%state), condition=%condition, body=%body
  %token = token[] after-all()
  %sending = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%doubled, %token), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %result = f32[8,128]{1,0:T(8,128)} slice(%doubled), slice={[0:8], [0:128]}
}
"""  # noqa: E501


def test_a_program_of_the_tpu_compiler_is_read():
    program = hlo.Program(TPU)
    found = sorted((c.kind, c.network, c.bytes, c.times, c.groups.tolist()) for c in program.collectives())
    assert found == [
        ("all-gather", False, 8 * 128 * 2, 1, [[0, 1, 2, 3]]),  # once, not once per fusion
        ("all-reduce", False, 8 * 72 * 4, 3, [[0, 1], [2, 3]]),  # 0, 2, 4
        ("all-reduce", True, 8 * 128 * 4, 1, []),
    ]
    assert not program.unknown_loops
    tile = 8 * 128 * 4
    fetched, gathered = tile / 2, 4 * tile / 2
    doubled = 2 * tile
    rounds = 3 * tile  # each round saves 72 columns, which fill 128, and rewrites nothing else
    sending, result = tile, 2 * tile
    scalars = 4 + 3 * 8 + 4  # %begun, %next in each round, %sending
    assert program.traffic() == fetched + gathered + doubled + rounds + sending + result + scalars


def test_traffic_of_simple_programs_is_what_they_read_and_write():
    def traffic(function, *shapes):
        return hlo.Program(jax.jit(function).lower(*shapes).compile().as_text()).traffic()

    n = 256 * 256 * 4
    assert traffic(lambda a, b: a @ b, shape(256, 256), shape(256, 256)) == 3 * n
    assert traffic(lambda a, b: jnp.tanh(a + b), shape(256, 256), shape(256, 256)) == 3 * n  # one fusion
    # Each layer reads its own weights only: were it all of them, these alone would be 49 n. (The copies are the CPU compiler's.)
    layers = traffic(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], shape(256, 256), shape(7, 256, 256))
    assert 7 * 3 * n <= layers <= 7 * 8 * n


# ---- The roofline ----


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"), ("NVIDIA L4", "L4"), ("Tesla T4", "T4"), ("NVIDIA L40S", None),
        ("NVIDIA GH200 480GB", None), ("NVIDIA H200 NVL", None), ("NVIDIA GB200", None), ("NVIDIA A100 80GB PCIe", None), ("cpu", None),
        ("NVIDIA H100 PCIe", None), ("TPU v5 something", None),
    ],
)  # fmt: skip
def test_a_chip_is_found_by_what_jax_calls_it(kind, name):
    found = perf.chip(kind)
    assert (found and found.name) == name


def test_the_slowest_resource_sets_the_step():
    network = perf.CollectiveCost("all-reduce", ("slices",), 1e9, 0.3, network=True)
    links = [perf.CollectiveCost("all-gather", ("fsdp",), 1e9, 0.02), perf.CollectiveCost("all-reduce", ("data",), 1e9, 0.01)]
    line = perf.roofline(V5E, 16, int(16 * 0.15 * V5E.flops), int(16 * 0.2 * V5E.flops), 0.1 * V5E.bandwidth, links)
    assert line.limit == "compute" and line.step_seconds == pytest.approx(0.2) and line.mfu == pytest.approx(0.75)
    assert line.seconds["links"] == pytest.approx(0.03) and line.intensity == pytest.approx(2 * line.ridge)
    slow = perf.roofline(V5E, 16, int(16 * 0.15 * V5E.flops), int(16 * 0.2 * V5E.flops), 0.1 * V5E.bandwidth, [*links, network])
    assert slow.limit == "network" and slow.mfu == pytest.approx(0.5)
