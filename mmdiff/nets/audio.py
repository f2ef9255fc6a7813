r"""Sound as tokens: a VQ autoencoder for waveforms with the hops and the codebook of Jukebox's (Dhariwal et al. 2020), and its loss.

    loss = |x - x'|^2 / |x|^2  +  mean over window sizes of ( |S - S'| / |S|  +  mean |log S - log S'| )  +  what `nets.tokenizers` adds

S are the magnitudes of short-time spectra (Yamamoto et al. 2020). Ratios are of the batch's norms, so loudness has no part in the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.errors import UserError
from mmdiff.microbatches import BatchLoss
from mmdiff.nets.embed import Dense
from mmdiff.nets.tokenizers import Autoencoder, Error, vq_loss

HOPS = 8, 32, 128  # samples for a position of Jukebox's three levels
MU = 255
FLOOR = 1e-3  # of a magnitude under the logarithm; a full sine has 0.5


class AudioAutoencoder(Autoencoder):
    """Waveforms [B, samples] in [-1, 1] <-> tokens int32 [B, samples / hop] in 0..codes-1: 44,032 samples are 344 tokens of 128.

    Any number of samples that the hop divides is encoded; an example has `samples`. Jukebox's stacks of convolutions of stride 2 are here
    one product for each level (stride 8, 4, 4), with residual blocks before and after it.

    Attributes:
      samples: of an example.
      hop: samples for a token: 8, 32 or 128, which take one, two or three levels.
      codes, code_size: entries of the codebook and their dimension.
      widths: channels at 8, 32 and 128 samples for a position.
      encoder_blocks, decoder_blocks: residual blocks there, with dilations 1, 3, 9, ... At the last level many are cheap in the decoder;
        they let a token encode the onset of a sound, and the tokens after it little.
    """

    samples: int
    hop: int = 128
    codes: int = 2048
    code_size: int = 64
    widths: Sequence[int] = (32, 64, 128)
    encoder_blocks: Sequence[int] = (1, 1, 2)
    decoder_blocks: Sequence[int] = (1, 2, 4)

    @property
    def grid(self) -> tuple[int]:
        """Tokens of an example."""
        return (self.samples // self.hop,)

    @property
    def shape(self) -> tuple[int]:
        """The shape of an example."""
        return (self.samples,)

    def setup(self):
        levels = [tuple(levels) for levels in (self.widths, self.encoder_blocks, self.decoder_blocks)]
        if self.hop not in HOPS or self.samples % self.hop or {len(HOPS)} != set(map(len, levels)):
            raise UserError(
                f"an audio tokenizer has a hop of {', '.join(map(str, HOPS))} samples, which divides those of an example, and a width and "
                f"two numbers of blocks for each of these, not a hop of {self.hop} of {self.samples} samples, and {levels}."
            )
        count = HOPS.index(self.hop) + 1
        strides = tuple(b // a for a, b in pairwise((1, *HOPS)))[:count]
        widths, encoder_blocks, decoder_blocks = (levels[:count] for levels in levels)
        self.encoder = Encoder(strides, widths, encoder_blocks, self.code_size)
        self.codebook = self.param("codebook", nn.initializers.normal(0.1), (self.codes, self.code_size))
        self.decoder = Decoder(strides[::-1], widths[::-1], decoder_blocks[::-1])


class Encoder(nn.Module):
    """[B, samples] -> [B, samples / product of strides, size]. Its input is the samples and their mu-law, in which quiet ones count."""

    strides: Sequence[int]
    widths: Sequence[int]
    blocks: Sequence[int]
    size: int

    @nn.compact
    def __call__(self, x):
        x = jnp.stack([x, jnp.sign(x) * jnp.log1p(MU * jnp.abs(x)) / np.log1p(MU)], -1)
        for i, (stride, width, blocks) in enumerate(zip(self.strides, self.widths, self.blocks)):
            x = Dense(width, name=f"down_{i}")(x.reshape(len(x), x.shape[1] // stride, -1))
            for j in range(blocks):
                x = Residual(3**j, name=f"block_{i}_{j}")(x)
        return Dense(self.size, name="out")(nn.silu(x))


class Decoder(nn.Module):
    """The decoder: [B, length, size] -> [B, length * product of strides]."""

    strides: Sequence[int]
    widths: Sequence[int]
    blocks: Sequence[int]

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.widths[0], (3,), name="in")(x)
        for i, (stride, after, blocks) in enumerate(zip(self.strides, (*self.widths[1:], 1), self.blocks)):
            for j in reversed(range(blocks)):
                x = Residual(3**j, name=f"block_{i}_{j}")(x)
            x = Dense(stride * after, name=f"up_{i}")(nn.silu(x)).reshape(len(x), -1, after)
        return x[..., 0]


class Residual(nn.Module):
    """`x + dense(silu(conv(silu(x))))`, as Jukebox's, without norms. The last product starts at zero."""

    dilation: int

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(x.shape[-1], (3,), kernel_dilation=self.dilation, name="conv")(nn.silu(x))
        return x + Dense(x.shape[-1], kernel_init=nn.initializers.zeros, name="out")(nn.silu(h))


