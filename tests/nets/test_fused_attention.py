"""The TPU's attention kernels, interpreted on the CPU, against the reference; and what their compiled form moves."""

import importlib.util

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from filled import filled
from jax.sharding import SingleDeviceSharding
from tiers import some

from mmdiff.nets import DiT, Label, MMDiT, Patches, as_joint, fused_attention, fused_norm, long_attention
from mmdiff.nets.attention import attention, self_attention
from mmdiff.nets.layers import cut, join, layer_norm, modulate
from mmdiff.nets.target import compiling_for
from mmdiff.nets.transformer import REMAT
from mmdiff.training import aot, hlo, sharding
from mmdiff.training.accumulation import make_gradient

RNG = np.random.default_rng(0)


def close(found, expected, bound):
    """Every array within `bound` of its largest value."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=bound * np.abs(other).max())


def with_gradients(function, arrays, gradient):
    def both(*arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(gradient.astype(out.dtype))

    return jax.jit(both)(*arrays)


def compared(function, arrays, gradient, half):
    """float32 to 2e-6, and arrays rounded to bfloat16 to 5e-3, against the reference in float32."""
    if half:
        arrays = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in arrays]
        gradient = gradient.astype(jnp.bfloat16).astype(jnp.float32)
    expected = with_gradients(lambda *x: function(*x, backend="reference"), arrays, gradient)
    rounded = [x.astype(jnp.bfloat16 if half else jnp.float32) for x in arrays]
    found = with_gradients(lambda *x: function(*x, backend="pallas"), rounded, gradient)
    assert all(one.dtype == two.dtype for one, two in zip(found[1], rounded))
    close(found, expected, 5e-3 if half else 2e-6)


# Each shape is compiled; those of every head width, of tokens that fill no tile, and of heads that form several groups.
@pytest.mark.parametrize("b, n, heads, size, half", [
    (2, 9, 1, 64, False), (1, 130, 6, 8, False), (2, 16, 2, 72, False), (1, 24, 3, 96, False), (1, 16, 8, 12, False), (2, 40, 5, 72, True),
])  # fmt: skip
def test_of_tokens_to_each_other(b, n, heads, size, half):
    # A bias is added in the arrays' own type, as in the reference; the rounding of that sum is not what is looked at.
    arrays = [normal(0, (b, n, 3 * heads * size)), normal(1, (3 * heads * size,), 0.0 if half else 1.0)]
    compared(lambda qkv, bias, backend: self_attention(qkv, bias, heads, backend), arrays, normal(2, (b, n, heads * size)), half)


@pytest.mark.parametrize("b, n, m, heads, size, masked, half", [
    (3, 5, 21, 2, 16, True, False), (1, 40, 9, 2, 128, False, False), (2, 300, 450, 1, 8, True, False), (2, 48, 21, 2, 72, True, True),
])  # fmt: skip
def test_of_other_keys_and_masks(b, n, m, heads, size, masked, half):
    q, k, v = normal(0, (b, n, heads, size)), normal(1, (b, m, heads, size)), normal(2, (b, m, heads, size))
    mask = RNG.random((b, 1, 1, m)) < 0.5
    mask[0] = False  # without any key: the mean over all of them
    mask = jnp.asarray(mask) if masked else None
    compared(lambda *x, backend: attention(*x, mask, backend), [q, k, v], normal(3, q.shape), half)
    assert (len(fused_attention._chunks(n, m)) > 1) == (n * m > 2**17)


def test_of_many_tokens_on_a_mesh():
    """Lengths that fill no block, masks, an example without any key; rematerialised, on fsdp 2 x tensor 2."""
    arrays = [normal(i, (2, length, 2, 8)) for i, length in enumerate((130, 200, 200))]
    mask = RNG.random((2, 1, 1, 200)) < 0.5
    mask[1] = False

    def both(backend):
        attend = jax.checkpoint(lambda *x: attention(*x, jnp.asarray(mask), backend), policy=REMAT["some"])
        return with_gradients(attend, arrays, normal(3, arrays[0].shape))

    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    with sharding.compiling_for_mesh(mesh):
        found = jax.device_get(both("splash"))
    close(found, both("reference"), 2e-6)
    with pytest.raises(ValueError, match=r'"splash" takes masks \[B, 1, 1, M\] of keys'):
        attention(*arrays, jnp.ones((130, 200), bool), "splash")
    assert [long_attention._block(length) for length in (100, 1024, 1281, 4096)] == [128, 1024, 768, 1024]


@pytest.mark.parametrize("lengths, half", [((5,), False), ((300, fused_norm.ROWS, 2 * fused_norm.ROWS - 300), False), ((8, 1), True)])
def test_norm_and_modulation(lengths, half):
    """Of one part and of several, which begin within what is in work at a time."""
    arrays = [1 + normal(0, (2, sum(lengths), 24)), normal(1, (2, len(lengths), 24)), normal(2, (2, len(lengths), 24))]

    def both(x, shift, scale, backend):
        shifts, scales = ([each[:, i] for i in range(len(lengths))] for each in (shift, scale))
        if backend == "pallas":
            out, passed = fused_norm.norm_and_modulation(x, shifts, scales, 1e-6, lengths)
        else:
            out, passed = join(list(map(modulate, cut(layer_norm(x, 1e-6), lengths), shifts, scales))), x
        return out + passed  # both take part in the gradient

    compared(both, arrays, normal(3, arrays[0].shape), half)


def test_it_takes_masks_of_keys_alone():
    x = jnp.zeros((2, 4, 2, 8))
    with pytest.raises(ValueError, match=r"takes masks \[B, 1, 1, M\] of keys, not \(4, 4\)"):
        attention(x, x, x, jnp.ones((4, 4), bool), "pallas")


def test_where_it_is_taken_by_itself():
    def taken(shape=(4, 256, 2, 64), keys=256, platform="tpu", axes={}, dtype=jnp.bfloat16, mask=None, by=fused_attention):  # noqa: B006, E501
        with compiling_for(platform, axes=axes):
            return by.applies(jax.ShapeDtypeStruct(shape, dtype), keys, shape[-1], mask)

    assert taken() and taken(axes={"fsdp": 4, "tensor": 2}) and taken(keys=77, mask=jnp.ones((4, 1, 1, 77), bool))
    assert taken((4, 1024, 2, 12), 1101) and taken(dtype=jnp.float32)
    assert not taken(platform="cpu") and not taken(platform="gpu") and not taken(axes={"seq": 2})
    assert not taken(axes={"fsdp": 8}) and not taken(axes={"slices": 2, "data": 4})  # a device would have half an example
    assert not taken((4, 1, 2, 64)) and not taken((4, 4096, 2, 64)) and not taken(keys=4096) and not taken(dtype=jnp.float64)
    assert not taken(mask=jnp.ones((4, 1, 256, 256), bool))
    assert taken((4, 1281, 2, 72), 1281, by=long_attention)
    assert taken((4, 4096, 2, 64), 128, by=long_attention, mask=jnp.ones((4, 1, 1, 128), bool))
    assert not taken((4, 4096, 2, 64), 77, by=long_attention) and not taken((4, 4096, 2, 12), 4096, by=long_attention)
    assert not taken(by=long_attention) and not taken((4, 4096, 2, 64), 4096, by=long_attention, axes={"seq": 2})
    assert not fused_attention.applies(jax.ShapeDtypeStruct((4, 256, 2, 64), jnp.bfloat16), 256, 64)  # eight devices of a CPU


def one_stream(**options):
    """One product of a self-attention, norms in kernels."""
    return as_joint(net := DiT(Patches(4, 4, 1, 2), 4, depth=2, width=32, heads=4, remat="dots", **options)), net


def two_streams(**options):
    """One attention over streams that have products of their own."""
    modalities = {"image": Patches(4, 4, 1, 2), "label": Label(5, 4)}
    return (net := MMDiT(modalities, depth=2, width=32, heads=4, remat="dots", **options)).apply, net


def wide_head(**options):
    return recipe(head=(1, 32), **options)


def recipe(head=None, **options):
    """Kernels for attention alone: norms and modulations are others."""
    modalities = {"image": Patches(4, 4, 1, 2, head=head), "label": Label(5, 4)}
    fields = dict(mlp_ratio=3.0, shared=True, norm="rms", mlp="swiglu", rope=True, qk_norm=True, shift=False, shared_adaln=True)
    return (net := MMDiT(modalities, depth=2, width=32, heads=4, remat="dots", **fields, **options)).apply, net


@pytest.mark.parametrize("made", some([one_stream, recipe, two_streams, wide_head], recipe))
def test_a_sharded_network_has_the_same_gradients(made):
    """Scanned, rematerialised, in two micro-batches on fsdp 2 x tensor 2."""
    x = {"image": normal(0, (8, 4, 4, 1)), "label": jnp.asarray(RNG.integers(0, 5, 8), jnp.int32)}
    batch = {"x": x, "t": dict.fromkeys(x, jnp.asarray(RNG.random(8), jnp.float32))}

    def gradient(backend, microbatches):
        apply, _ = made(backend=backend)

        def loss(params, batch, key):
            return sum((value**2).mean() for value in apply(params, batch["x"], batch["t"]).values()), {}

        return jax.jit(lambda params, batch: make_gradient(loss, microbatches)(params, batch, None)[0])

    _, net = made()
    weights = filled(net, *((x["image"], batch["t"]["image"], x["label"]) if made is one_stream else (x, batch["t"])))
    value, _, grads = gradient("reference", 1)(weights, batch)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    placed = jax.device_put(weights, sharding.shardings(weights, None, mesh, min_size=1))
    with sharding.compiling_for_mesh(mesh):
        found = gradient("pallas", 2)(placed, sharding.shard_batch(jax.device_get(batch), mesh))
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    close(jax.flatten_util.ravel_pytree(jax.device_get(found[2]))[0], jax.flatten_util.ravel_pytree(grads)[0], 1e-6)


@pytest.mark.parametrize("remat, kernels", [("auto", 2), ("full", 3)])
def test_what_the_backward_pass_reads_is_stored(remat, kernels):
    """One kernel each way: the default for TPUs does not compute attention again."""
    net = DiT(Patches(32, 32, 1, 2), 3, depth=1, width=16, heads=2, remat=remat)
    inputs = jnp.zeros((2, 32, 32, 1)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    with compiling_for("tpu"):
        program = jax.make_jaxpr(jax.grad(lambda params: (net.apply(params, *inputs) ** 2).sum()))(params)
    assert str(program).count("pallas_call[") == kernels


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra tpu-aot")
def test_a_layer_moves_little_more_than_what_enters_and_leaves_it():
    """DiT-XL/2's attention, 32 images on one v6e, bfloat16: the reference moves 1.36 GB."""
    device = aot.describe("v6e:1x1")[1][0]
    sizes = (32, 256, 3 * 1152), (3 * 1152,), (32, 256, 1152)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device)) for shape in sizes]

    def both(qkv, bias, gradient):
        out, pull = jax.vjp(lambda qkv, bias: self_attention(qkv, bias, 16), qkv, bias)
        return out, pull(gradient)

    with compiling_for("tpu"):
        moved = hlo.Program(jax.jit(both).lower(*shapes).compile().as_text()).traffic()
    qkv, out = 2 * 32 * 256 * 3 * 1152, 2 * 32 * 256 * 1152
    assert 3 * qkv + 2 * out <= moved < 0.27e9  # each way reads qkv; one writes the output, the other reads its gradient and writes qkv's
