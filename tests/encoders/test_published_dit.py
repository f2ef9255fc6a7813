"""DiT, SiT, LightningDiT, JiT and iMF in their published layouts: the published functions, to 1e-10, and round trips bit for bit."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from mmdiff import nets
from mmdiff.convert import diffusers_dit, layouts, published_dit, published_mit
from mmdiff.convert.kinds import KINDS, STARTS, check_network, differences, kind_of
from mmdiff.convert.tensors import Tensor
from mmdiff.errors import UserError

STEPS, TIMES, LABELS = np.array([0, 250, 999]), np.array([0.0, 0.3, 1.0]), np.array([0, 3, 10])
GOLDEN = published.golden("dit")
SIZES = dict(depth=2, width=32, heads=4)
FIELDS = {"dit": {"time_offset": -1.0}, "sit": {"time_scale": -1.0, "time_offset": 1.0}}
LIGHTNING, JIT, IMF = (published.golden(name) for name in ("lightningdit", "jit", "imf"))


def net_of(kind, **fields):
    return nets.DiT(nets.Patches(8, 8, 4, 2, 8), 10, **{**SIZES, **FIELDS[kind], **fields})


def shapes_of(net):
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.ones(1), jnp.zeros(1, int))["params"]


def stored(golden):
    """A golden file's state dict, key -> array."""
    shapes = {key: tuple(map(int, shape.split())) for key, shape in zip(golden["keys"].tolist(), golden["shapes"].tolist())}
    return {key: published.weight(key, shape) for key, shape in shapes.items()}


@functools.cache
def weights():
    return stored(GOLDEN) | {"pos_embed": published_dit.sincos_positions(net_of("dit"))}


def tensors(arrays):
    return {key: Tensor.of(array) for key, array in arrays.items()}


def loaded(kind, net, arrays=None, layout=None):
    return layouts.load(layout or KINDS[kind].layout, net, shapes_of(net), tensors(weights() if arrays is None else arrays), "it.pt")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype and found[key].shape == array.shape and found[key].flags.c_contiguous
        np.testing.assert_array_equal(found[key].view(np.uint8), np.ascontiguousarray(array).view(np.uint8), err_msg=key)


def ours(kind, params, net, dtype):
    x = jnp.asarray(published.normal("z", (3, 4, 8, 8)).transpose(0, 2, 3, 1), dtype)
    t = jnp.asarray((STEPS + 1) / 1000 if kind == "dit" else 1 - TIMES, dtype)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    out = np.asarray(jax.jit(net.copy(dtype=dtype).apply)({"params": params}, x, t, jnp.asarray(LABELS))).transpose(0, 3, 1, 2)
    return out if kind == "dit" else -out[:, :4]  # SiT's velocity is that from noise to data


@pytest.mark.parametrize("kind, scan", [("dit", True), ("dit", False), ("sit", True)])
def test_the_published_function_and_its_weights_back(kind, scan):
    net = net_of(kind, scan=scan)
    params = loaded(kind, net)
    assert_same(layouts.state_dict(KINDS[kind].layout, net, params), weights())
    with jax.enable_x64(True):
        published.assert_close(ours(kind, params, net, jnp.float64), GOLDEN[kind], 1e-10)
    if scan:
        published.assert_close(ours(kind, params, net, jnp.float32), GOLDEN[kind])


def test_lightningdit_s_function_and_its_weights_back():
    """Its rotary tables are float32."""
    fields = dict(norm="rms", mlp="swiglu", rope=True)
    net = nets.DiT(nets.Patches(8, 8, 4, 2), 10, **SIZES, **FIELDS["sit"], **fields)
    arrays = stored(LIGHTNING) | published_dit.rotary_tables(net) | {"pos_embed": published_dit.sincos_positions(net)}
    params = loaded("lightningdit", net, arrays)
    assert_same(layouts.state_dict(KINDS["lightningdit"].layout, net, params), arrays)
    with jax.enable_x64(True):
        published.assert_close(ours("sit", params, net, jnp.float64), LIGHTNING["lightningdit"], 1e-6)
    assert kind_of(net) == "lightningdit" and kind_of(net.copy(rope=False)) is None and kind_of(net_of("sit", rope=True)) is None
    wrong = arrays | {"feat_rope.freqs_cos": arrays["feat_rope.freqs_sin"]}
    with pytest.raises(UserError, match=r"feat_rope.freqs_cos \[16, 8\] is not the table of rotary positions"):
        loaded("lightningdit", net, wrong)


