"""The autoencoder of waveforms: lengths, locality and crops, spectra of known sounds, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import uniform

from mmdiff.errors import UserError
from mmdiff.nets.audio import AudioAutoencoder, audio_loss, magnitudes, spectral_error
from mmdiff.training.accumulation import make_gradient
from mmdiff.training.step import init_state, make_step

KEY = jax.random.key(1, impl="rbg")  # its numbers take less time to compile
SMALL = {"codes": 16, "code_size": 4, "widths": (4, 4, 8), "encoder_blocks": (1, 1, 1), "decoder_blocks": (1, 1, 1)}
NET = AudioAutoencoder(1024, **SMALL)
BATCH = {"audio": uniform(0, (4, 1024)), "index": jnp.arange(4, dtype=jnp.uint32)}


@functools.cache
def weights():
    params = jax.jit(NET.init)(KEY, BATCH["audio"])
    # The residual blocks start as the identity.
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), params)


@functools.cache
def compiled(method):
    return jax.jit(lambda params, x: NET.apply(params, x, method=method))


def test_two_seconds_are_344_tokens_and_back():
    net = AudioAutoencoder(44_032)
    assert net.grid == (344,) and net.shape == (44_032,)
    ids, audio = jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((3, 44_032)))[0]
    assert ids.shape == (3, 344) and ids.dtype == jnp.int32 and audio.shape == (3, 44_032) and audio.dtype == jnp.float32
    codebook = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 44_032)))["params"]["codebook"]
    assert codebook.shape == (2048, 64)  # Jukebox's


@pytest.mark.parametrize("hop, tokens", [(8, 128), (32, 32), (128, 8)])
def test_hops(hop, tokens):
    net = AudioAutoencoder(1024, hop, **SMALL)
    ids, audio = jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 1024)))[0]
    assert net.grid == (tokens,) and ids.shape == (2, tokens) and audio.shape == (2, 1024)


@pytest.mark.parametrize("net", [AudioAutoencoder(1024, 16), AudioAutoencoder(1000), AudioAutoencoder(1024, widths=(32, 64))])
def test_sizes_that_do_not_fit(net):
    with pytest.raises(UserError, match="an audio tokenizer has a hop of 8, 32, 128 samples"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, net.samples)))


def test_tokens_speak_of_their_own_place_at_any_length():
    ids = compiled("encode")(weights(), BATCH["audio"])
    audio = compiled("decode")(weights(), ids)
    assert len(np.unique(ids)) > 1 and jnp.abs(audio).max() <= 1
    # A sound that begins later by whole tokens has the same tokens later, where the ends are far.
    late = compiled("encode")(weights(), jnp.pad(BATCH["audio"], ((0, 0), (512, 0))))
    np.testing.assert_array_equal(late[:, 6:10], ids[:, 2:6])
    # A token changes the sound around it alone.
    changed = compiled("decode")(weights(), ids.at[0, 6].add(1) % 16) - audio
    assert float(jnp.abs(changed[0, 768:896]).max()) > 1e-3 and float(jnp.abs(changed[0, :384]).max()) == 0
    assert float(jnp.abs(changed[1:]).max()) == 0


def test_magnitudes_of_a_sine():
    t = np.arange(4096)
    found = magnitudes(jnp.asarray(np.stack([np.sin(2 * np.pi * t * 16 / 256), np.zeros(4096)])), 256)
    assert found.shape == (2, 4096 // 64 + 1, 129)
    inside = np.asarray(found[0, 2:-2])
    assert (inside.argmax(-1) == 16).all()
    np.testing.assert_allclose(inside[:, 16], 0.5, atol=1e-4)
    assert inside[:, :14].max() < 1e-4 and found[1].max() < 1e-5


def test_spectral_error():
    x = BATCH["audio"]
    error = jax.jit(jax.value_and_grad(lambda y, x: spectral_error(y, x, (256, 64))))
    assert error(x, x)[0] < 1e-5 and error(-x, x)[0] < 1e-5  # spectra have no sign
    # Half as loud: half the magnitude is missing, and log 2 everywhere.
    assert float(error(x / 2, x)[0]) == pytest.approx(0.5 + np.log(2), rel=0.05)
    assert np.isfinite(error(0 * x, 0 * x)[1]).all()


def test_crops_begin_at_tokens():
    cropped = jax.jit(audio_loss(NET, crop=256, windows=(64,)))
    # Music of one kind of token: wherever a crop begins at a token's border, it is the same.
    batch = {**BATCH, "audio": jnp.tile(BATCH["audio"][:, :128], (1, 8))}
    losses = [cropped(weights(), batch, jax.random.key(seed))[1]["loss/waveform"] for seed in range(3)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    losses = [cropped(weights(), BATCH, jax.random.key(seed))[1]["loss/waveform"] for seed in range(3)]
    assert np.ptp(losses) > 1e-4
    for crop in (100, 2048):
        with pytest.raises(UserError, match=f"crops of {crop} samples do not fit"):
            audio_loss(NET, crop=crop)


@pytest.mark.slow
def test_loudness_is_the_batch_s_and_not_a_micro_batch_s():
    loss = audio_loss(NET, crop=256, windows=(64,))
    batch = {**BATCH, "audio": BATCH["audio"] * jnp.asarray([1.0, 0.01, 0.5, 0.1])[:, None]}
    one, many = (jax.jit(make_gradient(loss, m))(weights(), batch, jax.random.key(3))[0] for m in (1, 2))
    for found, expected in zip(many[:2], one[:2]):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)
    size = float(optax.tree.norm(one[2]))
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, one[2], many[2]))) < 1e-5 * size


@pytest.mark.slow
def test_it_learns_by_the_ordinary_step():
    t = np.arange(1024)
    audio = np.stack([0.5 * np.sin(2 * np.pi * t * k / 128) * (t // 256 % 2 == i % 2) for i, k in enumerate((2, 4, 8, 16))])
    batch = {"audio": jnp.asarray(audio, jnp.float32), "index": jnp.arange(4, dtype=jnp.uint32)}
    net = AudioAutoencoder(1024, 128, 16, 4, (8, 16, 32), (1, 0, 0), (1, 0, 1))
    loss, optimizer = audio_loss(net, windows=(256,)), optax.adam(5e-3)
    state = jax.jit(lambda key: init_state(lambda key: net.init(key, batch["audio"]), optimizer, key, loss))(jax.random.key(9))
    step, found = jax.jit(make_step(loss, optimizer, ema=0.9)), []
    for _ in range(180):
        state, metrics = step(state, batch)
        found.append((float(metrics["loss/waveform"]), float(metrics["loss/spectral"])))
    assert found[-1][0] < 0.1 < 0.8 < found[0][0] and found[-1][1] < 0.5 * found[0][1], found[::20]
    assert int(state.stats["skipped"]) == 0
