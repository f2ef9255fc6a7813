"""A config whose training takes a second: linear maps instead of a network, on made-up digits."""

import ml_collections


def get_config():
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "train": {
                "steps": 4,
                "global_batch": 8,
                "microbatches": 1,
                "log_every": 2,
                "eval_every": 0,
                "checkpoint_every": 2,
                "keep": 2,
                "best": "",
                "ema": 0.9,
                "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
                "prefetch": 1,
                "tensorboard": False,
                "learning_rate": 1e-2,
            },
            "sample": {"steps": 2, "guidance": 1.0},
        }
    )


def build(config):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from mmdiff import losses, processes, sampling, schedules, times
    from mmdiff.data.modalities import Images, Labels
    from mmdiff.data.sources import ArraySource
    from mmdiff.experiment import Experiment

    process = processes.Joint(
        image=processes.Gaussian(schedules.flow(), processes.velocity), label=processes.absorbing(10)
    )
    shape = {"image": (8, 8, 1), "label": ()}

    def init(key):
        keys = jax.random.split(key)
        return {
            "params": {
                "image": 0.02 * jax.random.normal(keys[0], (11 + 64, 64)),
                "label": 0.02 * jax.random.normal(keys[1], (11 + 64, 10)),
            }
        }

    def apply(params, x, t):
        features = jnp.concatenate([x["image"].reshape(-1, 64), jax.nn.one_hot(x["label"], 11)], -1)
        out = {name: features @ weights for name, weights in params["params"].items()}
        return {"image": out["image"].reshape(-1, 8, 8, 1), "label": out["label"]}

    def draw(params, keys, given, *, steps, guidance, absent=()):
        guided = sampling.guided(apply, guidance, drop=("label",), process=process)
        grid = sampling.uniform_grid(steps)
        return sampling.sample(process, guided, params, keys, grid, shape, given=given, absent=absent)

    def measure(experiment, params, config, key, step):
        from mmdiff.evals.evaluator import EvalResult

        return EvalResult({"weight_norm": float(optax.tree.norm(params)), "seen": 3, "examples": len(experiment.test_data())})

    rng = np.random.default_rng(0)
    data = ArraySource(
        {
            "image": rng.uniform(-1, 1, (40, 8, 8, 1)).astype(np.float32),
            "label": rng.integers(0, 10, 40).astype(np.int32),
        }
    )
    return Experiment(
        process=process,
        init=init,
        apply=apply,
        loss=losses.diffusion(process, apply, times.joint(image=times.uniform(), label=times.uniform())),
        optimizer=optax.adam(config.train.learning_rate),
        train_data=lambda: data,
        validation_data=lambda: ArraySource({name: array[:24] for name, array in data.arrays.items()}),
        test_data=lambda: data,
        shape=shape,
        sample=draw,
        modalities={"image": Images(8, 8), "label": Labels(10)},
        evaluators=[measure],
    )
