"""Averages whose length is chosen after training: the closed form against averages that are tracked, and a run that keeps snapshots."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from mmdiff import open_run
from mmdiff.errors import UserError
from mmdiff.training import integrity, loop, power_ema, sharding
from mmdiff.training.step import init_state, make_step

TRACKED = (0.05, 0.1)


def test_widths():
    g = np.asarray([power_ema.exponent(width) for width in TRACKED])
    np.testing.assert_allclose(g, [16.97, 6.94], atol=5e-3)
    np.testing.assert_allclose((g + 1) / ((g + 2) ** 2 * (g + 3)), np.square(TRACKED), rtol=1e-12)
    for wrong in (0, 0.3, "0.1", float("nan"), True):
        with pytest.raises(UserError, match="from 0.001 to 0.288"):
            power_ema.exponent(wrong)


def test_an_untracked_width_is_that_of_an_average_of_its_own():
    """A random walk with a drift, 4,096 steps, in float64; what snapshots miss falls with their distance."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(4096, 8)) + 0.05, axis=0)
    widths = [*TRACKED, 0.07, 0.13, 0.2]
    g = np.asarray([[power_ema.exponent(width)] for width in widths])
    average, kept = np.zeros((len(widths), 8)), []
    for i, theta in enumerate(walk, 1):
        b = (1 - 1 / i) ** (g + 1)
        average = b * average + (1 - b) * theta
        kept.append(average[:2])

    def error(width, every):
        steps = np.arange(every, 4097, every)
        shares = power_ema.combination(np.repeat(steps, 2), list(TRACKED) * len(steps), width, 4096)
        found = shares @ np.concatenate([kept[step - 1] for step in steps])
        expected = average[widths.index(width)]
        assert abs(shares.sum() - 1) < 1e-12 and np.abs(shares).sum() < 3  # rounding of the snapshots is amplified by no more
        return np.linalg.norm(found - expected) / np.linalg.norm(expected)

    assert error(0.05, 256) < 1e-12 and error(0.1, 256) < 1e-12  # tracked
    for width, limits in {0.07: (1e-3, 1e-4, 1e-5), 0.13: (1e-3, 1e-4, 1e-5), 0.2: (2e-2, 4e-3, 1e-3)}.items():
        errors = [error(width, every) for every in (512, 256, 128)]
        assert errors[0] > errors[2] and all(np.less(errors, limits)), (width, errors)


def test_the_state_tracks_averages_of_the_steps_that_were_taken():
    """512 steps, the third of which is skipped and leaves them bit for bit; an untracked width within 1e-3 of one that is tracked."""
    optimizer = optax.adam(1e-2)

    def loss(params, batch, key):
        value, metrics = toy.loss(params, {name: batch[name] for name in ("x", "index")}, key)
        return value + batch["bad"].sum(), metrics

    step = make_step(loss, optimizer)

    @jax.jit
    def trained(key):
        def one(state, i):
            index = 16 * i + jnp.arange(16, dtype=jnp.uint32)
            x = jnp.sin(jnp.arange(4.0) + index[:, None])
            state, _ = step(state, {"x": x, "index": index, "bad": jnp.where(i == 2, jnp.nan, 0.0) * jnp.ones(16)})
            return state, (state.params, state.stats["averages"])

        start = init_state(toy.init, optimizer, key, widths=(*TRACKED, 0.07))
        return jax.lax.scan(one, start, jnp.arange(512, dtype=jnp.uint32))

    state, (params, averages) = jax.device_get(trained(jax.random.key(0)))
    assert state.stats["skipped"] == 1 and set(averages) == {"0.05", "0.1", "0.07"}
    for tree in averages.values():
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), tree, params)  # without a warm-up
        jax.tree.map(lambda x: np.testing.assert_array_equal(x[1], x[2]), tree)
        assert all((x[2] != x[3]).any() for x in jax.tree.leaves(tree))
    steps = np.arange(63, 512, 64)  # of the arrays above; as many steps were taken
    shares = power_ema.combination(np.repeat(steps, 2), [*TRACKED] * len(steps), 0.07, 511).reshape(-1, 2)

    def close(short, long, wanted, params):
        found = np.tensordot(shares, np.stack([short[steps], long[steps]], 1), 2)
        assert np.linalg.norm(found - wanted[511]) < 1e-3 * np.linalg.norm(wanted[511]) < np.linalg.norm(params[511] - wanted[511])

    jax.tree.map(close, averages["0.05"], averages["0.1"], averages["0.07"], params)


def test_they_are_sharded_as_the_weights():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    init = lambda key: {"params": {"blocks": {"mlp": {"in": {"kernel": jnp.zeros((2, 64, 256))}}}}}  # noqa: E731
    state = sharding.abstract_state(init, toy.optimizer(), mesh, None, widths=TRACKED)
    wanted = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    assert not wanted[0].is_fully_replicated
    assert all([leaf.sharding for leaf in jax.tree.leaves(tree)] == wanted for tree in state.stats["averages"].values())


def test_a_run_keeps_snapshots_and_gives_any_width(config, tmp_path, monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))
    config.train.update(steps=12, eval_every=0)
    with config.unlocked():
        config.train.update(ema_widths=TRACKED, ema_every=4)
    first = loop.train(toy.build(config), config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "12")  # it was stopped after step 6
    folder = tmp_path / "snapshots" / "checkpoints"
    shutil.copytree(folder / "12", folder / "11")  # of another past
    again = loop.train(toy.build(config), config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, (first.params, first.stats, first.ema), (again.params, again.stats, again.ema))
    assert sorted(int(path.name) for path in folder.iterdir()) == [4, 8, 12]

    shutil.rmtree(folder / "12")  # it was stopped between its last checkpoint and this
    loop.train(toy.build(config), config, tmp_path)
    shutil.copytree(folder / "12", folder / "13")  # as after a step that was skipped: as many were taken

    run = open_run(toy.__file__, tmp_path)
    wide, short = run.ema(0.1), run.ema(0.05, at=8)
    assert (wide.step, short.step, run.step) == (13, 8, 12) and wide.config.train.ema == "width 0.1"
    close = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, wide.params, first.stats["averages"]["0.1"])
    jax.tree.map(np.testing.assert_array_equal, run.params, first.ema)
    for asked, said in (((0.1, 7), "no snapshot of step 7: the last are of 4, 8, 12, 13"), ((0.4,), "from 0.001 to 0.288")):
        with pytest.raises(UserError, match=said):
            run.ema(*asked)
    config.train.ema_widths = ("wide",)
    with pytest.raises(UserError, match="ema_widths"):
        loop.check(toy.build(config), config)
    monkeypatch.setattr(integrity, "SMALL", 0)  # files whose content is only read where it matters
    large = max((folder / "8" / "ema").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    large.write_bytes(bytes([large.read_bytes()[0] ^ 1]) + large.read_bytes()[1:])
    with pytest.raises(UserError, match="snapshots/checkpoints/8 is damaged .*checksum differs"):
        run.ema(0.1)
