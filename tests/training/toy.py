"""A config whose run takes a second: a two-layer network that denoises points, with all the noise from the examples' index."""

import ml_collections


def get_config():
    return ml_collections.ConfigDict(
        {
            "seed": 3,
            "model": {"width": 32},
            "train": {
                "steps": 40,
                "global_batch": 16,
                "microbatches": 1,
                "log_every": 4,
                "eval_every": 10,
                "checkpoint_every": 6,
                "keep": 2,
                "best": "",
                "ema": 0.99,
                "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
                "prefetch": 2,
                "tensorboard": False,
                "learning_rate": 1e-2,
                "delay": 0.0,  # seconds that a batch takes to read
            },
            "sample": {"steps": 2},
        }
    )


def init(key, width=32):
    first, second = (0.3 * key_part for key_part in _normals(key, (4, width), (width, 4)))
    return {"params": {"first": {"kernel": first}, "second": {"kernel": second}}}


def _normals(key, *shapes):
    import jax

    return [jax.random.normal(part, shape) for part, shape in zip(jax.random.split(key, len(shapes)), shapes)]


def loss(params, batch, key):
    """Mean squared error of denoising, with the noise and its size from fold_in(key, index)."""
    import jax
    import jax.numpy as jnp

    weights = params["params"]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    size = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (1,)))(keys)
    hidden = jnp.tanh((batch["x"] + size * noise) @ weights["first"]["kernel"])
    error = hidden @ weights["second"]["kernel"] - batch["x"]
    value = (error**2).mean()
    return value, {"loss/x": value, "error": jnp.abs(error).mean()}


def optimizer(rate=1e-2):
    import optax

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0, rate, 5, 100)))


def data(count, seed, delay=0.0):
    import time

    import numpy as np

    from mmdiff.data.sources import ArraySource

    class Slow(ArraySource):
        def take(self, indices):
            time.sleep(delay)
            return super().take(indices)

    return Slow({"x": np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)})


def build(config):
    import functools

    from jax.sharding import PartitionSpec

    from mmdiff.experiment import Experiment
    from mmdiff.processes import Process

    return Experiment(
        process=Process(),  # the loop asks it for nothing but a check of the data
        init=functools.partial(init, width=config.model.width),
        apply=None,
        loss=loss,
        optimizer=optimizer(config.train.learning_rate),
        train_data=functools.partial(data, 50, 0, config.train.delay),
        validation_data=functools.partial(data, 20, 1),
        test_data=functools.partial(data, 20, 2),
        shape={"x": (4,)},
        sample=None,
        modalities={},
        # The wide dimension of both kernels, over whatever axis there is.
        rules=(("first/kernel", PartitionSpec(None, ("fsdp", "tensor"))), ("second/kernel", PartitionSpec(("fsdp", "tensor")))),
    )
