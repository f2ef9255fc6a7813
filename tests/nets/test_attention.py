"""Attention: every backend computes the same thing."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.nets.attention import BACKENDS, attention
from mmdiff.nets.target import compiling_for

B, N, M, H, D = 2, 5, 7, 3, 8


def inputs(dtype=jnp.float32, keys=M):
    one, two, three = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(one, (B, N, H, D), dtype)
    return q, jax.random.normal(two, (B, keys, H, D), dtype), jax.random.normal(three, (B, keys, H, D), dtype)


def by_hand(q, k, v, mask=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(D)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


MASKS = {
    "none": None,
    "keys": np.arange(M) < 4,
    "per example": (np.arange(M) < np.asarray([[3], [6]]))[:, None, None],
    "full": np.random.default_rng(0).random((B, H, N, M)) < 0.7,
}


def test_tokens_that_are_split_over_devices_do_not_go_to_the_fused_kernel(monkeypatch):
    chosen = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, mask, implementation: chosen.append(implementation) or q)
    arrays = inputs(jnp.bfloat16)
    for axes in ({}, {"seq": 2}):
        with compiling_for("gpu", 2, axes=axes):
            attention(*arrays)
    assert chosen == ["cudnn"]


def missing(backend):
    """What a backend needs and is not there; None if it can run."""
    if backend == "tokamax" and not importlib.util.find_spec("tokamax"):
        return "needs the extra tokamax."
    return "cuDNN needs an NVIDIA GPU." if backend == "cudnn" and jax.default_backend() != "gpu" else None


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_backends_agree(backend, mask):
    if missing(backend):
        pytest.skip(missing(backend))
    dtype, tolerance = (jnp.bfloat16, 3e-2) if backend == "cudnn" else (jnp.float32, 2e-6)
    q, k, v = inputs(dtype)
    if backend in ("pallas", "splash") and mask == "full":
        pytest.skip("it takes masks of keys.")
    mask = MASKS[mask]
    out = attention(q, k, v, None if mask is None else jnp.asarray(mask), backend=backend)
    assert out.shape == q.shape and out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), by_hand(q, k, v, mask), atol=tolerance)


@pytest.mark.slow
def test_gradients_agree():
    q, k, v = inputs()
    mask = jnp.asarray(MASKS["full"])

    def gradient(backend):
        return jax.grad(lambda *x: (attention(*x, mask, backend=backend) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)

    one, two = gradient("reference"), gradient("xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_half_precision_keeps_its_softmax_in_float32(backend):
    """Scores of hundreds, which bfloat16 would round to steps of one and more."""
    q, k, v = inputs(jnp.bfloat16)
    out = attention(10 * q, k, v, backend=backend)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), by_hand(10 * q, k, v), atol=4e-2)


def test_a_hidden_key_has_no_influence():
    q, k, v = inputs()
    mask = jnp.asarray(MASKS["keys"])
    out = attention(q, k, v, mask)
    np.testing.assert_array_equal(out, attention(q, k.at[:, 4:].set(9.0), v.at[:, 4:].set(-9.0), mask))


def test_a_row_without_keys_stays_finite():
    q, k, v = inputs()
    mask = jnp.ones((B, 1, N, M), bool).at[0, 0, 0].set(False)
    out, gradient = jax.value_and_grad(lambda x: attention(x, k, v, mask, backend="reference").sum())(q)
    assert np.isfinite(out) and np.isfinite(gradient).all()
    np.testing.assert_allclose(attention(q, k, v, mask, backend="reference")[0, 0], v[0].mean(0), atol=1e-6)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="no backend 'flash'; choose one of reference, xla, cudnn, tokamax, pallas, splash"):
        attention(*inputs(), backend="flash")
