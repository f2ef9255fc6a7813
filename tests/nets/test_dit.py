"""DiT: the published architecture, parameter for parameter, and switches that change nothing but the cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from filled import filled
from tiers import some

from mmdiff.errors import UserError
from mmdiff.nets import DiT, Patches, as_joint
from mmdiff.nets.target import compiling_for

KEY = jax.random.key(1, impl="rbg")  # its numbers take less time to compile
SMALL = dict(patches=Patches(4, 4, 2, 2), classes=3, depth=3, width=16, heads=2)
X = normal(0, (5, 4, 4, 2))
T = jnp.asarray(np.linspace(0, 1, 5, dtype=np.float32))
LABEL = jnp.asarray([0, 1, 2, 3, 0])  # 3 is the null row


@pytest.fixture(scope="module")
def params():
    return filled(DiT(**SMALL), X, T, LABEL)


@pytest.fixture(scope="module")
def reference(params):
    return jax.jit(DiT(**SMALL).apply)(params, X, T, LABEL)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def published(size, patch):
    """Parameters of DiT for 1,000 classes + null and a learned sigma on 32x32x4 latents, by arithmetic."""
    depth, h = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}[size]
    patches = patch**2 * 4 * h + h
    time = (256 * h + h) + (h * h + h)
    labels = 1001 * h
    block = (3 * h * h + 3 * h) + (h * h + h) + (4 * h * h + 4 * h) + (4 * h * h + h) + (6 * h * h + 6 * h)
    final = (2 * h * h + 2 * h) + (patch**2 * 8 * h + patch**2 * 8)
    return patches + time + labels + depth * block + final


def test_heads_that_the_tensor_axis_does_not_divide_are_refused():
    net = DiT.preset("S", 8)
    arguments = jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    with compiling_for("cpu", 4, axes={"tensor": 4}), pytest.raises(UserError, match="6 heads do not split into 4"):
        jax.eval_shape(net.init, *arguments)
    with compiling_for("cpu", 3, axes={"tensor": 3}):
        jax.eval_shape(net.init, *arguments)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_parameter_counts(size, patch):
    net = DiT.preset(size, patch)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    assert count(shapes) == published(size, patch)
    known = {("S", 2): 32_865_056, ("B", 2): 130_315_808, ("XL", 2): 674_834_720}
    assert count(shapes) == known.get((size, patch), count(shapes))


def test_output_shapes():
    def output(net, *shape):
        run = lambda k: net.init_with_output(k, jnp.zeros(shape), jnp.zeros(2), jnp.zeros(2, jnp.int32))[0]  # noqa: E731
        return jax.eval_shape(run, jax.random.key(0))

    out = output(DiT.preset("S", 4), 2, 32, 32, 4)
    assert out.shape == (2, 32, 32, 8) and out.dtype == jnp.float32
    assert output(DiT.preset("S", 4, image=16, channels=3, classes=10, learn_sigma=False), 2, 16, 16, 3).shape == (2, 16, 16, 3)


def test_starts_at_zero():
    """adaLN-Zero: every block is the identity and the output is zero, but the gradient is not."""
    net = DiT(**SMALL)
    start = jax.jit(net.init)(KEY, X, T, LABEL)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: ((net.apply(p, X, T, LABEL) - X) ** 2).mean()))(start)
    np.testing.assert_allclose(value, (X**2).mean(), rtol=1e-6)
    assert gradient["params"]["image_out"]["bias"].any()


def unstacked(params, depth=3):
    """The scanned layers' weights as one entry a layer."""
    inner = dict(params["params"])
    blocks = inner.pop("blocks")
    return {"params": inner | {f"block_{i}": jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(depth)}}


def value_and_grad(weights, **options):
    net = DiT(**SMALL, **options)
    return jax.jit(jax.value_and_grad(lambda p: (net.apply(p, X, T, LABEL) ** 2).mean()))(weights)


@pytest.fixture(scope="module")
def plain(params):
    return value_and_grad(params)


@pytest.mark.parametrize("scan, remat", some(
    [(True, "some"), (True, "full"), (False, "none"), (False, "dots")], (True, "some"), (False, "dots")))
def test_scan_and_remat_change_neither_value_nor_gradient(params, plain, scan, remat):
    value, gradient = value_and_grad(params if scan else unstacked(params), scan=scan, remat=remat)
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    expected = plain[1] if scan else unstacked(plain[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, expected)


def test_everything_that_is_given_matters(params, reference):
    apply = jax.jit(DiT(**SMALL).apply)
    for other in ((X + 1, T, LABEL), (X, T * 0.5 + 0.1, LABEL), (X, T, (LABEL + 1) % 4)):
        assert float(jnp.abs(apply(params, *other) - reference).max(axis=(1, 2, 3)).min()) > 1e-4
    # Examples do not see each other.
    np.testing.assert_allclose(apply(params, X[::-1], T[::-1], LABEL[::-1])[::-1], reference, atol=2e-5)


def test_qk_norm_and_backends(params, reference):
    np.testing.assert_allclose(jax.jit(DiT(**SMALL, backend="xla").apply)(params, X, T, LABEL), reference, atol=2e-5)
    normed = DiT(**SMALL, qk_norm=True)
    weights = filled(normed, X, T, LABEL)
    assert count(weights) == count(params) + 2 * 3 * 8  # a scale per head dimension, for queries and keys, in every layer
    apply = jax.jit(normed.apply)
    out = apply(weights, X, T, LABEL)
    assert np.isfinite(out).all()
    # Whatever the size of queries and keys, the scores stay bounded: scaling their product changes nothing.
    qkv = weights["params"]["blocks"]["attention"]["qkv"]
    for leaf in qkv.values():
        leaf.reshape(*leaf.shape[:-1], 2, 3, 8)[..., :2, :] *= 100  # features are ordered by head, then q, k, v
    np.testing.assert_allclose(apply(weights, X, T, LABEL), out, atol=1e-2 * float(jnp.abs(out).max()))


def test_bfloat16_activations_keep_float32_parameters(params, reference):
    net = DiT(**SMALL, dtype=jnp.bfloat16)
    start = jax.eval_shape(net.init, jax.random.key(1), X, T, LABEL)
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype("float32")}
    out = jax.jit(net.apply)(params, X, T, LABEL)
    assert out.dtype == jnp.float32
    assert float(jnp.abs(out - reference).max() / jnp.abs(reference).max()) < 0.05


def test_as_joint(params, reference):
    apply = as_joint(DiT(**SMALL))
    out = jax.jit(apply)(params, {"image": X, "label": LABEL}, {"image": T, "label": jnp.zeros(5)})
    assert set(out) == {"image"}
    np.testing.assert_allclose(out["image"], reference, atol=2e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="no DiT of size 'M'; choose one of S, B, L, XL"):
        DiT.preset("M", 2)
    with pytest.raises(ValueError, match="no remat policy 'all'; choose one of auto, none, some, dots, full"):
        DiT(**SMALL, remat="all").init(jax.random.key(0), X, T, LABEL)
    with pytest.raises(ValueError, match="do not tile"):
        DiT.preset("S", 3)
