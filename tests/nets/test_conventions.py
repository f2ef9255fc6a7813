"""What the published networks fix beside their sizes: the epsilon of their norms and the scale of their times, by hand in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled

from mmdiff import nets
from mmdiff.nets import Patches, TextEncoder, TokenTransformer, embed
from mmdiff.projects.dance.motion import MotionEncoder

B, L, W, HEADS = 3, 5, 8, 2
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 6, (B, L)), jnp.int32)


def norm(x, eps, scale=1.0, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def self_attention(p, x):
    q, k, v = np.moveaxis(dense(p["qkv"], x).reshape(B, L, HEADS, 3, W // HEADS), 3, 0)
    scores = np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(W // HEADS))
    return dense(p["out"], np.einsum("bhnm,bmhd->bnhd", scores / scores.sum(-1, keepdims=True), v).reshape(B, L, W))


def mlp(p, x):
    hidden = dense(p["in"], x)
    return dense(p["out"], hidden / (1 + np.exp(-1.702 * hidden)))


def block(p, x, eps, time=None):
    def normed(x, name, row):
        if row is None:
            return norm(x, eps, **p[f"{name}_norm"])
        e = p[f"{name}_table"]["embedding"][row]
        scale, shift = np.split(dense(p[f"{name}_adaln"], e / (1 + np.exp(-e))), 2, -1)
        return norm(x, eps) * (1 + scale[:, None]) + shift[:, None]

    x = x + self_attention(p["attention"], normed(x, "attention", time))
    return x + mlp(p["mlp"], normed(x, "mlp", None))


def weights(net, *inputs):
    """Those of `filled` at the size of initial embeddings, 0.02: where a norm's epsilon counts."""
    params = filled(net, *inputs)["params"]
    for name in ("tokens_in", "columns", "rows"):
        if name in params:
            params[name] = jax.tree.map(lambda x: (0.1 * x).astype(np.float32), params[name])
    return {"params": params}, jax.tree.map(np.float64, params)


def test_the_token_transformer_has_vq_diffusion_s_epsilon():
    net = TokenTransformer(classes=6, grid=(1, L), depth=1, width=W, heads=HEADS, times=4, scan=False)
    x, t = {"tokens": IDS}, {"tokens": jnp.asarray([0.25, 0.5, 1.0])}
    params, p = weights(net, x, t)
    out = jax.jit(net.apply)(params, x, t)["tokens"]

    def by_hand(eps):
        h = p["tokens_in"]["embedding"][IDS] + p["rows"]["embedding"][0] + p["columns"]["embedding"]
        h = block(p["block_0"], h, eps, np.asarray([0, 1, 3]))
        return dense(p["tokens_out"], norm(h, eps, **p["norm"]))

    np.testing.assert_allclose(out, by_hand(1e-5), atol=3e-6)
    assert np.abs(out - by_hand(1e-6)).max() > 1e-4
    with_other = jax.jit(net.copy(norm_eps=1e-3).apply)(params, x, t)["tokens"]
    np.testing.assert_allclose(with_other, by_hand(1e-3), atol=3e-6)


def test_the_text_encoder_has_clip_s_epsilon():
    net = TextEncoder(6, L, depth=1, width=W, heads=HEADS, scan=False)
    params, p = weights(net, IDS)
    h = p["tokens_in"]["embedding"][IDS] + p["columns"]["embedding"]
    expected = {eps: norm(block(p["block_0"], h, eps), eps, **p["norm"]) for eps in (1e-5, 1e-6)}
    out = jax.jit(net.apply)(params, IDS)
    np.testing.assert_allclose(out, expected[1e-5], atol=3e-6)
    assert np.abs(out - expected[1e-6]).max() > 1e-4


