"""Logits in chunks: the values, gradients and samples of whole ones, at a fraction of the memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import integers, normal

from mmdiff import losses, nets, processes, schedules, times
from mmdiff.contrastive import cdcd, contrast, infonce, table
from mmdiff.errors import UserError
from mmdiff.experiment import Experiment
from mmdiff.lazy_logits import LazyLogits, as_arrays
from mmdiff.processes import Given, Joint, MaskReplace, Noised, absorbing, discrete, uniform

T, K, B, N, W = 8, 5, 4, 3, 6
HIDDEN, KERNEL, BIAS = normal(0, (B, 7, W)), 3.0 * normal(1, (W, K)), normal(2, (K,))
X0, Z = integers(3, (B, 7), 0, K), integers(4, (B, N, 7), 0, K)
GRID = np.float32([1 / T, 0.5, 1.0, 0.0])
PROCESSES = {
    "absorbing": absorbing(K), "uniform": uniform(K), "mixed": processes.mixed(K, 0.5),
    "mask and replace": MaskReplace(K, schedules.vqd_paper(T)), "with evidence": MaskReplace(K, schedules.vqd_paper(T), evidence=True),
    "markov": processes.Markov(np.full((T, K, K), 0.02) + 0.9 * np.eye(K)),
}  # fmt: skip


slow = [pytest.param(name, (7,), marks=pytest.mark.slow) for name in ("absorbing", "uniform", "mixed", "mask and replace", "markov")]


@pytest.mark.parametrize("name, shape", [("with evidence", (7, 1)), *slow])
def test_every_term_and_its_gradient_are_those_of_whole_logits(name, shape):
    """Seven tokens in chunks of three and one, of every kind of chain, where x_t rules classes out and where it does not."""
    process = PROCESSES[name]
    x0 = X0.reshape(B, *shape)
    corrupted = jax.jit(process.corrupt)(jax.random.split(jax.random.key(5), B), x0, GRID)
    noised = Noised(x0, corrupted.xt, GRID, batch={"negatives": Z.reshape(B, N, *shape)}, key=jax.random.key(6))
    terms = {
        "own": process.loss, "ce": losses.x0_ce(process), "vlb": losses.vlb(process, T), "rate": losses.vlb(process),
        "contrast": contrast(process, losses.vlb(process, T), table("negatives"), infonce()),
    }  # fmt: skip

    def values(lazy, weights):
        hidden, kernel, bias = weights
        out = LazyLogits(hidden.reshape(B, *shape, W), kernel, bias, chunks=3, dtype=jnp.float32)
        return {name: term(out if lazy else out.whole(), noised) for name, term in terms.items()}

    def both(weights):
        pulled = []
        for lazy in (True, False):
            found, pull = jax.vjp(lambda weights, lazy=lazy: values(lazy, weights), weights)
            pulled.append((found, pull(jax.tree.map(lambda value: jnp.arange(1.0, 1.0 + B), found))))
        return pulled

    lazy, whole = jax.jit(both)((HIDDEN, KERNEL, BIAS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6 * max(1.0, np.abs(b).max())), lazy, whole)
    assert all(np.abs(value).max() > 0.01 for value in jax.tree.leaves(whole))


def test_samples_of_many_states_are_those_of_the_whole_table(monkeypatch):
    keys, x0, t = jax.random.split(jax.random.key(7), B), integers(8, (B, 23, 2), 0, K), np.float32([0.3, 0.6, 1.0, 0.0])
    for process in (PROCESSES["absorbing"], PROCESSES["uniform"], PROCESSES["mask and replace"]):
        whole = jax.jit(process.corrupt)(keys, x0, t).xt
        with monkeypatch.context() as patch:
            patch.setattr(discrete, "WIDE", 4)
            patch.setattr(discrete, "ENTRIES", 10 * process.states)  # tokens of a chunk
            by_chunks = jax.jit(lambda *args, process=process: process.corrupt(*args))(keys, x0, t).xt
        assert by_chunks.shape == x0.shape and np.array_equal(whole, by_chunks)
        assert not np.array_equal(whole, x0)


TOKENS = MaskReplace(K, schedules.vqd_paper(T))
PROCESS = Joint(tokens=TOKENS, label=Given(null=3))
SMALL = dict(classes=K, grid=(2, 5), labels=4, depth=1, width=8, heads=1, times=T, scan=False)


def cdcd_loss(net):
    noise_levels = times.conditional("label", dropout=0.2, tokens=times.on_grid(T))
    return losses.diffusion(PROCESS, net.apply, noise_levels, cdcd(TOKENS, T, step_intra=0.1, chunks=2, of="tokens", given="label"))


@pytest.fixture(scope="module")
def networks():
    """Networks with whole logits and logits in chunks, their parameters and an input."""
    nets_of = [nets.TokenTransformer(**SMALL, logit_chunks=chunks) for chunks in (0, 4)]
    x, t = {"tokens": integers(9, (B, 10), 0, K), "label": jnp.arange(B) % 3}, {"tokens": jnp.full(B, 0.5), "label": jnp.zeros(B)}
    params = [jax.jit(net.init)(jax.random.key(0), x, t) for net in nets_of]
    jax.tree.map(np.testing.assert_array_equal, *params)
    return nets_of, params[0], x, t


def experiment_of(net):
    return Experiment(process=PROCESS, net=net, modalities={}, loss=cdcd_loss(net), optimizer=None, shape={"tokens": (10,), "label": ()})


def test_an_experiment_computes_them_whole(networks):
    nets_of, params, x, t = networks
    whole, lazy = (jax.jit(experiment_of(net).apply)(params, x, t)["tokens"] for net in nets_of)
    np.testing.assert_allclose(lazy, whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="logits in chunks are of single tokens"):
        nets.TokenTransformer(**{**SMALL, "grid": (2, 4)}, patch=2, logit_chunks=4).init(jax.random.key(0), x, t)


@pytest.mark.slow
def test_a_network_has_the_same_loss_gradient_and_samples_with_either(networks):
    nets_of, params, x, _ = networks
    batch = {**x, "index": np.arange(B, dtype=np.uint32)}
    both = [jax.jit(jax.value_and_grad(cdcd_loss(net), has_aux=True))(params, batch, jax.random.key(1)) for net in nets_of]
    for whole, lazy in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(lazy, whole, rtol=1e-5, atol=1e-6 * max(1.0, np.abs(whole).max()))

    def sample(keys, net):
        return experiment_of(net).sample(params, keys, {"label": x["label"]}, steps=2, guidance=2.0)["tokens"]

    keys = jax.random.split(jax.random.key(2), B)
    np.testing.assert_array_equal(*(jax.jit(functools.partial(sample, net=net))(keys) for net in nets_of))


@pytest.mark.slow
def test_a_stream_of_tokens_has_the_same_logits_with_either():
    streams = {"text": nets.Tokens(6, states=K + 1, classes=K)}
    lazy = {"text": nets.Tokens(6, states=K + 1, classes=K, logit_chunks=2)}
    options = dict(depth=1, width=8, heads=1, scan=False, dtype=jnp.bfloat16)
    x, t = {"text": integers(10, (B, 6), 0, K)}, {"text": jnp.full(B, 0.5)}
    whole, chunked = nets.MMDiT(streams, **options), nets.MMDiT(lazy, **options)
    params = jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(whole.init)(jax.random.key(0), x, t))
    out, logits = jax.jit(chunked.apply)(params, x, t)["text"], jax.jit(whole.apply)(params, x, t)["text"]
    assert out.shape == logits.shape and isinstance(out, LazyLogits) and out.kernel.dtype == jnp.float32
    np.testing.assert_allclose(as_arrays(out), logits, rtol=0.02, atol=0.02)  # a rounding to bfloat16 less


def test_memory_is_a_chunk_s():
    """The loss with its corruption and gradient, compiled: CDCD's terms of 64 tokens and CLIP's vocabulary."""
    classes = 49_408
    process = MaskReplace(classes, schedules.vqd_released(T))
    terms = cdcd(process, T, step_intra=5e-5, count=2, chunks=2)
    sizes = []
    for chunks in (0, 32):
        def apply(params, x, t, chunks=chunks):
            h = params["embedding"][jnp.minimum(x, 15)]
            out = LazyLogits(h, params["kernel"], params["bias"], max(1, chunks), jnp.float32)
            return out if chunks else out.whole()

        loss = losses.diffusion(process, apply, times.on_grid(T), terms)
        shapes = {"embedding": (16, 4), "kernel": (4, classes), "bias": (classes,)}
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        batch = {"x0": jax.ShapeDtypeStruct((2, 64), jnp.int32), "index": jax.ShapeDtypeStruct((2,), jnp.uint32)}
        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(params, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[0] > 4 * 2 * 64 * classes * 4 and sizes[1] <= sizes[0] / 8, sizes
