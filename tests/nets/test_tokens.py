"""The token transformer: the published parameter counts, what each part sees, and its use as the network of a Joint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import integers, normal
from filled import filled
from jax.sharding import PartitionSpec as P

from mmdiff import losses, sampling, times
from mmdiff.contrastive import contrast, inter, intra
from mmdiff.experiment import initialiser
from mmdiff.nets import TextEncoder, TokenTransformer, cdcd
from mmdiff.nets.layers import CrossAttention, layer_norm
from mmdiff.nets.tokens import MLP, Block
from mmdiff.processes import Given, Joint, absorbing
from mmdiff.training import sharding
from mmdiff.training.step import make_step

B, K, T = 4, 5, 10
TOKENS = integers(0, (B, 16), 0, K + 1)
X = {
    "tokens": TOKENS,
    "label": jnp.asarray([0, 1, 2, 3]),
    "text": jnp.asarray([[1, 2, 0], [3, 4, 5], [0, 0, 0], [2, 2, 2]]),
    "features": normal(1, (B, 3, 6)),
}
TIMES = {"tokens": jnp.asarray([0.1, 0.3, 0.7, 1.0]), "label": jnp.zeros(B), "text": jnp.zeros(B)}
SMALL = dict(classes=K, grid=(4, 4), depth=2, width=16, heads=2)
KINDS = {
    "alone": dict(),
    "label": dict(labels=4, times=T, conv=True),
    "features": dict(context=("features",), times=T, mlp_ratio=2),
    "text": dict(context=("text",), encoder=TextEncoder(6, 3, depth=1, width=8, heads=2), patch=2),
}


def net_of(kind, **options):
    return TokenTransformer(**{**SMALL, **KINDS[kind], **options})


@functools.cache
def weights(kind):
    return filled(net_of(kind), X, TIMES)


@functools.cache
def compiled(net):
    return jax.jit(net.apply)


def run(net, params, x=X, t=TIMES):
    return compiled(net)(params, x, t)["tokens"]


@functools.cache
def reference(kind):
    return run(net_of(kind), weights(kind))


def leaves(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


# ------------------------------------------------------------------------------------------------------ the published sizes


def published(blocks, d, steps, k, positions, mlp, condition=None, labels=None):
    """Parameters by arithmetic, block by block as the paper's table describes them."""
    adaln = steps * d + (d * 2 * d + 2 * d)
    self_attention = 4 * (d * d + d)
    kind, ratio = mlp
    reach = {"fc": 1, "conv": 9}[kind]
    hidden = ratio * d
    feed = (reach * d * hidden + hidden) + (reach * hidden * d + d)
    block = adaln + self_attention + feed
    if condition:  # self-attention, cross-attention, and a plain LayerNorm before the MLP
        block += adaln + 2 * (d * d + d) + 2 * (condition * d + d) + 2 * d
    if labels:  # self-attention, and the class in the MLP's norm
        block += labels * d + (d * 2 * d + 2 * d)
    return (k + 1) * d + sum(positions) * d + blocks * block + 2 * d + (d * k + k)


SIZES = {
    "aist": (published(19, 1024, 80, 2048, (1, 1033), ("fc", 4), condition=1024), 407_199_744, "407.2"),
    "aist_2s": (published(19, 1024, 80, 2048, (1, 344), ("fc", 4), condition=1024), 406_494_208, "406.5"),
    "tiktok": (published(19, 1024, 100, 2048, (1, 344), ("fc", 4), condition=1024), 407_272_448, "407.3"),
    "coco": (published(18, 192, 80, 2887, (32, 32), ("conv", 2), condition=512), 35_798_407, "35.8"),
    "imagenet": (published(24, 512, 80, 974, (32, 32), ("conv", 4), labels=1000), 517_779_918, "517.8"),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    net = cdcd(size)
    length = net.grid[0] * net.grid[1]
    x = {
        "tokens": jnp.zeros((2, length), jnp.int32), "label": jnp.zeros(2, jnp.int32),
        "dance": jnp.zeros((2, 1, 1024)), "text": jnp.zeros((2, 77, 512)),
    }  # fmt: skip
    out, params = jax.eval_shape(net.init_with_output, jax.random.key(0), x, {"tokens": jnp.ones(2)})
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    formula, integer, printed = SIZES[size]
    assert count == formula == integer
    assert f"{count / 1e6:.1f}" == printed
    assert out["tokens"].shape == (2, length, net.classes) and out["tokens"].dtype == jnp.float32


def test_a_null_is_a_row_more_and_other_fields_can_be_replaced():
    def count(**options):
        net = cdcd("imagenet", width=64, depth=3, **options)
        x = {"tokens": jnp.zeros((1, 256), jnp.int32), "label": jnp.zeros(1, jnp.int32)}
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0), x, {"tokens": jnp.ones(1)})))

    assert count(labels=1001) - count() == 3 * 64
    with pytest.raises(ValueError, match="no CDCD network 'cub'; choose one of aist, aist_2s, tiktok, coco, imagenet"):
        cdcd("cub")