@pytest.mark.parametrize("scan", [True, False])
def test_jit_s_function_and_its_weights_back(scan):
    """Its tokens of the label come in behind the first of three blocks."""
    fields = dict(norm="rms", mlp="swiglu", rope=True, qk_norm=True, in_context=(3, 1), scan=scan)
    net = nets.DiT(nets.Patches(8, 8, 3, 2, bottleneck=5), 10, **{**SIZES, **FIELDS["sit"], **fields, "depth": 3})
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.ones(1), jnp.zeros(1, int))["params"]
    arrays = stored(JIT) | {"net.pos_embed": published_dit.sincos_positions(net)}
    params = layouts.load(published_dit.JIT, net, shapes, tensors(arrays), "it.pt")
    assert_same(layouts.state_dict(published_dit.JIT, net, params), arrays)
    if not scan:
        return
    x = published.normal("pixels", (3, 3, 8, 8)).transpose(0, 2, 3, 1)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, params)
        out = jax.jit(net.copy(dtype=jnp.float64).apply)({"params": wide}, np.float64(x), 1 - TIMES, LABELS)
        published.assert_close(np.asarray(out).transpose(0, 3, 1, 2), JIT["jit"], 1e-6)  # rotary tables are float32
    assert kind_of(net) == "jit"


@pytest.mark.parametrize("velocity", [True, False])
def test_imf_s_function_and_its_weights_back(velocity):
    """And what sampling needs, without the head of velocities."""
    net = nets.MiT(
        nets.Patches(8, 8, 4, 2), 10, head_depth=1, guidance=7.5, interval=(0.4, 0.65), velocity=velocity, **{**SIZES, "depth": 3})
    x = {"image": published.normal("z", (3, 4, 8, 8)).transpose(0, 2, 3, 1), "label": LABELS}
    t = {"image": np.array([1.0, 0.7, 0.4]), "image/end": np.array([0.0, 0.7, 0.1])}
    shapes = jax.eval_shape(net.init, jax.random.key(0), *jax.tree.map(jnp.asarray, (x, t)))["params"]
    arrays = {key: array for key, array in stored(IMF).items() if velocity or "v_heads" not in key}
    params = layouts.load(published_mit.IMF, net, shapes, tensors(arrays), "it.pth")
    ours = {key: array for key, array in arrays.items() if velocity or "v_final" not in key}
    assert_same(layouts.state_dict(published_mit.IMF, net, params), ours)
    assert kind_of(net) == "imf"
    if velocity:
        with jax.enable_x64(True):
            wide, inputs = jax.tree.map(np.float64, params), {**x, "image": np.float64(x["image"])}
            out = jax.jit(net.copy(dtype=jnp.float64).apply)({"params": wide}, inputs, t)
            for name, answer in ("image", "average"), ("image/velocity", "velocity"):
                published.assert_close(np.asarray(out[name]).transpose(0, 3, 1, 2), IMF[answer], 1e-6)


@pytest.mark.parametrize("name, times", [("t_min_tokens", 2), ("omega_tokens", 2), ("attn.k_proj", 2), ("mlp.w3", 3)])
def test_parts_of_imf_that_are_of_another_size_are_refused(name, times):
    """And are not cut to what fits."""
    arrays = {key: np.concatenate([array] * times) if name in key else array for key, array in stored(IMF).items()}
    with pytest.raises(UserError, match=r"one product or table here have the shapes \[.*\] and \[.*\]: they are of another network"):
        published_mit.read(tensors(arrays), nets.MiT(nets.Patches(8, 8, 4, 2), 10, head_depth=1, **SIZES))


def test_diffusers_layout_has_the_same_weights():
    net = net_of("dit")
    params = loaded("dit", net)
    arrays = layouts.state_dict(diffusers_dit.DIFFUSERS, net, params)
    assert len(arrays) == 2 + 2 * 2 + 2 * 19
    for kind in ("dit", "diffusers-dit"):
        jax.tree.map(np.testing.assert_array_equal, loaded(kind, net, arrays), params)
    assert_same(layouts.state_dict(diffusers_dit.DIFFUSERS, net, loaded("dit", net, arrays)), arrays)
    arrays["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"] = np.zeros((11, 32), np.float32)
    with pytest.raises(UserError, match="transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight is not transformer_blocks.0"):
        loaded("dit", net, arrays)


