"""Token routing: what skips blocks returns unchanged, trains none of them, and costs nothing there; and tokens of the label in context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from filled import filled

from mmdiff import losses, schedules, times
from mmdiff.errors import UserError
from mmdiff.nets import DiT, Label, MiT, MMDiT, Patches, Tap, TokenTransformer, TwoTowers, UViT, Vectors, as_joint
from mmdiff.nets.rotary import rotate
from mmdiff.nets.routes import places, put, take
from mmdiff.nets.target import compiling_for
from mmdiff.processes import Gaussian, Given, Joint
from mmdiff.training import perf

B, N, KEPT = 2, 4, np.array([[0, 3], [1, 2]])
PATCHES, SIZES = Patches(4, 4, 1, 2), dict(width=16, heads=2, scan=False)
X, T, LABELS = normal(0, (B, 4, 4, 1)), np.float32([0.3, 0.8]), np.int32([0, 3])


def test_what_skips_blocks():
    """In-context tokens from the second block on; half of the patches skip the third, the last: whatever its weights, bit for bit."""
    net = DiT(PATCHES, 3, depth=3, route=(2, 3), rope=True, qk_norm=True, in_context=(3, 1), **SIZES)
    params = filled(net, X, T, LABELS)
    identity = {"params": {**params["params"], "from_2": jax.tree.map(np.zeros_like, params["params"]["from_2"])}}
    apply = jax.jit(lambda params: net.apply(params, X, T, LABELS, KEPT))
    found, before = (np.asarray(apply(each)).reshape(B, 2, 2, 2, 2).swapaxes(2, 3).reshape(B, N, 4) for each in (params, identity))
    skipped = np.ones((B, N), bool)
    np.put_along_axis(skipped, KEPT, False, axis=1)
    np.testing.assert_array_equal(found[skipped], before[skipped])  # so they train none of it
    assert np.abs(found[~skipped] - before[~skipped]).min() > 1e-4


def test_kept_tokens_have_their_own_positions_and_return_to_them():
    x, angles = normal(0, (B, N, 2, 4)), np.arange(2.0 * N).reshape(N, 2)
    at = jax.jit(lambda: (rotate(x, angles), rotate(jnp.take_along_axis(x, KEPT[..., None, None], 1), angles, KEPT)))
    h, new = normal(1, (B, N, 3)), normal(2, (B, KEPT.shape[1], 3))
    again, changed = jax.jit(lambda: (put(h, KEPT, take(h, KEPT)), put(h, KEPT, new)))()
    np.testing.assert_array_equal(again, h)  # bit for bit
    for i, keep in enumerate(KEPT):
        np.testing.assert_array_equal(changed[i][keep], new[i])
        np.testing.assert_array_equal(np.delete(changed[i], keep, 0), np.delete(h[i], keep, 0))
    found = places({"image": KEPT}, ["first", "image", "last"], [2, N, 1])
    np.testing.assert_array_equal(found, np.concatenate([[[0, 1]] * B, 2 + KEPT, [[2 + N]] * B], axis=1))
    whole, kept = at()
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(whole), KEPT[..., None, None], 1), kept)


def test_a_joint_model_with_routed_tokens():
    """With all tokens kept as without; by the loss half of them are, each example's own, and what skips costs nothing."""
    net = MMDiT({"image": PATCHES, "label": Label(5, 4)}, depth=2, route=(1, 2), rope=True, shared=True, **SIZES)
    x, t = {"image": X, "label": LABELS}, {"image": T, "label": T}
    params, everything = filled(net, x, t), jnp.broadcast_to(jnp.arange(N), (B, N))
    inputs = x, {**x, "image/keep": everything}
    without, kept = jax.jit(lambda params: [net.apply(params, each, t)["image"] for each in inputs])(params)
    np.testing.assert_allclose(kept, without, atol=1e-6)

    process = Joint(image=Gaussian(schedules.flow()), label=Given(4))
    loss = losses.diffusion(process, net.apply, times.joint(image=times.uniform(), label=0.0))
    batch = {**x, "index": np.arange(B, dtype=np.uint32)}
    both = loss, losses.prepared(loss, losses.routed("image", N, 0.5))
    work = [perf.flops(lambda params, each=each: each(params, batch, jax.random.key(0))[0], params) for each in both]
    width, tokens, few = 16, N + 1, N // 2 + 1  # with the label's
    assert work[0] - work[1] == B * (24 * width**2 * (tokens - few) + 4 * width * (tokens**2 - few**2))  # in one of two blocks

    keys = jax.random.split(jax.random.key(1), 50)
    assert losses.routed("image", N, 0.0)(batch, keys) == {}  # nothing changes
    found, back = jax.jit(lambda keys: [losses.routed("image", 6, 0.5)({}, each)["image/keep"] for each in (keys, keys[::-1])])(keys)
    keep = np.asarray(found)
    assert keep.shape == (50, 3) and (np.diff(keep) > 0).all() and set(keep.ravel()) == set(range(6)) and len(np.unique(keep, axis=0)) > 10
    np.testing.assert_array_equal(back, keep[::-1])