def test_initial_values():
    net = cdcd("imagenet", width=64, depth=1, scan=False)
    x = {"tokens": jnp.zeros((1, 256), jnp.int32), "label": jnp.zeros(1, jnp.int32)}
    key = jax.random.key(0, impl="rbg")  # its numbers take less time to compile
    params = leaves(jax.jit(net.init)(key, x, {"tokens": jnp.ones(1)}))
    for name, leaf in params.items():
        if name.endswith("bias"):
            assert not leaf.any(), name
        elif name.endswith("scale"):
            assert (leaf == 1).all(), name
        elif "/mlp/" in name:  # convolutions
            bound = 1 / np.sqrt(9 * leaf.shape[-2])
            assert 0.95 * bound < float(jnp.abs(leaf).max()) < 1.001 * bound, name
        else:
            assert abs(float(leaf.std()) - 0.02) < 0.002, name


# --------------------------------------------------------------------------------------------------------- what sees what


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_given_reaches_every_token(kind):
    net, plain = net_of(kind), reference(kind)
    assert plain.shape == (B, 16, K) and plain.dtype == jnp.float32 and np.isfinite(plain).all()
    moved = TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % (K + 1))
    others = [(X | {"tokens": moved}, TIMES), (X, TIMES | {"tokens": TIMES["tokens"][::-1]})]
    for name in (*(["label"] if net.labels else []), *net.context):
        others.append((X | {name: X[name][::-1]}, TIMES))
    for x, t in others:
        assert float(jnp.abs(run(net, weights(kind), x, t) - plain).max(-1).min()) > 1e-6
    # Examples do not see each other.
    backwards = run(net, weights(kind), *jax.tree.map(lambda a: a[::-1], (X, TIMES)))
    np.testing.assert_allclose(backwards[::-1], plain, atol=2e-5)


def test_permuted_positions_permute_the_output():
    net = TokenTransformer(**{**SMALL, "grid": (1, 16)}, times=T)
    params = filled(net, X, TIMES)
    order = np.random.default_rng(0).permutation(16)
    columns = params["params"]["columns"]["embedding"]
    moved = {"params": {**params["params"], "columns": {"embedding": columns[order]}}}
    out = run(net, moved, {"tokens": TOKENS[:, order]})
    np.testing.assert_allclose(out, run(net, params)[:, order], atol=2e-5)
    assert float(jnp.abs(run(net, params, {"tokens": TOKENS[:, order]}) - out).max()) > 1e-2  # the table does matter


def test_positions_of_a_wider_table():
    """The first tokens of a wider raster: two rows of the grid lie in one row of the table."""
    net = TokenTransformer(**SMALL, positions=(8, 8))
    grads = jax.jit(jax.grad(lambda p: (net.apply(p, X, TIMES)["tokens"] ** 2).sum()))(filled(net, X, TIMES))["params"]
    assert grads["rows"]["embedding"].shape == grads["columns"]["embedding"].shape == (8, 16)
    assert np.asarray(grads["rows"]["embedding"]).any(-1).tolist() == [True] * 2 + [False] * 6
    assert np.asarray(grads["columns"]["embedding"]).any(-1).all()


