"""The README's Python examples run, and its processes, terms and maps do what it says."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import losses, nets, sampling, schedules, times
from mmdiff.experiment import initialiser
from mmdiff.processes import Gaussian, Joint, velocity

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def namespaces():
    spaces = []
    for block in BLOCKS:
        space = {"__name__": "readme"}
        exec(compile(block, "README.md", "exec"), space)
        spaces.append(space)
    return spaces


def find(namespaces, name):
    return next(space[name] for space in namespaces if name in space)


def test_first_example_trains_and_samples(namespaces):
    space = namespaces[0]
    assert np.isfinite(space["value"]) and {"loss/image", "loss/label"} <= set(space["metrics"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(space["grads"]))
    assert set(np.asarray(space["sevens"]["label"])) == {7}
    np.testing.assert_array_equal(space["names"]["image"], space["batch"]["image"])
    assert space["pairs"]["image"].shape == space["images"]["image"].shape == (4, 8, 8, 1)


@pytest.mark.slow
def test_ring_is_a_chain_and_trains_in_a_joint(namespaces):
    ring = find(namespaces, "Ring")(12)
    rng = np.random.default_rng(0)
    p, f = (jnp.asarray(rng.random((3, 12)), jnp.float32) for _ in range(2))
    s, t = jnp.array([0.1, 0.2, 0.0]), jnp.array([0.3, 0.9, 0.5])
    np.testing.assert_allclose((ring.push(p, s, t) * f).sum(-1), (p * ring.pull(f, s, t)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(ring.push(ring.push(p, None, s), s, t), ring.push(p, None, t), atol=1e-5)
    np.testing.assert_allclose(ring.push(p, None, jnp.ones(3)), jnp.broadcast_to(p.sum(-1, keepdims=True) / 12, (3, 12)), rtol=1e-2)

    process = Joint(image=Gaussian(schedules.flow(), velocity), hour=ring)
    net = nets.MMDiT({"image": nets.Patches(4, 4, 1, 2), "hour": nets.Label(12, 12)}, depth=1, width=16, heads=2)
    shape = {"image": (4, 4, 1), "hour": ()}
    params = jax.jit(initialiser(net, process, shape))(jax.random.key(0))
    batch = {"image": jnp.zeros((3, 4, 4, 1)), "hour": jnp.array([0, 5, 11]), "index": jnp.arange(3)}
    loss = losses.diffusion(process, net.apply, times.shared("image", "hour"))
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, jax.random.key(1))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    drawn = sampling.sample(process, net.apply, params, jax.random.split(jax.random.key(2), 3), sampling.uniform_grid(3), shape)
    assert ((drawn["hour"] >= 0) & (drawn["hour"] < 12)).all()


def test_the_loss_of_the_example_counts_both_terms(namespaces):
    space = next(space for space in namespaces if "pseudo_huber" in space)
    batch = {"image": jnp.zeros((4, 2, 2, 1)), "label": jnp.arange(4), "index": jnp.arange(4)}
    out = {"image": jnp.zeros((4, 2, 2, 1)), "label": jnp.zeros((4, 10))}  # its network returns its parameters
    value, metrics = space["loss"](out, batch, jax.random.key(0))
    np.testing.assert_allclose(value, metrics["loss/image"] + 0.1 * metrics["loss/label"], rtol=1e-6)
    assert metrics["loss/image"] > 0 and metrics["loss/label"] > 0


def test_every_flag_and_path_of_the_readme_exists():
    for path in set(re.findall(r"\b(?:configs|launch)/[\w./]+\w", TEXT)):
        assert (ROOT / path).exists(), path
