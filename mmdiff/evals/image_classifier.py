"""An independent classifier of small images: a convolutional network, which never sees the diffusion model."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmdiff.data.network_cache import map_batched
from mmdiff.data.stored_images import values
from mmdiff.evals.evaluator import best

Classifier = Callable[[np.ndarray], np.ndarray]
BATCH, STEPS, RATE, DROPOUT = 128, 2000, 2e-3, 0.4
DESCRIPTION = (
    f"a convolutional network (3 x 3, 32 and 64 channels, each halved by its maximum; 128 hidden units, dropout {DROPOUT:g}), trained by "
    f"Adam in batches of {BATCH}, seed 0")


class Network(nn.Module):
    """Images [B, H, W, C] in [-1, 1] -> logits [B, classes]; with a `key`, hidden units are dropped as in training."""

    classes: int

    @nn.compact
    def __call__(self, x, key=None):
        for features in (32, 64):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        if key is not None:
            x = jnp.where(jax.random.bernoulli(key, 1 - DROPOUT, x.shape), x / (1 - DROPOUT), 0.0)
        return nn.Dense(self.classes)(x)


def trained(images: np.ndarray, labels: np.ndarray, classes: int = 10, steps: int = STEPS) -> Classifier:
    """A classifier `images uint8 [m, H, W, C] -> labels [m]`, -1 where several are equally likely, trained on images and labels [n]."""
    net, optimizer = Network(classes), optax.adam(optax.cosine_decay_schedule(RATE, steps))

    @jax.jit
    def step(params, state, images, labels, key):
        def loss(params):
            logits = net.apply(params, images, key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def predict(params, images):
        return net.apply(params, images)

    params = net.init(jax.random.key(0), jnp.zeros((1, *images.shape[1:])))
    state, keys = optimizer.init(params), jax.random.split(jax.random.key(1), steps)
    order = np.random.Generator(np.random.Philox(0))
    for number in range(steps):
        rows = order.integers(0, len(images), BATCH)
        params, state = step(params, state, values(images[rows]), labels[rows], keys[number])

    def classify(images):
        return best("logits", map_batched(lambda part: predict(params, part), values(images), min(500, len(images))))

    return classify