@pytest.mark.slow
def test_one_condition_token_is_added_to_all_positions():
    layer = CrossAttention(2)
    x, c = jax.random.normal(jax.random.key(0), (B, 7, 16)), jax.random.normal(jax.random.key(1), (B, 1, 6))
    params = filled(layer, x, c)
    out = jax.jit(layer.apply)(params, x, c)
    p = params["params"]
    value = (c @ p["kv"]["kernel"] + p["kv"]["bias"]).reshape(B, 1, 2, 2, 8)[..., 1, :].reshape(B, 1, 16)  # by head, then k, v
    expected = value @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    # As attention would have it: a second token, equal to the first, changes nothing.
    np.testing.assert_allclose(layer.apply(params, x, jnp.concatenate([c, c], 1)), jnp.broadcast_to(expected, x.shape), atol=1e-5)
    grads, to_x = jax.jit(jax.grad(lambda p, x: ((x + layer.apply(p, x, c)) ** 2).sum(), argnums=(0, 1)))(params, 0 * x)
    grads = grads["params"]
    keys, values = (grads["kv"]["kernel"].reshape(6, 2, 2, 8)[:, :, i] for i in (0, 1))
    assert not keys.any() and not grads["q"]["kernel"].any() and not grads["q"]["bias"].any() and values.any()
    np.testing.assert_allclose(to_x, jnp.broadcast_to(2 * expected, x.shape), atol=1e-4)


def test_a_modulation_of_zero_is_a_plain_norm():
    x, time, label = jax.random.normal(jax.random.key(0), (B, 7, 16)), jnp.arange(B), jnp.arange(B)
    modulated, plain = Block(2, times=T, labels=4), Block(2)
    params = filled(modulated, x, time, label)["params"]
    for name in ("attention_adaln", "mlp_adaln"):
        params[name] = jax.tree.map(np.zeros_like, params[name])
    bare = {name: params[name] for name in ("attention", "mlp")}
    bare |= {f"{name}_norm": {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)} for name in ("attention", "mlp")}
    apply = jax.jit(modulated.apply)
    np.testing.assert_allclose(apply({"params": params}, x, time, label)[0], jax.jit(plain.apply)({"params": bare}, x)[0], atol=1e-5)
    # Not zero: scale and shift are those of the row. The attention is switched off, the MLP's norm is modulated by the label.
    params = filled(modulated, x, time, label)["params"]
    params["attention"]["out"] = jax.tree.map(np.zeros_like, params["attention"]["out"])
    e = params["mlp_table"]["embedding"][2]
    scale, shift = np.split(e / (1 + np.exp(-e)) @ params["mlp_adaln"]["kernel"] + params["mlp_adaln"]["bias"], 2)
    expected = x[2:3] + MLP(4.0).apply({"params": params["mlp"]}, layer_norm(x[2:3]) * (1 + scale) + shift)
    np.testing.assert_allclose(apply({"params": params}, x, time, label)[0][2:3], expected, atol=1e-4)


def test_the_time_is_a_row_of_the_table():
    net, params = net_of("label"), weights("label")
    tables = {name: leaf for name, leaf in leaves(params).items() if name.endswith("attention_table/embedding")}
    assert [leaf.shape for leaf in tables.values()] == [(2, T, 16)]  # of two scanned blocks
    changed = jax.tree.map(np.copy, params)
    changed["params"]["blocks"]["attention_table"]["embedding"][:, 6] += 1.0  # the row of t = 7 / T
    moved = np.abs(run(net, changed) - reference("label")).max((1, 2)) > 1e-3
    assert moved.tolist() == [False, False, True, False]
    # In whatever way 7 / T was rounded.
    for t in (np.float32(7) / np.float32(T), np.nextafter(np.float32(7 / T), np.float32(0))):
        np.testing.assert_array_equal(run(net, params, X, TIMES | {"tokens": TIMES["tokens"].at[2].set(t)}), reference("label"))


@pytest.mark.parametrize("t", [0.0, -0.2, 1.2, float("nan")])
def test_times_without_a_row_are_refused(t):
    with pytest.raises(ValueError, match="the time, counted in steps of 1/10"):
        net_of("label").apply(weights("label"), X, {"tokens": jnp.full(B, t)})


