"""A config of every modality and every reader of data, with a network of one number: enough for what is said of wrong data."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"source": "arrays", "name": "", "dir": "", "classes": 3, "size": 8},
        "model": {"width": 8, "depth": 1, "heads": 2, "patch": 2, "dtype": "float32", "remat": "none", "mlp_ratio": 4.0},
        "times": {"joint": 0.5, "alone": 0.5},
        "loss": {"auxiliary": 5e-4, "count": 10, "windows": (64, 32)},
        "dropout": 0.1, "label_weight": 0.4, "temperature": 1.0, "kappa": 1.0, "chain": {"steps": 8},
        "train": {
            "steps": 2, "global_batch": 8, "microbatches": 1, "ema": 0.9, "start": "", "best": "", "learning_rate": 1e-3, "warmup_steps": 0,
            "weight_decay": 0.0, "clip": 1.0, "log_every": 1, "eval_every": 0, "checkpoint_every": 2, "keep": 2, "prefetch": 1,
            "tensorboard": False, "scale_rule": "none", "mesh": {"slices": 1, "data": -1, "fsdp": 1, "seq": 1, "tensor": 1},
        },
        "sample": {"steps": 2, "guidance": 1.0, "top_p": 0.9},
        "eval": {"batch": 8, "examples": 4, "sampling_steps": (2, 1)},
    })  # fmt: skip


def build(config):
    import jax.numpy as jnp
    import optax

    from mmdiff.data import bpe, image_datasets, latents, modalities, token_cache, token_modalities
    from mmdiff.experiment import Experiment
    from mmdiff.processes import Given, Joint
    from mmdiff.projects.dance import sounds
    from mmdiff.projects.pairs import paired

    data = config.data
    labels = modalities.Labels(data.classes)
    tokenizer = bpe.train(["a small red seven", "a large blue one"], 12)
    readers = {
        "tokens": lambda split: token_cache.open_tokens(data, split, {"tokens": token_modalities.TokenImages(2, 2, 16), "label": labels}),
        "latents": lambda split: latents.open_source(data, split, {"image": modalities.Latents(2, 2, 4), "label": labels}),
        "images": lambda split: image_datasets.open_image_dataset(data, split, data.size),
        "captions": lambda split: image_datasets.open_image_dataset(data, split, data.size, tokenizer),
        "pairs": lambda split: paired.open_pairs(data, split, data.size),
    }
    parts = {
        "image": modalities.Images(8, 8, 3),
        "grey": modalities.Images(8, 8, 1, name="grey"),
        "latent": modalities.Latents(2, 2, 4, name="latent"),
        "feature": modalities.Features(5, name="feature"),
        "label": modalities.Labels(3, ("cat", "dog", "hen")),
        "row": token_modalities.Sequences(3, 16, name="row"),
        "tokens": token_modalities.TokenImages(2, 2, 16),
        "map": token_modalities.ClassMaps(8, 8, ((0, 0, 0), (255, 0, 0)), name="map"),
        "text": token_modalities.Texts(tokenizer),
        "audio": sounds.Waveforms(64),
        "motion": sounds.Motion(4, 24),
        "music": sounds.TokenAudio(4, 16, None),
        "rest": modalities.Labels(2, name="rest"),
    }

    def source(split):
        return readers[data.source](split)

    def loss(params, batch, key):
        return params["one"].sum(), {}

    def draw(params, keys, given, *, steps, guidance, absent=()):
        return {"rest": jnp.zeros(len(keys), jnp.int32)}

    return Experiment(
        process=Joint(**{name: Given(0) for name in parts}),
        init=lambda key: {"one": jnp.zeros(1)},
        apply=lambda params, x, t: {},
        loss=loss,
        optimizer=optax.sgd(config.train.learning_rate),
        train_data=lambda: source("train"),
        validation_data=lambda: source("val"),
        test_data=lambda: source("val"),
        shape={name: modality.shape for name, modality in parts.items()},
        sample=draw,
        modalities=parts,
        evaluators=[lambda experiment, params, config, key, step: None],
    )