def test_depth_28_has_the_published_number_of_tensors():
    net = net_of("dit", depth=28)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes_of(net))
    assert [len(layouts.state_dict(layout, net, zeros)) for layout in (published_dit.DIT, diffusers_dit.DIFFUSERS)] == [292, 538]


def changed(**arrays):
    return weights() | {name.replace("__", "."): array for name, array in arrays.items()}


@pytest.mark.parametrize("arrays, fields, words", [
    (lambda: changed(pos_embed=np.zeros((1, 16, 32), np.float32)), {}, "pos_embed .* is not the table of sines and cosines"),
    (lambda: changed(y_embedder__embedding_table__weight=np.zeros((6, 32), np.float32)), {}, r"embedding_table.weight \[6, 32\] for \[11"),
    (lambda: changed(blocks__2__attn__proj__bias=np.zeros(32, np.float32)), {}, "has blocks.2.attn.proj.bias"),
    (lambda: {key: array for key, array in weights().items() if "fc1" not in key}, {}, "lacks blocks.0.mlp.fc1.bias"),
    (weights, {"depth": 3}, "lacks blocks.2"),
    (weights, {"heads": 8, "width": 64}, "it holds weights of another size"),
    (weights, {"qk_norm": True}, "no place for the parameters blocks/attention/k_norm/scale"),
])  # fmt: skip
def test_other_weights_are_refused(arrays, fields, words):
    with pytest.raises(UserError, match=words):
        loaded("dit", net_of("dit", **fields), arrays())


def test_a_network_of_another_function_is_refused():
    assert kind_of(net_of("dit")) == "dit" and kind_of(net_of("sit")) == "sit"
    assert kind_of(net_of("dit", freq_shift=1.0, mlp_norm_eps=1e-5)) == "diffusers-dit"
    assert kind_of(net_of("dit", qk_norm=True)) is None and differences(KINDS["dit"], object()) is None
    with pytest.raises(UserError, match=r"with time_offset=-1.0 \(here 0.0\)"):
        check_network("dit", net_of("dit", time_offset=0.0), "mine.py")
    with pytest.raises(UserError, match="mine.py has the network NoneType, and weights of the kind sit are for DiT"):
        check_network("sit", None, "mine.py")
    with pytest.raises(UserError, match="no weights of the kind 'dti': choose one of dit, "):
        check_network("dti", None, "mine.py")


def test_a_dual_stream_begins_as_dit_without_a_class():
    """Whatever the caption; the query's MLP is the image's. The last golden output is of the null class."""
    net = nets.DualStream(
        nets.Patches(8, 8, 4, 2), nets.Vectors(6, 3), 6, shared=1, head_depth=1, fusion="shared", scan=True, **SIZES, **FIELDS["dit"])
    assert check_network("dit", net, "it") is STARTS["dit"]
    x = {"image": jnp.asarray(published.normal("z", (3, 4, 8, 8))[[2, 2]].transpose(0, 2, 3, 1), jnp.float32),
         "text": jnp.ones((2, 3, 6)), "query": jnp.ones((2, 6))}
    t = {"image": jnp.full(2, 1.0), "text": jnp.array([0.0, 1.0]), "query": jnp.ones(2)}
    abstract = jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]
    found = flax.traverse_util.flatten_dict(layouts.load(STARTS["dit"].layout, net, abstract, tensors(weights()), "it.pt"))
    rest = flax.traverse_util.flatten_dict(abstract)
    params = {path: found.get(path, np.full(leaf.shape, 0.1, np.float32)) for path, leaf in rest.items()}  # what is new is no zero
    copied, image = (params["trunk", "blocks", f"{name}_mlp", "in", "kernel"] for name in ("query", "image"))
    np.testing.assert_array_equal(copied, image)
    assert 0 < len(found) < len(params) and not any(path[0] in ("head", "text_in", "query_out") for path in found)
    out = jax.jit(functools.partial(net.apply, tasks=("generate",)))({"params": flax.traverse_util.unflatten_dict(params)}, x, t)["image"]
    published.assert_close(out.transpose(0, 3, 1, 2), GOLDEN["dit"][[2, 2], :4])
    with pytest.raises(UserError, match="fusion=shared .here mmdit"):
        check_network("dit", net.copy(fusion="mmdit"), "it")
    without = {key: array for key, array in weights().items() if "y_embedder" not in key}
    with pytest.raises(UserError, match="they are not DiT's"):
        layouts.load(STARTS["dit"].layout, net, abstract, tensors(without), "it.pt")