def test_a_convolution_sees_its_neighbours():
    layer = MLP(2.0, grid=(7, 7))
    x = jax.random.normal(jax.random.key(0), (1, 49, 4))
    params = filled(layer, x)
    change = layer.apply(params, x.at[0, 3 * 7 + 2].add(1.0)) - layer.apply(params, x)
    seen = np.abs(np.asarray(change)).reshape(7, 7, 4).max(-1) > 1e-6
    expected = np.zeros((7, 7), bool)
    expected[1:6, 0:5] = True  # two layers of 3x3
    np.testing.assert_array_equal(seen, expected)


def test_patches_are_squares_of_the_grid():
    net = TokenTransformer(**SMALL, patch=2, scan=False)
    params = filled(net, X, TIMES)
    for i in range(2):  # without the blocks a patch sees itself alone
        for part in ("attention", "mlp"):
            params["params"][f"block_{i}"][part]["out"] = jax.tree.map(np.zeros_like, params["params"][f"block_{i}"][part]["out"])
    out = run(net, params)
    for place, states in ((0, (0, 1)), (5, (2, 4)), (11, (3, K))):
        pair = [run(net, params, {"tokens": TOKENS.at[:, place].set(state)}) for state in states]
        seen = np.abs(pair[1] - pair[0]).max((0, 2)) > 1e-4
        r, c = place // 4 // 2, place % 4 // 2
        expected = np.zeros((4, 4), bool)
        expected[2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = True
        np.testing.assert_array_equal(seen.reshape(4, 4), expected)
    # Every place of a patch has an embedding and an output of its own.
    turned = run(net, params, {"tokens": TOKENS.reshape(B, 4, 4).swapaxes(1, 2).reshape(B, 16)})
    assert float(jnp.abs(turned.reshape(B, 4, 4, K).swapaxes(1, 2).reshape(B, 16, K) - out).max()) > 1e-2


# ------------------------------------------------------------------------------------------------------------- text


@pytest.mark.slow
def test_the_encoder_learns_unless_it_is_frozen():
    def gradient(freeze):
        net = net_of("text", encoder=TextEncoder(6, 3, depth=1, width=8, heads=2, freeze=freeze))
        return jax.jit(jax.grad(lambda p: (net.apply(p, X, TIMES)["tokens"] ** 2).mean()))(weights("text"))["params"]

    free, frozen = gradient(False), gradient(True)
    for name, leaf in leaves(frozen["encoder"]).items():
        assert not leaf.any(), name
    for name, leaf in leaves(free["encoder"]).items():
        assert leaf.any(), name
    rest = [{name: leaf for name, leaf in tree.items() if name != "encoder"} for tree in (free, frozen)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *rest)


def test_text_features():
    ids = X["text"]
    encoder = TextEncoder(6, 3, depth=1, width=8, heads=2, scan=False)
    params = filled(encoder, ids)
    apply = jax.jit(encoder.apply)
    out = apply(params, ids)
    assert out.shape == (B, 3, 8)
    unit = jax.jit(encoder.copy(normalise=True).apply)(params, ids)
    np.testing.assert_allclose((unit**2).sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(unit, out / np.sqrt((out**2).sum(-1, keepdims=True)), atol=1e-5)
    # Order and padding matter, other texts do not.
    assert float(jnp.abs(apply(params, ids[:, ::-1]) - out)[0].max()) > 1e-2
    assert float(jnp.abs(out[0, 2] - out[2, 2]).max()) > 1e-2
    np.testing.assert_allclose(apply(params, ids[::-1])[::-1], out, atol=1e-5)
    with pytest.raises(ValueError, match="text must lie in 0..5, got values from 0 to 6"):
        encoder.apply(params, ids.at[0, 0].set(6))
    with pytest.raises(ValueError, match="takes 3 ids a text, not"):
        encoder.apply(params, ids[:, :2])


# ------------------------------------------------------------------------------------------------- switches, use, mistakes


@pytest.mark.parametrize("kind", ["label", pytest.param("text", marks=pytest.mark.slow)])
def test_scan_and_remat_do_not_change_the_gradient(kind):
    def gradient(params, **options):
        net = net_of(kind, **options)
        return jax.jit(jax.grad(lambda p: (net.apply(p, X, TIMES)["tokens"] ** 2).mean()))(params)

    def unstacked(tree):
        inner = dict(tree["params"])
        blocks = inner.pop("blocks")
        return {"params": inner | {f"block_{i}": jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(2)}}

    plain = gradient(weights(kind))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, gradient(weights(kind), remat="full"), plain)
    jax.tree.map(close, gradient(unstacked(weights(kind)), scan=False, remat="dots"), unstacked(plain))


@pytest.mark.parametrize("kind", ["label", "text"])
def test_bfloat16_activations_keep_float32_parameters(kind):
    options = {"dtype": jnp.bfloat16}
    if kind == "text":
        options["encoder"] = TextEncoder(6, 3, depth=1, width=8, heads=2, dtype=jnp.bfloat16)
    net = net_of(kind, **options)
    start = jax.eval_shape(net.init, jax.random.key(0), X, TIMES)
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype("float32")}
    out = run(net, weights(kind))
    assert out.dtype == jnp.float32
    assert float(jnp.abs(out - reference(kind)).max() / jnp.abs(reference(kind)).max()) < 0.05


