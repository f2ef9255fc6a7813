"""SiT-XL/2 of latents and of DINOv2's features, sampled together: ReDi (Kouzelis et al. 2025) on 32x32x4 latents of 256-pixel ImageNet.

    VAE="--config.encoder.path=weights/sd-vae-ft-ema"
    DINO="--config.feature_encoder.path=weights/dinov2-with-registers-base"
    DATA="--config.data.dir=latents/imagenet256_redi"
    python -m mmdiff cache  --config configs/imagenet256/redi_xl2.py --out latents/imagenet256_redi $VAE $DINO --config.data.images=imagenet
    python -m mmdiff train  --config configs/imagenet256/redi_xl2.py --workdir runs/redi $VAE $DATA
    python -m mmdiff train  --config configs/imagenet256/redi_xl2.py --workdir runs/redi_sit $VAE $DATA --config.train.start=runs/sit
    python -m mmdiff sample --config configs/imagenet256/redi_xl2.py --workdir runs/redi --given label=207

Data: a cache that the first command writes, with latents as of configs/imagenet256/dit_xl2.py (its head says which images) and, of the same
crop resized to 224 pixels, DINOv2's 16 x 16 features, standardised, cut down to their first 8 principal components and resized to 32 x 32.
The components are those of 50,000 training images, which the command encodes first, and lie with the cache; weights/
dinov2-with-registers-base is the folder of "facebook/dinov2-with-registers-base" (Apache-2.0), or the file dinov2_vitb14_reg4_pretrain.pth.
As published, images are not mirrored; config.data.mirrored=true encodes mirror images, too. Latents and features take 33 KB an image, 42 GB
in all. config.data.source=random makes up both and needs nothing.

The recipe beside SiT's (configs/imagenet256/sit_xl2.py): a second modality at the same time, with its own noise; its patches of 2 x 2 are
embedded and added to the image's tokens, and both are predicted from them, errors with the weights 1 and 1; guidance is of the image
alone. What differs: components have standard deviation 1 (feature_encoder.whiten=false: each its own, as the authors' code does), and the
features have a last modulation of their own. The network's other weights have the names and shapes of sit_xl2's, and what is new begins
at 0: train.start takes a run of it, converted from SiT's published weights for instance, whose image is that of step 0 here.

config.times.image_alone=0.2 (together 0.8) trains the image without features, too, which sample.representation_guidance=true needs: the
image is guided by its features (and its label, if it has one), these by nothing. config.times.independent, not published, trains times
of their own, as features of a given image and images of given features (sample --given features=photo.jpg $VAE $DINO $DATA) need.

Expected, from the authors' page (50,000 samples, not measured here): FID 1.64 after 3,000,000 steps, by 250 steps of the SDE, guidance 2.4.
Ours are Heun's steps of the ODE. Cost: 679M parameters, the compute of SiT-XL/2 and 0.3 % more.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, schedules, times, training_config
from mmdiff.data import Autoencoder, EncodedCache, EncodedLatents, EncodedMaps, ImagePatches, Labels, published
from mmdiff.data.latents import open_source
from mmdiff.evals.sampled_images import evaluators_of
from mmdiff.processes import Gaussian, Given, Joint, velocity
from mmdiff.training import optim

CLASSES, COMPONENTS = 1000, 8  # the null label is CLASSES


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "autoencoder_kl", "path": ""},
        "feature_encoder": {"kind": "dinov2", "path": "", "size": 768, "components": COMPONENTS, "whiten": True},
        # Or source random; cache reads set, images and mirrored.
        "data": {"source": "latents", "dir": "", "set": "folder", "images": "", "max_skipped": 0, "mirrored": False},
        "model": {
            "size": "XL", "patch": 2, "image": 32, "learn_sigma": True, "dtype": "bfloat16", "remat": "auto", "scan": True,
            "time_scale": -1.0, "time_offset": 1.0},
        # Shares of the training times: of both together, of each its own, of an image whose features are absent.
        "times": {"together": 1.0, "independent": 0.0, "image_alone": 0.0},
        "label_dropout": 0.1, "features_weight": 1.0,
        "train": training_config(
            steps=400_000, global_batch=256, ema=0.9999, eval_every=50_000, checkpoint_every=5_000, log_every=100, sample_every=10_000,
            learning_rate=1e-4, base_batch=256, scale_rule="none", warmup_steps=0, weight_decay=0.0, noise_scale=False, norm_groups=()),
        "sample": {"steps": 125, "guidance": 2.4, "representation_guidance": False},
        "eval": {  # no metrics while kind is ""
            "encoder": {"kind": "", "path": ""}, "reference": "", "most": 10_000, "batch": 64, "in_loop": {"most": 5_000, "steps": 50}},
    })


def noise_levels(shares, dropout):
    label, noisy = times.mixture((1 - dropout, 0.0), (dropout, 1.0)), times.uniform()
    rules = {
        "together": times.shared("image", "features", label=label),
        "independent": times.joint(image=noisy, features=noisy, label=label),
        "image_alone": times.joint(image=noisy, features=1.0, label=label)}
    return times.mixture(*((shares[name], rule) for name, rule in rules.items()))


def build(config):
    side, patch = config.model.image, config.model.patch
    autoencoder = Autoencoder(config.encoder, side)
    dino = ImagePatches(config.feature_encoder, autoencoder, side // patch, side, config.data.dir)
    modalities = {
        "image": EncodedLatents(side, side, 4, encoder=autoencoder), "label": Labels(CLASSES),
        "features": EncodedMaps(side, side, dino.channels, encoder=dino)}
    fused = {"features": nets.Patches(side, side, dino.channels, patch)}
    net = nets.DiT.preset(classes=CLASSES, fused=fused, **nets.options(config.model, without="size"), size=config.model.size)
    flow, apply = Gaussian(schedules.flow(), velocity), nets.as_joint(net)
    process = Joint(image=flow, features=flow, label=Given(null=CLASSES))
    terms = losses.of_parts(process, image=1.0, features=config.features_weight)
    features = {"features": (jnp.zeros((1, side, side, dino.channels)), jnp.ones(1))}
    guided = {"each": {"image": lambda w: w}} if config.sample.representation_guidance else {"channels": {"features": 0}}
    return Experiment(
        process=process, net=net, modalities=modalities, apply=apply,
        init=lambda key: net.init(key, jnp.zeros((1, side, side, 4)), jnp.ones(1), jnp.zeros(1, jnp.int32), others=features),
        loss=losses.diffusion(process, apply, noise_levels(config.times, config.label_dropout), terms),
        optimizer=optim.adm(config.train), data=published(lambda split: open_source(config.data, split, modalities)),
        sampler={"heun": True, **guided},
        **evaluators_of(config.eval, condition="label"),
        **EncodedCache(config.data, modalities, [autoencoder, dino], config.data.mirrored).for_experiment)
