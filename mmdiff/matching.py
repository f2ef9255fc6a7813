r"""Losses of embeddings: InfoNCE (CLIP) and sigmoid (SigLIP) losses over the whole batch, of denoised vectors or of two towers.

    query = process.parts["query"]                                          # a Gaussian of unit vectors
    losses.diffusion(process, net.apply, t, {"infonce": (1.0, embedding_loss(query, "query"))})
    losses.diffusion(process, towers.apply, t, {"siglip": (1.0, clip_loss(loss="siglip"))})

Both are terms that compare the examples of a batch (`losses.InBatchTerm`): all others of the global batch are negatives, on whatever
devices and in whatever micro-batches they are.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.losses import InBatchTerm, Term, on
from mmdiff.processes.base import Process


def embedding_loss(process: Process, of: str, loss: str = "infonce") -> InBatchTerm:
    r"""Which clean vector is the denoised one's? CLIP's loss with the belief about x_0 in the place of the image's vector (DiffDis).

        s_ij = scale cos(x0_hat_i, x_0j) + bias,
        infonce:  -1/2 (log softmax_j s_ij + log softmax_j s_ji) at j = i       (symmetric: by rows and by columns)
        siglip:   -sum_j log sigmoid(+-s_ij), + for j = i and for vectors equal to it      (Zhai et al. 2023)

    All other examples of the global batch are negatives, on whatever devices and in whatever micro-batches they are. No gradient reaches
    x_0. Equal vectors need no care in infonce: it has the gradient of the loss in which every copy is right, and a floor of mean
    log(number of copies). Its value without any information is log B, which a scale of 1 hardly lowers: hence the learned one.

    Args:
      process: of the modality, a `Gaussian` of vectors [B, D], whatever it predicts; with `norm=1.0`, for a longer x_0 gives itself away
        in x_t. Its own loss, `on(of, process.loss)`, is the regression on the same vectors.
      of: the modality's name in the joint pass. The network returns out["logit_scale"] and, for siglip, out["logit_bias"], [B] with
        equal entries: its learned numbers.
      loss: "infonce" or "siglip".

    Raises UserError for another loss.

    >>> from mmdiff import schedules
    >>> from mmdiff.processes import Gaussian, Joint, x0
    >>> process = Joint(query=Gaussian(schedules.cosine(), x0))
    >>> t, x = {"query": jnp.full(3, 0.5)}, {"query": jnp.eye(3)}
    >>> noised = jax.jit(process.corrupt)(jax.random.split(jax.random.key(0), 3), x, t)
    >>> out = {"query": jnp.eye(3), "logit_scale": jnp.full(3, 100.0)}      # right, and sure of it
    >>> jax.jit(embedding_loss(process.parts["query"], "query"))(out, noised).tolist()
    [0.0, 0.0, 0.0]
    """

    def embed(out, noised):
        part = noised.of(of)
        x0_hat, x0 = process.clean(out[of], part.xt, part.t), jax.lax.stop_gradient(part.x0)
        return l2_normalize(x0_hat), l2_normalize(x0), _logits(out)

    return InBatchTerm(embed, _compared(loss))


def terms(process: Process, of: str, loss: str = "infonce") -> dict[str, tuple[float, Term]]:
    """The terms of a loss of diffused embeddings: `embedding_loss` under its name, or with "mse" the regression on the same vectors."""
    return {loss: (1.0, on(of, process.loss) if loss == "mse" else embedding_loss(process, of, loss))}


def clip_loss(one: str = "image_vector", other: str = "text_vector", loss: str = "infonce") -> InBatchTerm:
    """CLIP's loss of two towers: `embedding_loss` with the network's output `one` for the belief and its output `other` for x_0.

    A term of conditions alone (`Given`), whose network returns out[one], out[other] [B, D], out["logit_scale"] and
    out["logit_bias"] [B]: `nets.TwoTowers`. Gradients reach both towers.
    """
    return InBatchTerm(lambda out, noised: (l2_normalize(out[one]), l2_normalize(out[other]), _logits(out)), _compared(loss))


def init_logits(loss: str) -> tuple[float, float]:
    """What the learned scale and bias start from: CLIP's (1 / 0.07, 0), of "siglip" (10, -10).

    >>> init_logits("siglip")
    (10.0, -10.0)
    """
    return (10.0, -10.0) if loss == "siglip" else (1 / 0.07, 0.0)


def _logits(out):
    return {name: out[name].astype(jnp.float32) for name in ("logit_scale", "logit_bias") if name in out}


def _compared(loss: str) -> Callable:
    """The comparison of `embedding_loss` as `(unit vectors [B, D], unit vectors [B, D], logits) -> [B]`."""
    if loss not in ("infonce", "siglip"):
        raise UserError(f"there is no loss of embeddings {loss!r}; choose infonce or siglip.")

    def values(embeddings):
        one, other, logits = embeddings
        scores = logits["logit_scale"][:, None] * jnp.matmul(one, other.T, precision=jax.lax.Precision.HIGHEST)
        if loss == "infonce":
            right = jnp.diagonal(scores)
            return 0.5 * (jax.nn.logsumexp(scores, axis=1) + jax.nn.logsumexp(scores, axis=0)) - right
        scores = scores + logits["logit_bias"][:, None]
        same = jnp.matmul(other, other.T, precision=jax.lax.Precision.HIGHEST) > 1 - 1e-6
        same |= jnp.eye(len(same), dtype=bool)  # a vector of zeros is like no other, and yet its own
        return -jax.nn.log_sigmoid(jnp.where(same, scores, -scores)).sum(1)

    return values


def l2_normalize(x: jax.Array) -> jax.Array:
    """x / |x| along the last dimension, float32, whatever the size of x; 0 stays 0, and all gradients are finite.

    >>> [f"{x:.1f}" for x in l2_normalize(jnp.array([3.0, 4.0]))]
    ['0.6', '0.8']
    """
    x = x.astype(jnp.float32)
    largest = jax.lax.stop_gradient(jnp.abs(x).max(-1, keepdims=True))  # 1e30 squared is infinite, 1e-30 squared is 0
    there = largest > 0
    x = x / jnp.where(there, largest, 1.0)
    return x * jax.lax.rsqrt(jnp.where(there, (x * x).sum(-1, keepdims=True), 1.0))
