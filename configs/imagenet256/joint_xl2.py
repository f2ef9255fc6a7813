"""Joint image-label diffusion of XL size on 32x32x4 latents of 256-pixel ImageNet: one set of weights for pairs, images and labels.

    python -m mmdiff train  --config configs/imagenet256/joint_xl2.py --workdir runs/joint_xl2 --config.data.dir=latents/imagenet256
    python -m mmdiff sample --config configs/imagenet256/joint_xl2.py --workdir runs/joint_xl2 --given label=207
    python -m mmdiff sample --config configs/imagenet256/joint_xl2.py --workdir runs/joint_xl2 --given image=latents.npy

Data: a latent cache (mmdiff/data/latents.py); config.data.source=random makes up latents of the same shapes and needs nothing.

configs/digits_joint.py at the size of DiT-XL/2: an MMDiT whose streams share their weights, the label one more token. Image: flow
matching, velocity. Label: absorbing diffusion, x_0 cross-entropy. The shares of the times lean further to class-conditional images.

Expected: nothing has been published or measured for it yet. Cost: 679M parameters, about the compute of DiT-XL/2.
"""

from functools import partial

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mmdiff import losses, nets, sampling, schedules, times
from mmdiff.data.latents import open_source
from mmdiff.data.modalities import Labels, Latents
from mmdiff.experiment import Experiment, initialiser
from mmdiff.processes import Gaussian, Joint, absorbing, velocity
from mmdiff.training import optim

CLASSES = 1000


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"source": "latents", "dir": ""},  # or random
        "model": {"size": "XL", "patch": 2, "dtype": "bfloat16", "remat": "none", "scan": True},
        # Shares of the training times: both noisy; image given label; label given image; label given a noisy image; image without label.
        "times": {"joint": 0.2, "image_given_label": 0.5, "label_given_image": 0.05, "label_given_noisy": 0.15, "image_alone": 0.1},
        "label_weight": 0.1,
        "train": {
            "steps": 400_000, "global_batch": 256, "microbatches": 1, "ema": 0.9999, "start": "",
            "learning_rate": 1e-4, "base_batch": 256, "scale_rule": "none", "warmup_steps": 1_000, "weight_decay": 0.0, "clip": 1.0,
            "noise_scale": False, "norm_groups": (),
            "log_every": 100, "eval_every": 50_000, "checkpoint_every": 5_000, "keep": 2, "best": "", "prefetch": 4, "tensorboard": True,
            "mesh": {"slices": 1, "data": -1, "fsdp": 1, "seq": 1, "tensor": 1},
        },
        "sample": {"steps": 50, "guidance": 1.5},
    })


def early(t):
    """Joint samples settle their label in the first half of the trajectory, while the image is still mostly noise and can follow it."""
    return jnp.maximum(2.0 * t - 1.0, 0.0)


def build(config):
    model, train = config.model, config.train
    depth, width, heads = nets.sizes(model.size)
    modalities = {"image": Latents(32, 32, 4), "label": Labels(CLASSES)}
    shape = {name: modality.shape for name, modality in modalities.items()}
    process = Joint(image=Gaussian(schedules.flow(), velocity), label=absorbing(CLASSES))
    mask = process.parts["label"].mask
    net = nets.MMDiT(
        modalities={"image": nets.Patches(*shape["image"], model.patch), "label": nets.Label(states=mask + 1, classes=CLASSES)},
        depth=depth, width=width, heads=heads, shared=True, dtype=jnp.dtype(model.dtype), remat=model.remat, scan=model.scan)

    noisy, given, absent = times.uniform(), times.constant(0.0), times.constant(1.0)
    when = times.mixture(
        (config.times.joint, times.joint(image=noisy, label=noisy)),
        (config.times.image_given_label, times.joint(image=noisy, label=given)),
        (config.times.label_given_image, times.joint(image=given, label=absent)),
        (config.times.label_given_noisy, times.joint(image=times.uniform(0.0, 0.7), label=absent)),
        (config.times.image_alone, times.joint(image=noisy, label=absent)))
    terms = {
        "image": (1.0, losses.on("image", process.parts["image"].loss)),
        "label": (config.label_weight, losses.on("label", process.parts["label"].loss)),
    }

    rate = optim.warmup(optim.scaled(train.learning_rate, train.global_batch, train.base_batch, train.scale_rule), train.warmup_steps)
    return Experiment(
        process=process,
        init=initialiser(net, process, shape),
        apply=net.apply,
        loss=losses.diffusion(process, net.apply, when, terms),
        optimizer=optax.chain(optax.clip_by_global_norm(train.clip), optax.adamw(rate, weight_decay=train.weight_decay)),
        train_data=partial(open_source, config.data, "train", modalities),
        validation_data=partial(open_source, config.data, "val", modalities),
        test_data=partial(open_source, config.data, "val", modalities),  # the set has no third part with answers
        shape=shape,
        sample=sampling.make_sampler(process, net.apply, shape, drop=("label",), paths={"label": early}),
        modalities=modalities,
    )