def test_it_is_the_network_of_a_joint():
    process = Joint(tokens=absorbing(K), label=Given(null=4), text=Given(null=0))
    net = net_of("text", depth=1, scan=False, labels=5, encoder=TextEncoder(6, 3, depth=1, width=8, heads=2, scan=False))
    shape = {"tokens": (16,), "label": (), "text": (3,)}
    assert jax.eval_shape(initialiser(net, process, shape), jax.random.key(0))  # shown the nulls
    params = filled(net, X, TIMES)
    given = {"label": X["label"], "text": X["text"]}
    batch = {"tokens": TOKENS % K, **given, "index": jnp.arange(B, dtype=jnp.uint32)}
    rule = times.joint(tokens=times.uniform(), label=times.constant(0.0), text=times.uniform())
    loss = losses.diffusion(process, net.apply, rule, {"ce": (1.0, losses.on("tokens", process.parts["tokens"].loss))})
    value, grads = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, jax.random.key(0))[0]))(params)
    assert value > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    draw = sampling.make_sampler(process, net.apply, shape, drop=("label", "text"))
    out = jax.jit(functools.partial(draw, steps=2, guidance=1.5))(params, jax.random.split(jax.random.key(0), B), given)
    assert out["tokens"].shape == (B, 16) and int(out["tokens"].max()) < K
    np.testing.assert_array_equal(out["text"], X["text"])


def test_mistakes_are_named():
    with pytest.raises(KeyError, match="no input for .*label"):
        net_of("label").apply(weights("label"), {"tokens": TOKENS}, TIMES)
    with pytest.raises(ValueError, match="label must lie in 0..3, got values from 0 to 4"):
        net_of("label").apply(weights("label"), X | {"label": jnp.asarray([0, 1, 2, 4])}, TIMES)
    with pytest.raises(ValueError, match="tokens must lie in 0..5"):
        net_of("label").apply(weights("label"), X | {"tokens": TOKENS + K}, TIMES)
    with pytest.raises(ValueError, match="a grid of 4x4 needs 16 tokens, not"):
        net_of("alone").apply(weights("alone"), {"tokens": TOKENS[:, :12]}, TIMES)
    with pytest.raises(ValueError, match="patches of 3x3 do not tile a grid of 4x4 tokens"):
        net_of("alone", patch=3).init(jax.random.key(0), X, TIMES)
    with pytest.raises(ValueError, match="a position table of 2x4 is too small for 16 tokens"):
        net_of("alone", positions=(2, 4)).init(jax.random.key(0), X, TIMES)


