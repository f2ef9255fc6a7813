r"""Images as tokens: a small convolutional autoencoder with a codebook (VQ-VAE, van den Oord et al. 2017), and its loss.

    z = encoder(image)      e = codes[argmin_k |z - codes_k|]      image_hat = decoder(z + sg(e - z))
    loss = |image - image_hat|^2 + |sg(z) - e|^2 + beta |z - sg(e)|^2 + revival      (means; sg stops the gradient)

z and the codes lie on the unit sphere of a small space (Yu et al. 2022, ViT-VQGAN): distances are bounded, so beta has no scale to follow.
Encoding is deterministic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.microbatches import BatchLoss, Pieces
from mmdiff.nets.embed import Dense, patchify, unpatchify
from mmdiff.nets.fields import Network

GROUPS = 8  # of a GroupNorm


class Autoencoder(Network):
    """What tokenizers share. `setup` of a kind makes `encoder`, `codebook` [codes, code_size] and `decoder`; it has `grid` and `shape`.

        ids = net.apply(params, x, method="encode")
        x = net.apply(params, ids, method="decode")

    x is [B, *shape] in [-1, 1], tokens are int32 [B, L] in 0..codes-1, in raster order; L = product of `grid`.
    `__call__(x)` returns the ids and the reconstruction.
    """

    def __call__(self, x):
        ids = self.encode(x)
        return ids, self.decode(ids)

    def encode(self, x):
        """The tokens of examples: int32 [B, L]."""
        z, codes = self.embed(x)
        return nearest(z, codes).reshape(len(x), -1)

    def decode(self, ids):
        """The examples of tokens [B, L], within [-1, 1]."""
        e = self.entries()[ids].reshape(len(ids), -1, *self.grid[1:], self.code_size)
        return jnp.clip(self.render(e), -1, 1)

    def embed(self, x):
        """What is compared: the encoder's output [B, *grid, code_size] and the codes [codes, code_size], all of length 1."""
        return _unit(self.encoder(x)), self.entries()

    def entries(self):
        """The codes [codes, code_size], of length 1."""
        return _unit(self.codebook)

    def render(self, e):
        """Codes in their places [B, *grid, code_size] -> examples, not clipped: what the loss compares."""
        return self.decoder(e)


