"""Class-conditional SiT-XL/2 on 32x32x4 latents of 256-pixel ImageNet: DiT-XL/2's network, trained by flow matching (Ma et al. 2024).

    VAE="--config.encoder.path=weights/sd-vae-ft-ema"
    python -m mmdiff train   --config configs/imagenet256/sit_xl2.py --workdir runs/sit_xl2 $VAE --config.data.dir=latents/imagenet256
    python -m mmdiff sample  --config configs/imagenet256/sit_xl2.py --workdir runs/sit_xl2 --given label=207 --config.sample.guidance=4
    python -m mmdiff convert --config configs/imagenet256/sit_xl2.py --workdir runs/sit $VAE --from weights/SiT-XL-2-256x256.pt --as sit

Data and autoencoder are those of configs/imagenet256/dit_xl2.py, whose head has the command that writes the cache.
config.data.source=random makes up latents and needs nothing.

The recipe: straight lines from data to noise, velocity prediction, uniform times, label dropout 0.1; AdamW at 1e-4 without decay or
warm-up, batch 256, EMA 0.9999; Heun's method in equal steps, guidance on the first three channels of the four. The published network
outputs eight channels, of which the last four are thrown away; its time runs from noise to data and enters as it is, the time_scale and
time_offset below. With config.model.image=64 the latents are those of 512 pixels.

Expected, from the paper (50,000 samples, not measured here): after 7,000,000 steps FID 2.15 with guidance 1.5 and an adaptive solver
of the ODE, 2.06 with the SDE. Cost: that of DiT-XL/2.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, schedules, times, training_config
from mmdiff.data import Autoencoder, EncodedCache, EncodedLatents, Labels, published
from mmdiff.data.latents import open_source
from mmdiff.evals.sampled_images import evaluators_of
from mmdiff.processes import Gaussian, Given, Joint, velocity
from mmdiff.training import optim

CLASSES, GUIDED = 1000, 3  # the null label is CLASSES; channels that guidance acts on


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "autoencoder_kl", "path": ""},  # or autoencoder_tiny
        "data": {"source": "latents", "dir": "", "set": "folder", "images": "", "max_skipped": 0},  # or random; cache reads set, images
        "model": {
            "size": "XL", "patch": 2, "image": 32, "learn_sigma": True, "dtype": "bfloat16", "remat": "auto", "scan": True,
            "time_scale": -1.0, "time_offset": 1.0},
        "label_dropout": 0.1,
        "train": training_config(
            steps=400_000, global_batch=256, ema=0.9999, eval_every=50_000, checkpoint_every=5_000, log_every=100, sample_every=10_000,
            learning_rate=1e-4, base_batch=256, scale_rule="none", warmup_steps=0, weight_decay=0.0, noise_scale=False, norm_groups=()),
        "sample": {"steps": 125, "guidance": 1.5},
        "eval": {  # no metrics while kind is ""
            "encoder": {"kind": "", "path": ""}, "reference": "", "most": 10_000, "batch": 64, "in_loop": {"most": 5_000, "steps": 50}},
    })


def build(config):
    shape, autoencoder = (config.model.image, config.model.image, 4), Autoencoder(config.encoder, config.model.image)
    modalities = {"image": EncodedLatents(*shape, encoder=autoencoder), "label": Labels(CLASSES)}
    process = Joint(image=Gaussian(schedules.flow(), velocity), label=Given(null=CLASSES))
    net = nets.DiT.preset(classes=CLASSES, **nets.options(config.model, without="size"), size=config.model.size)
    apply = nets.as_joint(net)
    noise_levels = times.conditional("label", dropout=config.label_dropout, image=times.uniform())
    return Experiment(
        process=process, net=net, modalities=modalities, apply=apply,
        init=lambda key: net.init(key, jnp.zeros((1, *shape)), jnp.ones(1), jnp.zeros(1, jnp.int32)),
        loss=losses.diffusion(process, apply, noise_levels, losses.of_parts(process, image=1.0)),
        optimizer=optim.adm(config.train), data=published(lambda split: open_source(config.data, split, modalities)),
        sampler={"heun": True, "channels": {"image": GUIDED}},
        **evaluators_of(config.eval, condition="label"),
        **EncodedCache(config.data, modalities, [autoencoder]).for_experiment)