@pytest.mark.parametrize("scan", [True, False])
def test_heads_and_hidden_units_are_split_over_the_tensor_axis(scan):
    net = TokenTransformer(
        **{**SMALL, "width": 64, "heads": 4}, labels=4, times=T, conv=True, context=("text",), scan=scan,
        encoder=TextEncoder(6, 3, depth=1, width=64, heads=4, scan=scan))  # fmt: skip
    params = jax.eval_shape(net.init, jax.random.key(0), X, TIMES)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    found = leaves(sharding.partition_specs({"ema": params}, sharding.TRANSFORMER_RULES, mesh, min_size=2**8))
    block, layer = ("blocks", [None]) if scan else ("block_1", [])
    grid = [None, None]
    wanted = {
        "attention/qkv/kernel": P(*layer, "fsdp", "tensor"), "attention/qkv/bias": P(*layer, "tensor"),
        "cross/q/kernel": P(*layer, "fsdp", "tensor"), "cross/kv/kernel": P(*layer, "fsdp", "tensor"), "cross/kv/bias": P(*layer, "tensor"),
        "attention/out/kernel": P(*layer, "tensor", "fsdp"), "cross/out/kernel": P(*layer, "tensor", "fsdp"),
        "mlp/in/kernel": P(*layer, *grid, "fsdp", "tensor"), "mlp/in/bias": P(*layer, "tensor"),
        "mlp/out/kernel": P(*layer, *grid, "tensor", "fsdp"), "attention_adaln/kernel": P(*layer, "tensor", "fsdp"),
        "cross_adaln/kernel": P(*layer, "tensor", "fsdp"), "mlp_adaln/kernel": P(*layer, "tensor", "fsdp"),
    }  # fmt: skip
    for end, spec in wanted.items():
        assert found[f"ema/params/{block}/{end}"] == spec, end
    encoder = f"ema/params/encoder/{'blocks' if scan else 'block_0'}"
    assert found[f"{encoder}/attention/qkv/kernel"] == P(*layer, "fsdp", "tensor")
    assert found[f"{encoder}/mlp/out/kernel"] == P(*layer, "tensor", "fsdp")


@pytest.mark.slow
def test_the_step_is_the_same_on_every_mesh():
    """Negatives from the batch, too: they come from all of it."""
    process = Joint(tokens=absorbing(K), label=Given(null=4), text=Given(null=0))
    net = TokenTransformer(
        **{**SMALL, "width": 32, "heads": 4}, labels=5, times=T, conv=True, context=("text",),
        encoder=TextEncoder(6, 3, depth=1, width=32, heads=4))
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, K, (16, 16)).astype(np.int32), "label": rng.integers(0, 4, 16).astype(np.int32),
        "text": rng.integers(0, 6, (16, 3)).astype(np.int32), "index": np.arange(16, dtype=np.uint32),
    }  # fmt: skip
    shapes = jax.eval_shape(net.init, jax.random.key(0), {name: batch[name][:1] for name in process.parts}, {"tokens": jnp.ones(1)})
    rule = times.joint(tokens=times.on_grid(T), label=times.constant(0.0), text=times.constant(0.0))
    tokens = process.parts["tokens"]
    loss = losses.diffusion(process, net.apply, rule, {
        "vlb": (1.0, losses.on("tokens", losses.vlb(tokens, T))),
        "step": (0.1, losses.on("tokens", contrast(tokens, losses.vlb(tokens, T), intra(chunks=4, count=2)))),
        "sample": (0.1, losses.on("tokens", contrast(tokens, losses.x0_ce(tokens), inter(4)))),
    })  # fmt: skip

    def init(key):
        return jax.tree.map(lambda leaf: 0.1 * jnp.sin(7.0 * jnp.arange(leaf.size)).reshape(leaf.shape), shapes)

    def step(axes):
        mesh = sharding.make_mesh(axes, jax.devices()[: int(np.prod([*axes.values(), 1]))])
        optimizer = optax.sgd(1.0)
        state = sharding.abstract_state(init, optimizer, mesh, sharding.TRANSFORMER_RULES)
        program = sharding.lower_step(make_step(loss, optimizer), state, batch, mesh).compile()
        start = sharding.init_sharded_state(init, optimizer, jax.random.key(0), mesh, sharding.TRANSFORMER_RULES)
        state, metrics = program(start, sharding.shard_batch(batch, mesh))
        return jax.device_get(state.params), jax.device_get(metrics)

    wanted, wanted_metrics = step({})
    for axes in ({"tensor": 4, "data": 2}, {"seq": 2, "fsdp": 2, "tensor": 2}):
        found, metrics = step(axes)
        for name in wanted_metrics:
            np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=1e-5, err_msg=name)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, wanted)