class VQAutoencoder(Autoencoder):
    """Images [B, height, width, channels] in [-1, 1] <-> tokens int32 [B, L] in 0..codes-1, in raster order; L = product of `grid`.

    Attributes:
      height, width, channels: the size of an image.
      codes, code_size: entries of the codebook and their dimension.
      halvings: how often the encoder halves both sides: 1 makes a token of 2 x 2 pixels, 4 one of 16 x 16.
      features: channels of the convolutions, a multiple of 8.
      multipliers: what `features` is multiplied by after each halving, (1, 1, 2, 4); 1 everywhere by default.
      encoder_blocks, decoder_blocks: residual blocks at every size. The fewer in the encoder, the more local a token is.

    >>> net = VQAutoencoder(8, 8, 3, codes=16, features=8)
    >>> ids, images = jax.eval_shape(lambda key: net.init_with_output(key, jnp.zeros((2, 8, 8, 3)))[0], jax.random.key(0))
    >>> ids.shape, images.shape
    ((2, 16), (2, 8, 8, 3))
    """

    height: int
    width: int
    channels: int = 3
    codes: int = 128
    code_size: int = 8
    halvings: int = 1
    features: int = 64
    encoder_blocks: int = 1
    decoder_blocks: int = 2
    multipliers: tuple[int, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens in a column and in a row."""
        return self.height >> self.halvings, self.width >> self.halvings

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image."""
        return self.height, self.width, self.channels

    def setup(self):
        factor = 2**self.halvings
        if self.height % factor or self.width % factor or self.features % GROUPS:
            raise UserError(
                f"a tokenizer with {self.halvings} halvings and {self.features} features does not fit images of {self.height} x "
                f"{self.width}: {factor} must divide both sides, and {GROUPS} the features."
            )
        multipliers = tuple(self.multipliers) or (1,) * self.halvings
        if len(multipliers) != self.halvings or min(multipliers, default=1) < 1:
            raise UserError(f"a tokenizer with {self.halvings} halvings needs as many positive multipliers, not {multipliers}.")
        widths = tuple(multiplier * self.features for multiplier in multipliers)
        self.encoder = Encoder(widths, self.encoder_blocks, self.code_size)
        self.codebook = self.param("codebook", nn.initializers.normal(0.1), (self.codes, self.code_size))
        self.decoder = Decoder(widths[::-1], self.decoder_blocks, self.channels)


class Encoder(nn.Module):
    """[B, H, W, C] -> [B, H / 2^n, W / 2^n, size], with `widths` channels after each of the n halvings."""

    widths: tuple[int, ...]
    blocks: int
    size: int

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            tokens = Dense(width, name=f"down_{i}")(patchify(x, 2))
            x = tokens.reshape(len(x), x.shape[1] // 2, x.shape[2] // 2, -1)
            for j in range(self.blocks):
                x = Residual(name=f"block_{i}_{j}")(x)
        return Dense(self.size, name="out")(_activate(x, "out_norm"))


class Decoder(nn.Module):
    """The decoder: [B, h, w, size] -> [B, h 2^n, w 2^n, channels], with `widths` channels before each of the n doublings."""

    widths: tuple[int, ...]
    blocks: int
    channels: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.widths[0], (3, 3), name="in")(x)
        for i, after in enumerate((*self.widths[1:], self.channels)):
            for j in range(self.blocks):
                x = Residual(name=f"block_{i}_{j}")(x)
            h = Dense(4 * after, name=f"up_{i}")(_activate(x, f"up_{i}_norm"))
            x = unpatchify(h.reshape(len(h), -1, h.shape[-1]), 2, 2 * h.shape[1], 2 * h.shape[2])
        return x


class Residual(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`."""

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        h = nn.Conv(features, (3, 3), name="conv_0")(_activate(x, "norm_0"))
        return x + nn.Conv(features, (3, 3), name="conv_1")(_activate(h, "norm_1"))


def _activate(x, name):
    return nn.silu(nn.GroupNorm(GROUPS, name=name)(x))


def _unit(x):
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)


# --------------------------------------------------------------------------------------------------------------- the loss


def nearest(z: jax.Array, codes: jax.Array) -> jax.Array:
    """The code that is nearest to each z [..., d] of all `codes` [K, d]: int32 [...]; of equally near ones the first; -1 if z is NaN."""
    found = ((codes**2).sum(-1) - 2 * z @ codes.T).argmin(-1)
    return jnp.where(jnp.isnan(z).any(-1), -1, found).astype(jnp.int32)


def straight_through(z: jax.Array, e: jax.Array) -> jax.Array:
    """`e`, with the gradient of the identity in z, and none in e.

    >>> [float(g) for g in jax.grad(lambda z, e: straight_through(z, e) ** 2, argnums=(0, 1))(1.0, 3.0)]
    [6.0, 0.0]
    """
    return z + jax.lax.stop_gradient(e - z)


def revival(z: jax.Array, codes: jax.Array, ids: jax.Array, keys: jax.Array) -> jax.Array:
    """Pulls every code that the batch does not use to an encoder output with a large error: `mean_k dead_k |codes_k - z_k|^2`.

    K outputs are sampled without replacement, with probabilities proportional to their squared distances to their codes (as k-means++
    chooses centres); z_k is the one nearest to codes_k. A code thus moves to one output until it is used there, which makes that output's
    error small. No gradient goes to the encoder.

    Args:
      z: encoder outputs [B, N, d]; ids: their codes [B, N].
      codes: [K, d].
      keys: one for each example, [B], so that the order of the batch does not matter.
    """
    return _revival(codes, *_revival_scores(z, codes, ids, keys))


def _revival_scores(z, codes, ids, keys):
    """(z, ids, scores), per example: the K outputs of the largest scores are sampled."""
    z, still = jax.lax.stop_gradient((z, codes))
    error = ((z - still[ids]) ** 2).sum(-1)
    # The largest of log weight + Gumbel noise are samples without replacement.
    return z, ids, jnp.log(error + 1e-12) + jax.vmap(lambda key: jax.random.gumbel(key, ids.shape[1:]))(keys)


def _revival(codes, z, ids, score):
    still = jax.lax.stop_gradient(codes)
    sampled = z.reshape(-1, z.shape[-1])[jax.lax.top_k(score.reshape(-1), min(len(codes), score.size))[1]]
    target = sampled[nearest(still, sampled)]
    dead = jnp.zeros(len(codes)).at[ids.reshape(-1)].set(1.0) == 0
    return jnp.where(dead, ((codes - target) ** 2).sum(-1), 0.0).mean()


def usage(counts: Any) -> tuple[jax.Array, jax.Array]:
    """(share, perplexity) of a codebook from how often each code came up, [K]: the share of codes in use, and exp(entropy) in 1..K."""
    p = counts / counts.sum()
    return (counts > 0).mean(), jnp.exp(-jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum())


@dataclasses.dataclass(frozen=True)
class Error:
    """What of its data a tokenizer loses.

    Attributes:
      measure: `(rendered, real) -> ` a pytree of arrays [B, ...], each example's own.
      reduce: that, of a whole batch -> {name: (weight, scalar)}.
    """

    measure: Callable[[jax.Array, jax.Array], Any]
    reduce: Callable[[Any], dict[str, tuple[float, jax.Array]]]


squared_error = Error(  # the mean over everything
    measure=lambda rendered, real: ((rendered - real) ** 2).reshape(len(real), -1).mean(1),
    reduce=lambda error: {"reconstruction": (1.0, error.mean())},
)


def vq_loss(
    net: Autoencoder, image: str = "image", commitment: float = 0.25, revive: float = 1.0, error: Error = squared_error
) -> BatchLoss:
    """The loss of an `Autoencoder`. Codes are unused by a whole batch, however many micro-batches it is computed in.

    Args:
      net: the network.
      image: its entry in the batch.
      commitment: beta, what moves the encoder to its codes.
      revive: the weight of `revival`; 0 leaves unused codes alone.
      error: what is lost.

    Metrics, all before their weights: those of `error` ("loss/reconstruction", squared error per channel of a pixel), "loss/codebook"
    and "loss/commitment" (the same number, with different gradients), "loss/revival"; and of the batch "codebook/usage" and
    "codebook/perplexity" (see `usage`).
    """

    def pieces(params, batch: Mapping[str, jax.Array], key, **_):
        images = batch[image]
        z, codes = net.apply(params, images, method="embed")
        ids = nearest(z, codes)
        e = codes[ids]
        rendered = net.apply(params, straight_through(z, e), method="render")
        stop = jax.lax.stop_gradient
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        rows = z.reshape(len(z), -1, z.shape[-1]), codes, ids.reshape(len(z), -1), keys
        parts = {
            "codebook": (1.0, ((e - stop(z)) ** 2).sum(-1).mean()),
            "commitment": (commitment, ((stop(e) - z) ** 2).sum(-1).mean()),
        }
        return Pieces(*_total(parts), (error.measure(rendered, images), _revival_scores(*rows)))

    def contrast(params, embeddings):
        measured, scores = embeddings
        codes = net.apply(params, method="entries")
        total, metrics = _total({**error.reduce(measured), "revival": (revive, _revival(codes, *scores))})
        share, perplexity = usage(jnp.zeros(len(codes)).at[scores[1].reshape(-1)].add(1.0))
        return Pieces(total, metrics | {"codebook/usage": share, "codebook/perplexity": perplexity})

    return BatchLoss(pieces=pieces, contrast=contrast)


def _total(parts: Mapping[str, tuple[float, jax.Array]]) -> tuple[jax.Array, dict[str, jax.Array]]:
    total = sum((weight * value for weight, value in parts.values() if weight), jnp.zeros(()))
    return total, {f"loss/{name}": value for name, (_, value) in parts.items()}
