"""configs/imagenet256/dit_xl2.py for tests of the whole road: three classes, one layer, latents of 16 x 16, shards of six examples.

With KILLED_AFTER=N in the environment a process ends by SIGKILL as soon as it has written N shards, of a cache or of a set of samples.
"""

import dataclasses
import importlib.util
import itertools
import os
import pathlib
import signal

from mmdiff.data import shards
from mmdiff.data.encoded import EncodedCache
from mmdiff.nets.dit import SIZES

SIZES["XXS"] = (1, 32, 2)
SPEC = importlib.util.spec_from_file_location("full", pathlib.Path(__file__).parents[1] / "configs/imagenet256/dit_xl2.py")
full = importlib.util.module_from_spec(SPEC)  # a copy of its own, in which classes can be fewer
SPEC.loader.exec_module(full)
full.CLASSES = 3

if "KILLED_AFTER" in os.environ:
    write, written = shards.write, itertools.count(1)

    def killed(*args):
        found = write(*args)
        if next(written) == int(os.environ["KILLED_AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    shards.write = killed


class ShortShards(EncodedCache):
    shard = 6


def get_config():
    config = full.get_config()
    config.model.update({"size": "XXS", "patch": 4, "image": 16, "dtype": "float32", "scan": False})
    config.train.update({
        "steps": 4, "global_batch": 8, "log_every": 2, "eval_every": 0, "checkpoint_every": 4, "tensorboard": False, "learning_rate": 1e-2,
        "ema": 0.5})  # fmt: skip
    config.sample.update({"steps": 2})
    return config


def build(config):
    experiment = full.build(config)
    cache = ShortShards(**{field.name: getattr(experiment.cache, field.name) for field in dataclasses.fields(EncodedCache)})
    return dataclasses.replace(experiment, cache=cache)
