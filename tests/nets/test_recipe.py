"""The recipe of later networks: RMSNorm, SwiGLU, rotary positions, modulations without shift or shared, bottlenecks, wide heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from filled import filled

from mmdiff.errors import UserError
from mmdiff.nets import DiT, Label, MMDiT, Patches, Tokens
from mmdiff.nets.embed import sincos_2d
from mmdiff.nets.rotary import angles, rotate

RECIPE = dict(norm="rms", mlp="swiglu", rope=True, qk_norm=True, shift=False, shared_adaln=True)


def test_rotary_positions():
    grid, line = Patches(8, 12, 1, 2), Tokens(5, 3, 3)
    positions = np.concatenate([[[0, 0]], grid.positions()])
    turns, (q, k) = angles(positions, 24), normal(0, (2, 1, 1, 1, 24))
    at = jax.jit(lambda x: rotate(jnp.broadcast_to(x, (1, len(turns), 1, 24)), turns))
    turned, other = np.asarray(at(q))[0, :, 0], np.asarray(at(k))[0, :, 0]
    np.testing.assert_array_equal(turned[:2], np.broadcast_to(q[0, 0], (2, 24)))  # position 0
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(q), rtol=1e-6)
    scores = {}
    for here, one in zip(positions, turned):
        for there, two in zip(positions, other):
            scores.setdefault(tuple(there - here), []).append(one @ two)
    assert len(scores) == 7 * 11
    for values in scores.values():  # of differences alone
        np.testing.assert_allclose(values, values[0], atol=2e-5)
    # Half the features for the rows, half for the columns, with the rates of one axis each.
    np.testing.assert_array_equal(turns[1 + 6 * 3 + 5], np.concatenate([3, 5] * 10000.0 ** -(np.arange(6) / 6)[:, None], axis=None)[
        np.r_[0:12:2, 1:12:2]])
    np.testing.assert_allclose(angles(line.positions(), 8)[3], 3 * 10000.0 ** -(np.arange(4) / 4), rtol=1e-15)
    assert not Label(4, 3).positions().any()
    # A grid twice as fine, read with half the angles: exact at the nodes of the coarse one; so are the added positions.
    fine = Patches(16, 24, 1, 2, spacing=0.5)
    nodes = np.arange(8 * 12).reshape(8, 12)[::2, ::2].ravel()
    np.testing.assert_array_equal(angles(fine.positions(), 24)[nodes], turns[1:])
    np.testing.assert_array_equal(sincos_2d(24, 8, 12, 0.5)[nodes], sincos_2d(24, 4, 6))


def silu(x):
    return x / (1 + np.exp(-x))


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def rms(p, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def block(p, x, modulation, grid, heads=2):
    scale, gate, mlp_scale, mlp_gate = np.split(modulation + p["adaln"]["bias"], 4, -1)
    (b, n, width), size = x.shape, x.shape[-1] // heads
    q, k, v = np.moveaxis(dense(p["attention"]["qkv"], rms(p["attention_norm"], x) * (1 + scale)).reshape(b, n, heads, 3, size), 3, 0)
    rates = 10000.0 ** -(np.arange(size // 4) / (size // 4))
    turns = np.exp(1j * np.concatenate([np.outer(np.arange(n) // grid, rates), np.outer(np.arange(n) % grid, rates)], -1))[:, None]

    def turned(x, p):
        x = rms(p, x)
        x = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turns
        return np.concatenate([x.real, x.imag], -1)

    q, k = turned(q, p["attention"]["q_norm"]), turned(k, p["attention"]["k_norm"])
    weights = np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(size))
    out = np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v).reshape(b, n, width)
    x = x + gate * dense(p["attention"]["out"], out)
    hidden = dense(p["mlp"]["in"], rms(p["mlp_norm"], x) * (1 + mlp_scale))
    return x + mlp_gate * dense(p["mlp"]["out"], silu(hidden[..., ::2]) * hidden[..., 1::2])


def test_everything_at_once_by_hand():
    """In float64, and its derivative in time by forward mode against a difference of that."""
    patches = Patches(4, 4, 2, 2, bottleneck=3, head=(1, 24))
    net = DiT(patches, 3, depth=2, width=16, heads=2, scan=False, **RECIPE)
    x, t, label = normal(0, (2, 4, 4, 2)), jnp.asarray([0.2, 0.7]), jnp.asarray([0, 3])
    params = filled(net, x, t, label)
    p = jax.tree.map(np.float64, params)["params"]
    assert p["block_0"]["mlp"]["in"]["kernel"].shape == (16, 2 * 42) and p["blocks_adaln"]["kernel"].shape == (16, 64)
    rows = np.float64(x).reshape(2, 2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 8)

    def encoded(name, width):
        return dense(p[f"{name}_in"], dense(p[f"{name}_bottleneck"], rows)) + sincos_2d(width, 2, 2)

    def by_hand(t):
        angle = 1000 * t[:, None] * np.exp(-np.log(10000.0) * np.arange(128) / 128)
        time = dense(p["time"]["out"], silu(dense(p["time"]["in"], np.concatenate([np.cos(angle), np.sin(angle)], -1))))
        c = (time + p["label"]["embedding"][np.asarray(label)])[:, None]
        h, shared = encoded("image", 16), dense(p["blocks_adaln"], silu(c))
        for i in range(2):
            h = block(p[f"block_{i}"], h, shared, 2)
        c = dense(p["head_condition"], silu(h + c))
        h = block(p["head_stack"]["block_0"], encoded("head", 24), dense(p["head_stack"]["blocks_adaln"], silu(c)), 2)
        shift, scale = np.split(dense(p["adaln"], silu(c)), 2, -1)
        out = dense(p["image_out"], rms(p["norm"], h) * (1 + scale) + shift)
        return out.reshape(2, 2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 4, 2)

    found, slope = jax.jit(lambda t: jax.jvp(lambda t: net.apply(params, x, t, label), (t,), (jnp.ones_like(t),)))(t)
    times = np.float64(t)
    np.testing.assert_allclose(found, by_hand(times), atol=2e-4)  # the angles of a time in float32
    expected = (by_hand(times + 1e-6) - by_hand(times - 1e-6)) / 2e-6
    np.testing.assert_allclose(slope, expected, atol=1e-3 * np.abs(expected).max())


def test_sizes():
    """LightningDiT-XL/1 on 16 x 16 x 32 latents has the parameters of the published one: 675M."""

    def count(**fields):
        net = DiT.preset("XL", 1, image=16, channels=32, learn_sigma=False, **fields)
        shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 16, 16, 32)), jnp.zeros(1), jnp.zeros(1, int))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    width, depth = 1152, 28
    lightning = dict(norm="rms", mlp="swiglu", rope=True)
    assert count(**lightning) == count() + depth * (2 * width + 2 * 3072 - 4 * width) + width  # norms' scales, biases of hidden units
    assert round(count(**lightning) / 1e6) == 675
    assert count(shift=False) == count() - depth * 2 * width * (width + 1)
    assert count(shared_adaln=True) == count() - (depth - 1) * 6 * width * (width + 1) + depth * 6 * width


def test_what_cannot_be():
    image = {"image": Patches(4, 4, 1, 2)}
    for fields, said in (
        (dict(norm="batch"), "MMDiT: norm is layer or rms, not 'batch'"), (dict(mlp="relu"), "mlp is gelu or swiglu"),
        (dict(rope=True, width=24, heads=4), "heads whose width 4 divides: width 24 / heads 4 is 6"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            MMDiT(image, **{"depth": 1, "width": 16, "heads": 2, **fields})
    with pytest.raises(UserError, match=r"head must be several numbers, \(depth, width\)"):
        Patches(4, 4, 1, 2, head=(2,))
    with pytest.raises(UserError, match="rotary positions with 2 axes need heads whose width 4 divides, not 6"):
        net = MMDiT({"image": Patches(4, 4, 1, 2, head=(1, 12))}, depth=1, width=16, heads=2, rope=True)
        jax.eval_shape(net.init, jax.random.key(0), {"image": jnp.zeros((1, 4, 4, 1))}, {"image": jnp.zeros(1)})
    with pytest.raises(UserError, match="the head of 'image': width 18 does not fit 4 heads"):
        net = MMDiT({"image": Patches(4, 4, 1, 2, head=(1, 18))}, depth=1, width=16, heads=4)
        jax.eval_shape(net.init, jax.random.key(0), {"image": jnp.zeros((1, 4, 4, 1))}, {"image": jnp.zeros(1)})
