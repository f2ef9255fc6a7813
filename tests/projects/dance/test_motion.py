"""The encoders of dances: shapes, what each token sees, the fused token, freezing; and the token transformer on a sequence in time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import integers, normal
from filled import filled

from mmdiff.errors import UserError
from mmdiff.nets import TokenTransformer, cdcd
from mmdiff.nets.tokens import time_features
from mmdiff.projects.dance.motion import DanceEncoder, MotionEncoder

B, FRAMES, JOINTS, WIDTH = 3, 16, 5, 8
MOTION = MotionEncoder(depth=1, width=WIDTH, heads=2, stride=2, fps=8, scan=False)
X = {
    "motion": normal(0, (B, FRAMES, JOINTS, 3)),
    "genre": jnp.asarray([0, 1, 3]),
    "video": normal(1, (B, 6)),
    "music": integers(2, (B, 24), 0, 6),
}
TIMES = {name: jnp.full(B, 0.5) for name in X}


def dance(**options):
    return DanceEncoder(MOTION, **{"genres": 4, "video": True, **options})


@functools.cache
def weights(net):
    return filled(net, *(X[name] for name in net.conditions))


@functools.cache
def compiled(net):
    return jax.jit(net.apply)


def run(net, **changes):
    return compiled(net)(weights(net), *((X | changes)[name] for name in net.conditions))


@pytest.mark.parametrize("options", [{}, {"genres": 0}, {"video": False}, {"genres": 0, "video": False}])
def test_every_condition_has_its_tokens(options):
    net = dance(**options)
    out = run(net)
    assert out.shape == (B, FRAMES // 2 + len(net.conditions) - 1, WIDTH) and out.dtype == jnp.float32
    for name in net.conditions:
        changed = np.abs(run(net, **{name: X[name][::-1]}) - out).max(-1)[0] > 1e-5
        own = {"motion": slice(0, 8), "genre": slice(8, 9), "video": slice(-1, None)}[name]
        assert changed[own].all() and not np.delete(changed, np.arange(len(changed))[own]).any(), name
    # Examples do not see each other.
    np.testing.assert_allclose(run(net, **{name: X[name][::-1] for name in net.conditions})[::-1], out, atol=1e-5)


def test_the_fused_token_is_one_product_of_all():
    net = dance(fused=True)
    out, params = run(net), weights(net)["params"]
    assert out.shape == (B, 1, WIDTH)
    motion = MOTION.apply({"params": params["motion"]}, X["motion"]).mean(1)
    together = np.concatenate([motion, params["genre"]["embedding"][X["genre"]], X["video"]], -1)
    np.testing.assert_allclose(out[:, 0], together @ params["out"]["kernel"] + params["out"]["bias"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_a_frozen_encoder_gets_no_gradient(fused):
    def gradient(freeze):
        net = dance(fused=fused, freeze=freeze)
        return jax.jit(jax.grad(lambda p: (net.apply(p, *(X[name] for name in net.conditions)) ** 2).mean()))(weights(net))["params"]

    free, frozen = gradient(False), gradient(True)
    assert all(leaf.any() for name in ("motion", "genre") for leaf in jax.tree.leaves(free[name]))
    for name in ("motion", "genre"):
        assert not any(leaf.any() for leaf in jax.tree.leaves(frozen.pop(name))), name
        del free[name]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), frozen, free)
    assert all(leaf.any() for leaf in jax.tree.leaves(frozen))


def test_places_velocities_and_their_order_count():
    net = dance(genres=0, video=False)
    moved = X["motion"] + 1.0  # elsewhere, by the same movements
    assert float(jnp.abs(run(net, motion=moved) - run(net)).max()) > 1e-2
    assert float(jnp.abs(run(net, motion=X["motion"][:, ::-1])[:, ::-1] - run(net)).max()) > 1e-2
    still = jnp.broadcast_to(X["motion"][:, :1], X["motion"].shape)
    assert float(jnp.abs(run(net, motion=still)[:, 0] - run(net, motion=still)[:, -1]).max()) > 1e-2  # tokens know their time


def test_times_are_told_apart_and_near_ones_are_alike():
    found = time_features(np.arange(344) * 128 / 22_050, 64)
    like = np.asarray(found @ found.T) / 32
    np.testing.assert_allclose(np.diag(like), 1, atol=1e-5)
    assert like[0, 1] > 0.95 and like[~np.eye(344, dtype=bool)].max() < 1 and like[0, 30:].max() < 0.9


# --------------------------------------------------------------------------------------------- sequences in time, full size


def transformer(**options):
    sizes = dict(classes=5, grid=(1, 24), depth=1, width=WIDTH, heads=2, modality="music", scan=False)
    return TokenTransformer(**sizes, **{"patch": 4, "context": ("motion", "genre", "video"), "encoder": dance(), **options})


def test_music_by_any_name_in_patches_of_neighbours():
    net = transformer(context=(), encoder=None)
    params = filled(net, X, TIMES)
    for part in ("attention", "mlp"):  # without the blocks a patch sees itself alone
        params["params"]["block_0"][part]["out"] = jax.tree.map(np.zeros_like, params["params"]["block_0"][part]["out"])
    apply = jax.jit(net.apply)
    out = apply(params, X, TIMES)["music"]
    assert out.shape == (B, 24, 5)
    moved = apply(params, X | {"music": X["music"].at[:, 6].set((X["music"][:, 6] + 1) % 6)}, TIMES)["music"]
    np.testing.assert_array_equal(np.flatnonzero(np.abs(moved - out).max((0, 2)) > 1e-4), [4, 5, 6, 7])
    with pytest.raises(UserError, match="patches of 1x5 do not tile a grid of 1x24 tokens"):
        transformer(patch=5).init(jax.random.key(0), X, TIMES)


def test_positions_begin_as_the_features_of_their_time():
    net = transformer(seconds=2.0, context=(), encoder=None)
    table = jax.jit(lambda key: net.init(key, X, TIMES)["params"]["columns"]["embedding"])(jax.random.key(0))
    np.testing.assert_allclose(table, 0.02 * np.sqrt(2) * time_features(np.arange(6) / 3, WIDTH), atol=1e-6)


@pytest.mark.slow
def test_aligned_tokens_are_added_at_their_time():
    net = transformer(aligned=8)
    params = filled(net, X, TIMES)
    # Nothing else is to carry the dance, and no place is to see another.
    for part in ("attention", "cross", "mlp"):
        params["params"]["block_0"][part]["out"] = jax.tree.map(np.zeros_like, params["params"]["block_0"][part]["out"])
    x = X | {"music": 0 * X["music"]}

    def out(motion):
        return net.apply(params, x | {"motion": motion}, TIMES)["music"]

    # Behind the encoder's blocks, so that a change of the dance stays where it is.
    for part in ("attention", "mlp"):
        motion = params["params"]["encoder"]["motion"]["block_0"]
        motion[part]["out"] = jax.tree.map(np.zeros_like, motion[part]["out"])
    for frame, cells in ((0, [0]), (15, [5])):
        moved = X["motion"].at[:, frame].add(jax.random.normal(jax.random.key(5), X["motion"][:, 0].shape))
        changed = np.abs(out(moved) - out(X["motion"])).max((0, 2)).reshape(6, 4).max(1) > 1e-4
        np.testing.assert_array_equal(np.flatnonzero(changed), cells)
    with pytest.raises(UserError, match="10 tokens of the context .* go through time with the sequence, and it has 1"):
        transformer(aligned=10, encoder=dance(fused=True)).init(jax.random.key(0), X, TIMES)


@pytest.mark.slow
def test_the_dance_reaches_every_token_of_the_music():
    net = transformer()
    params = filled(net, X, TIMES)
    apply = jax.jit(net.apply)
    out = apply(params, X, TIMES)["music"]
    for name in net.context:
        changed = apply(params, X | {name: X[name][::-1]}, TIMES)["music"]
        assert float(np.abs(changed - out).max(-1)[0].min()) > 1e-6, name
    assert float(np.abs(jnp.diff(apply(params, X | {"music": 0 * X["music"]}, TIMES)["music"], axis=1)).max()) > 1e-4


@pytest.mark.parametrize("size, parameters", [("aist_2s", 406_494_208), ("aist", 407_199_744)])
def test_the_published_network_beside_an_encoder(size, parameters):
    encoder = DanceEncoder(MotionEncoder(depth=2, width=1024, heads=16), genres=11, video=True, fused=True)
    net = cdcd(size, modality="music", context=encoder.conditions, encoder=encoder)
    x = {
        "music": jnp.zeros((1, net.grid[1]), jnp.int32), "motion": jnp.zeros((1, 120, 73, 3)), "genre": jnp.zeros(1, jnp.int32),
        "video": jnp.zeros((1, 2048)),
    }  # fmt: skip
    params = jax.eval_shape(net.init, jax.random.key(0), x, {"music": jnp.ones(1)})["params"]
    out = params["encoder"].pop("out")["kernel"]
    assert out.shape == (1024 + 256 + 2048, 1024)  # Linear(1024 + 2048 + 256 -> 1024)
    assert params["encoder"]["genre"]["embedding"].shape == (11, 256)
    del params["encoder"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_mistakes():
    net = dance()
    with pytest.raises(UserError, match=r"motion is \[B, frames, joints, 3\] in tokens of 2 frames, not \[3, 15, 5, 3\]"):
        net.apply(weights(net), X["motion"][:, :15], X["genre"], X["video"])
    with pytest.raises(UserError, match="genre must lie in 0..3, got values from 0 to 4"):
        net.apply(weights(net), X["motion"], X["genre"].at[2].set(4), X["video"])