def test_what_cannot_be_routed_is_refused():
    streams = {"image": PATCHES}
    for said, make in (
        ("MMDiT: route counts the blocks before", lambda: MMDiT(streams, depth=4, route=(2, 5), **SIZES)),
        ("DiT: route counts the blocks before", lambda: DiT(PATCHES, 3, depth=4, route=(3, 3), **SIZES)),
        ("lies where tokens skip blocks", lambda: MMDiT(streams, depth=4, route=(1, 3), taps={"a": Tap("image", 2, 3)}, **SIZES)),
        ("where tokens skip", lambda: DiT(PATCHES, 3, depth=4, route=(1, 3), in_context=(2, 2), **SIZES)),
        ("in_context is", lambda: DiT(PATCHES, 3, depth=4, in_context=(2, 4), **SIZES)),
        ("leaves one of 4, not 1", lambda: losses.routed("image", N, 1.0)),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            make()
    joint, inputs = as_joint(DiT(PATCHES, 3, depth=4, **SIZES)), ({"image": X, "label": LABELS, "image/keep": KEPT}, {"image": T})
    with pytest.raises(UserError, match="it has no route"):
        jax.eval_shape(lambda: joint({}, *inputs))
    without = MiT(PATCHES, 3, depth=2, head_depth=1, **SIZES), TokenTransformer(3, (2, 2), depth=1, **SIZES), TwoTowers(
        PATCHES, 3, 4, 4, text_depth=1, text_width=16, depth=1, **SIZES), UViT(PATCHES, Vectors(4), Vectors(4, 2), depth=2, **SIZES)
    for net in without:
        with pytest.raises(UserError, match=f"{type(net).__name__}: some tokens of 'image' are to skip blocks, but it has no route"):
            jax.eval_shape(lambda net=net: net.init(jax.random.key(0), *inputs))
    for keep in ({"image/keep": np.zeros((B, 5), int)}, {"sound/keep": KEPT}):  # an image has four tokens
        net = MMDiT(streams, depth=4, route=(1, 3), **SIZES)
        with pytest.raises(UserError, match="of 'image' it has 4 tokens and 5 would|of 'sound' it has 0 tokens and 2 would"):
            jax.eval_shape(lambda net=net, keep=keep: net.init(jax.random.key(0), {"image": X, **keep}, {"image": T}))
    net = DiT(PATCHES, 3, depth=4, route=(1, 3), **SIZES)
    with compiling_for("cpu", 2, axes={"seq": 2}), pytest.raises(UserError, match="set config.train.mesh.seq=1"):
        jax.eval_shape(lambda: net.init(jax.random.key(0), X, T, LABELS, KEPT))