def magnitudes(x: jax.Array, size: int) -> jax.Array:
    """The spectra of waveforms [B, samples] under Hann windows of `size` samples, a quarter of it apart: [B, windows, size / 2 + 1].

    A sine of amplitude 1 has 0.5 at its frequency. Half a window of silence is added at both ends.
    """
    hop = size // 4
    x = jnp.pad(x, ((0, 0), (size // 2, size // 2 + -x.shape[1] % hop)))
    blocks = x.reshape(len(x), -1, hop)
    count = blocks.shape[1] - 3
    window = np.hanning(size + 1)[:-1]
    windows = jnp.concatenate([blocks[:, i : i + count] for i in range(4)], -1) * (window / window.sum()).astype(np.float32)
    spectra = jnp.fft.rfft(windows)
    return jnp.sqrt(spectra.real**2 + spectra.imag**2 + 1e-12)  # a root has no gradient at 0


def spectral_error(rendered: jax.Array, real: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """The part of the loss (see above) that compares spectra, for windows of `sizes`."""
    return _spectral_error(_spectral_sums(rendered, real, sizes))


def _spectral_sums(rendered, real, sizes):
    """Of each size and example: the power of the error and of the sound, and the mean difference of logarithms; three times [B]."""

    def sums(size):
        found, true = magnitudes(rendered, size), magnitudes(real, size)
        logs = jnp.abs(jnp.log(found + FLOOR) - jnp.log(true + FLOOR))
        return ((found - true) ** 2).sum((1, 2)), (true**2).sum((1, 2)), logs.mean((1, 2))

    return [sums(size) for size in sizes]


def _spectral_error(sums):
    return sum(jnp.sqrt(error.sum() / (power.sum() + 1e-12) + 1e-12) + logs.mean() for error, power, logs in sums) / len(sums)


def audio_loss(
    net: AudioAutoencoder,
    audio: str = "audio",
    crop: int = 0,
    waveform: float = 1.0,
    spectral: float = 1.0,
    windows: Sequence[int] = (2048, 512, 128),
    **options: float,
) -> BatchLoss:
    """The loss of an `AudioAutoencoder`.

    Args:
      net: the network.
      audio: its entry in the batch.
      crop: train on so many samples of every example, from a random border of its tokens on; 0 takes all.
      waveform, spectral: weights of the two errors.
      windows: the sizes of the spectra's windows in samples.
      options: `commitment` and `revive`, see `vq_loss`.

    Metrics as of `vq_loss`, with "loss/waveform" (a share of the music's power) and "loss/spectral".
    """
    if crop % net.hop or not 0 <= crop <= net.samples:
        raise UserError(f"crops of {crop} samples do not fit a tokenizer with {net.hop} for a token and {net.samples} for an example.")

    def measure(rendered, real):
        return ((rendered - real) ** 2).sum(1), (real**2).sum(1), _spectral_sums(rendered, real, windows)

    def reduce(measured):
        lost, power, spectra = measured
        return {"waveform": (waveform, lost.sum() / (power.sum() + 1e-12)), "spectral": (spectral, _spectral_error(spectra))}

    loss = vq_loss(net, audio, error=Error(measure, reduce), **options)
    if not crop:
        return loss

    def cut(key, x):
        start = net.hop * jax.random.randint(key, (), 0, (net.samples - crop) // net.hop + 1)
        return jax.lax.dynamic_slice(x, (start,), (crop,))

    def cropped(params, batch: Mapping[str, jax.Array], key, **given):
        cut_key, key = jax.random.split(key)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(cut_key, batch["index"])
        return loss.pieces(params, {**batch, audio: jax.vmap(cut)(keys, batch[audio])}, key, **given)

    return dataclasses.replace(loss, pieces=cropped)
