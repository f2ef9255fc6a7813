"""SiT-XL/2 whose middle is aligned with DINOv2's features of the image: REPA (Yu et al. 2025) on 32x32x4 latents of 256-pixel ImageNet.

    VAE="--config.encoder.path=weights/sd-vae-ft-mse"
    DINO="--config.feature_encoder.path=weights/dinov2-base"
    DATA="--config.data.dir=latents/imagenet256_repa"
    python -m mmdiff cache  --config configs/imagenet256/repa_xl2.py --out latents/imagenet256_repa $VAE $DINO --config.data.images=imagenet
    python -m mmdiff train  --config configs/imagenet256/repa_xl2.py --workdir runs/repa $VAE $DATA
    python -m mmdiff train  --config configs/imagenet256/repa_xl2.py --workdir runs/repa_sit $VAE $DATA --config.train.start=runs/sit
    python -m mmdiff sample --config configs/imagenet256/repa_xl2.py --workdir runs/repa --given label=207

Data: a cache that the first command writes, with latents as of configs/imagenet256/dit_xl2.py (its head says which images) and, of the same
crop resized to 224 pixels, DINOv2's 16 x 16 features of 768 numbers; a training step reads them and runs no encoder. weights/dinov2-base is
the folder of "facebook/dinov2-base" (Apache-2.0), or the file dinov2_vitb14_pretrain.pth. As published, images are not mirrored. The
features take 393 KB an image, 504 GB in all; config.data.mirrored=true encodes mirror images, too, and takes twice that.
config.data.source=random makes up both and needs nothing.

The recipe beside SiT's (configs/imagenet256/sit_xl2.py): what 8 of the 28 blocks have made of the noisy image is projected by three layers
to 768 numbers a patch, and 0.5 times 1 - cosine to the features is added to the loss; gradients are clipped at the norm 1. With
align.conv=true, align.center=0.6 and align.weight=1 it is iREPA (Singh et al. 2025). The network's other weights have the names and shapes
of sit_xl2's: train.start takes a run of it, converted from SiT's published weights for instance, whose outputs are those of step 0 here.
REPA's own published weights count time from data to noise and have four channels: convert --as repa takes them with model.time_scale=1,
model.time_offset=0 and model.learn_sigma=false.

Expected, from the authors' page (50,000 samples, not measured here): FID 1.42 after 4,000,000 steps, by 250 steps of the SDE, guidance 1.8
in the times up to 0.7. Ours are Heun's steps of the ODE. Cost: 683M parameters, of which the projection's 8.1M are not needed to sample;
that of SiT-XL/2 and 0.7 % more.
"""

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, schedules, times, training_config
from mmdiff.data import Autoencoder, EncodedCache, EncodedLatents, EncodedMaps, ImagePatches, Labels, published
from mmdiff.data.latents import open_source
from mmdiff.evals.sampled_images import evaluators_of
from mmdiff.processes import Gaussian, Given, Joint, velocity
from mmdiff.training import optim

CLASSES, SIZE = 1000, 768  # the null label is CLASSES; numbers in a feature


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "autoencoder_kl", "path": ""},
        "feature_encoder": {"kind": "dinov2", "path": "", "size": SIZE},
        # Or source random; cache reads set, images and mirrored.
        "data": {"source": "latents", "dir": "", "set": "folder", "images": "", "max_skipped": 0, "mirrored": False},
        "model": {
            "size": "XL", "patch": 2, "image": 32, "learn_sigma": True, "dtype": "bfloat16", "remat": "auto", "scan": True,
            "time_scale": -1.0, "time_offset": 1.0},
        "align": {"depth": 8, "hidden_width": 2048, "conv": False, "weight": 0.5, "center": None},
        "label_dropout": 0.1,
        "train": training_config(
            steps=400_000, global_batch=256, ema=0.9999, eval_every=50_000, checkpoint_every=5_000, log_every=100, sample_every=10_000,
            learning_rate=1e-4, base_batch=256, scale_rule="none", warmup_steps=0, weight_decay=0.0, clip=1.0, noise_scale=False,
            norm_groups=()),
        "sample": {"steps": 125, "guidance": 1.8, "guided_during": (0.0, 0.7)},
        "eval": {  # no metrics while kind is ""
            "encoder": {"kind": "", "path": ""}, "reference": "", "most": 10_000, "batch": 64, "in_loop": {"most": 5_000, "steps": 50}},
    })


def build(config):
    side, align, size = config.model.image, config.align, config.feature_encoder.size
    autoencoder, grid = Autoencoder(config.encoder, side), side // config.model.patch
    dino = ImagePatches(config.feature_encoder, autoencoder, grid, modality="dino")
    modalities = {
        "image": EncodedLatents(side, side, 4, encoder=autoencoder), "label": Labels(CLASSES),
        "dino": EncodedMaps(grid, grid, size, name="dino", encoder=dino)}
    tap = nets.Tap("image", align.depth, size, align.hidden_width, align.conv)
    net = nets.DiT.preset(classes=CLASSES, taps={"dino": tap}, **nets.options(config.model, without="size"), size=config.model.size)
    process, apply = Joint(image=Gaussian(schedules.flow(), velocity), label=Given(null=CLASSES)), nets.as_joint(net)
    noise_levels = times.conditional("label", dropout=config.label_dropout, image=times.uniform())
    terms = {"dino": (align.weight, losses.aligned("dino", "image", align.center))}
    example = jnp.zeros((1, side, side, 4)), jnp.ones(1), jnp.zeros(1, jnp.int32)
    return Experiment(
        process=process, net=net, modalities=modalities, apply=apply, init=lambda key: net.init(key, *example),
        loss=losses.diffusion(process, apply, noise_levels, losses.of_parts(process, image=1.0) | terms),
        optimizer=optax.chain(optax.clip_by_global_norm(config.train.clip), optim.adm(config.train)),
        data=published(lambda split: open_source(config.data, split, modalities)),
        sampler={"heun": True, "guided_during": ("image", *config.sample.guided_during)},
        **evaluators_of(config.eval, condition="label"),
        **EncodedCache(config.data, modalities, [autoencoder, dino], config.data.mirrored).for_experiment)
