"""Class-conditional LightningDiT-XL/1 on the 16x16x32 latents that VA-VAE makes of 256-pixel ImageNet (Yao et al. 2025).

    VAE="--config.encoder.path=weights/va-vae"
    python -m mmdiff cache   --config configs/imagenet256/lightning_xl1.py --out latents/va_vae $VAE --config.data.images=imagenet
    python -m mmdiff train   --config configs/imagenet256/lightning_xl1.py --workdir runs/lightning $VAE --config.data.dir=latents/va_vae
    python -m mmdiff sample  --config configs/imagenet256/lightning_xl1.py --workdir runs/lightning --given label=207
    python -m mmdiff convert --config configs/imagenet256/lightning_xl1.py --workdir runs/lightningdit $VAE \\
        --from weights/lightningdit-xl-imagenet256-800ep.pt --as lightningdit

weights/va-vae is a folder with VA-VAE's weights and a config.json, whose latents_mean and latents_std are the published statistics of the
latents' 32 channels. config.data.source=random makes up latents and needs nothing.

The recipe beside SiT's (configs/imagenet256/sit_xl2.py): RMSNorm, SwiGLU and rotary positions, one token a latent pixel; times by a
logit-normal law; the direction of the velocity counts, too, 1 - cosine over the channels; batch 1,024, rate 2e-4, b2 0.95. Samples take
250 Euler steps at times closer to the noise, those of shift(flow(), 1 / 0.3), guidance on three channels, the noisiest tenth without it.

Expected, from the authors' page (50,000 samples, not measured here): after 80,000 steps FID 5.14, with guidance 10 2.11; after 1,000,000
steps 2.17 and 1.35.
"""

import math

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, schedules, times, training_config
from mmdiff.data import Autoencoder, EncodedCache, EncodedLatents, Labels, published
from mmdiff.data.latents import open_source
from mmdiff.evals.sampled_images import evaluators_of
from mmdiff.processes import Gaussian, Given, Joint, velocity
from mmdiff.processes.base import per_example_mean
from mmdiff.training import optim

CLASSES, CHANNELS = 1000, 32  # the null label is CLASSES


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "autoencoder_kl", "path": ""},
        "data": {"source": "latents", "dir": "", "set": "folder", "images": "", "max_skipped": 0},  # or random; cache reads set, images
        "model": {
            "size": "XL", "patch": 1, "image": 16, "channels": CHANNELS, "learn_sigma": False, "norm": "rms", "mlp": "swiglu", "rope": True,
            "dtype": "bfloat16", "remat": "auto", "scan": True, "time_scale": -1.0, "time_offset": 1.0},
        "label_dropout": 0.1, "direction_weight": 1.0,
        "train": training_config(
            steps=80_000, global_batch=1024, ema=0.9999, learning_rate=2e-4, warmup_steps=0, eval_every=10_000, checkpoint_every=2_000,
            log_every=100, sample_every=10_000, noise_scale=False, norm_groups=()),
        "sample": {"steps": 250, "guidance": 10.0, "guided_channels": 3, "guided_during": (0.0, 0.89), "shift": 0.3},
        "eval": {
            "encoder": {"kind": "", "path": ""}, "reference": "", "most": 10_000, "batch": 64, "in_loop": {"most": 5_000, "steps": 50}},
    })


def direction(process):
    """1 - cosine of the predicted velocity and the true one, over the channels of each pixel."""

    def term(out, noised):
        both = out, out - process.residual(out, noised)
        unit = (x / jnp.sqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-4)) for x in both)  # of 0, where all begins, too
        return per_example_mean(1 - math.prod(unit).sum(-1))

    return term


def build(config):
    side, gaussian = config.model.image, Gaussian(schedules.flow(), velocity)
    autoencoder = Autoencoder(config.encoder, side)
    modalities = {"image": EncodedLatents(side, side, CHANNELS, encoder=autoencoder), "label": Labels(CLASSES)}
    process = Joint(image=gaussian, label=Given(null=CLASSES))
    net = nets.DiT.preset(classes=CLASSES, **nets.options(config.model, without="size"), size=config.model.size)
    apply, shift = nets.as_joint(net), config.sample.shift

    def path(t):
        """The time of the image at time t of the trajectory."""
        return t / (t + shift * (1 - t))

    noise_levels = times.conditional("label", dropout=config.label_dropout, image=times.logit_normal())
    each = {"image": (1.0, gaussian.loss), "direction": (config.direction_weight, direction(gaussian))}
    terms = {name: (weight, losses.on("image", term)) for name, (weight, term) in each.items()}
    example = jnp.zeros((1, side, side, CHANNELS)), jnp.ones(1), jnp.zeros(1, jnp.int32)
    return Experiment(
        process=process, net=net, modalities=modalities, apply=apply, init=lambda key: net.init(key, *example),
        loss=losses.diffusion(process, apply, noise_levels, terms),
        optimizer=optax.adamw(optim.warmup(config.train.learning_rate, config.train.warmup_steps), b2=0.95, weight_decay=0.0),
        data=published(lambda split: open_source(config.data, split, modalities)),
        sampler={
            "paths": {"image": path}, "channels": {"image": config.sample.guided_channels},
            "guided_during": ("image", *config.sample.guided_during)},
        **evaluators_of(config.eval, condition="label"),
        **EncodedCache(config.data, modalities, [autoencoder]).for_experiment)