IMAGE, LABEL, TIME, VECTOR = jnp.ones((2, 4, 4, 1)), jnp.asarray([0, 1]), jnp.asarray([0.1, 0.6]), jnp.ones((2, 4))
SIZES = dict(depth=1, width=8, heads=2)
NETWORKS = {
    "dit": (nets.DiT(Patches(4, 4, 1, 2), 3, **SIZES), (IMAGE, TIME, LABEL), 1e-6),
    "mmdit": (
        nets.MMDiT({"image": Patches(4, 4, 1, 2), "label": nets.Label(4, 3)}, **SIZES),
        ({"image": IMAGE, "label": LABEL}, {"image": TIME, "label": TIME}), 1e-6),
    "multitask": (
        nets.MultiTaskDiT(Patches(4, 4, 1, 2), {"label": nets.Classes(4, 3), "vector": nets.Vector(4)}, **SIZES),
        ({"image": IMAGE, "label": LABEL, "vector": VECTOR}, {"image": TIME, "label": TIME, "vector": TIME}), 1e-6),
    "dual": (
        nets.DualStream(Patches(4, 4, 1, 2), None, 4, shared=1, head_depth=1, **SIZES),
        ({"image": IMAGE, "query": VECTOR}, {"image": TIME, "query": TIME}), 1e-6),
    "towers": (
        nets.TwoTowers(Patches(4, 4, 1, 2), vocabulary=6, length=L, size=4, text_depth=1, text_width=8, **SIZES),
        ({"image": IMAGE, "text": IDS[:2]}, {}), 1e-5),
    "uvit": (
        nets.UViT(Patches(4, 4, 1, 2), nets.Vectors(4), nets.Vectors(3, L), depth=2, width=8, heads=2),
        ({"image": IMAGE, "vision": VECTOR, "text": jnp.ones((2, L, 3))}, {"image": TIME, "vision": TIME, "text": TIME}), 1e-5),
    "motion": (MotionEncoder(depth=1, width=8, heads=2), (jnp.ones((2, 8, 3, 3)).at[:, ::2].set(0.5),), 1e-6),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_epsilon_and_time_scale_reach_every_network(name):
    """An epsilon beyond every variance leaves nothing of what is normalised; scale and time are one product."""
    net, inputs, published = NETWORKS[name]
    assert net.norm_eps == published
    params = filled(net, *inputs)
    shapes = jax.eval_shape(net.copy(norm_eps=0.5).init, jax.random.key(0), *inputs)  # checkpoints are of any epsilon
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    # DiT and MMDiT read of a time nothing but its features; of others it is known that they change.
    exact = name in ("dit", "mmdit")
    timed = jax.tree.map(lambda x: 1000 * x - 50 if exact and x is TIME else x, inputs, is_leaf=lambda x: x is TIME)
    others = [(dict(norm_eps=1e12), inputs), (dict(time_scale=1.0, time_offset=50.0), timed)][: 1 + hasattr(net, "time_scale")]
    plain, *found = jax.jit(lambda p: [net.copy(**fields).apply(p, *given) for fields, given in [({}, inputs), *others]])(params)
    moved = [jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), plain, tree) for tree in found]
    assert min(change for change, leaf in zip(jax.tree.leaves(moved[0]), jax.tree.leaves(plain)) if leaf.ndim > 1) > 1e-2
    for changes in moved[1:]:
        assert net.time_scale == 1000.0 and (max(jax.tree.leaves(changes)) < 1e-4) == exact


def timestep_embedding(t, dim, max_period=10000):
    """As DiT and SiT have it, in float64."""
    half = dim // 2
    freqs = np.exp(-np.log(max_period) * np.arange(half) / half)
    args = np.float64(t)[:, None] * freqs[None]
    return np.concatenate([np.cos(args), np.sin(args)], axis=-1)


def test_the_features_of_times_are_the_published_ones():
    t = np.linspace(0, 1, 41).astype(np.float32)
    np.testing.assert_allclose(embed.frequencies(jnp.asarray(t), scale=1.0), timestep_embedding(t, 256), atol=2e-7)  # SiT
    np.testing.assert_allclose(embed.frequencies(jnp.asarray(1 - t), scale=-1.0, offset=1.0), timestep_embedding(t, 256), atol=3e-7)
    steps = np.arange(0, 1001, 25)  # DiT's, which counts 0 .. 999
    np.testing.assert_allclose(embed.frequencies(jnp.asarray(steps) / 1000), timestep_embedding(steps, 256), atol=1e-4)
    found = embed.frequencies(jnp.asarray(steps + 1) / 1000, offset=-1.0)
    np.testing.assert_allclose(found, timestep_embedding(steps, 256), atol=1.5e-4)
