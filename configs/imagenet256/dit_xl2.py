"""Class-conditional DiT-XL/2 on 32x32x4 latents of 256-pixel ImageNet: the recipe of Peebles & Xie (2023).

    VAE="--config.encoder.path=weights/sd-vae-ft-ema"
    python -m mmdiff cache  --config configs/imagenet256/dit_xl2.py --out latents/imagenet256 $VAE --config.data.images=imagenet
    python -m mmdiff train  --config configs/imagenet256/dit_xl2.py --workdir runs/dit_xl2 $VAE --config.data.dir=latents/imagenet256
    python -m mmdiff sample --config configs/imagenet256/dit_xl2.py --workdir runs/dit_xl2 --given label=207 --config.sample.guidance=4
    python -m mmdiff aot    --config configs/imagenet256/dit_xl2.py --topology v5e:4x4
    python -m mmdiff bench  --config configs/imagenet256/dit_xl2.py
    python -m mmdiff convert --config configs/imagenet256/dit_xl2.py --workdir runs/dit $VAE --from weights/DiT-XL-2-256x256.pt --as dit

Data: a latent cache that the first command writes. `imagenet` has the folders train/n01440764 ... and val/n01440764 ... of images; of TFDS,
add --config.data.set=imagenet2012. Images are cropped as ADM's; every training image is encoded as it is and mirrored; moments are stored,
and each epoch samples its latents of them. weights/sd-vae-ft-ema is the folder of "stabilityai/sd-vae-ft-ema" (MIT): config.json and
diffusion_pytorch_model.safetensors. With config.encoder.path samples are decoded; without it they are latents and are shown as colours.
config.data.source=random makes up latents of the same shapes and needs nothing.

The recipe: 1,000 steps of linear betas, eps prediction, learned variances (hybrid loss), label dropout 0.1, AdamW at 1e-4 without
decay or warm-up, batch 256, EMA 0.9999; 250 ancestral steps at the nodes 1, 5, 9, ..., 1000 from N(0, 1), guidance on the first three
channels of the four. One detail differs: the last step's decoder term, which trains the variance of one step in 1,000, is left out of
the loss. Times are counted as in its weights, which `convert` takes: steps 0 .. 999, the first ending at t = 1/1000. With
config.model.image=64 the latents are those of 512 pixels.

On 16 chips of v6e with 32 images each, by the ahead-of-time report (add --config.train.global_batch=512 --config.train.mesh.fsdp=16):
7.0 GB a chip and a step of 27 ms at least, while links take 23.4 ms, too.

configs/imagenet256/README.md has the commands that sample 50,000 images and measure FID.

Expected, from the paper (50,000 samples, not measured here): FID 19.5 after 400,000 steps; after 7,000,000 steps 9.62, and 2.27 with
guidance 1.5. Cost: 675M parameters, 118.6 G multiply-adds an image and forward pass.
"""

from math import log

import jax.numpy as jnp
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Autoencoder, EncodedCache, EncodedLatents, Labels, published
from mmdiff.data.latents import open_source
from mmdiff.evals.sampled_images import evaluators_of
from mmdiff.processes import Given, Joint, LearnedSigma, eps
from mmdiff.training import optim

CLASSES, STEPS, GUIDED = 1000, 1000, 3  # the null label is CLASSES; STEPS of the chain; channels that guidance acts on


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "autoencoder_kl", "path": ""},  # or autoencoder_tiny
        "data": {"source": "latents", "dir": "", "set": "folder", "images": "", "max_skipped": 0},  # or random; cache reads set, images
        "model": {
            "size": "XL", "patch": 2, "image": 32, "dtype": "bfloat16", "remat": "auto", "scan": True,
            # The published function; diffusers computes another with the same weights: freq_shift 1 and mlp_norm_eps 1e-5.
            "time_offset": -1.0, "freq_shift": 0.0, "mlp_norm_eps": 1e-6},
        "label_dropout": 0.1,
        "train": training_config(
            steps=400_000, global_batch=256, ema=0.9999, eval_every=50_000, checkpoint_every=5_000, log_every=100, sample_every=10_000,
            # The rate is for base_batch; scale_rule (none, linear, sqrt) makes it follow global_batch. Large batches want a warm-up.
            learning_rate=1e-4, base_batch=256, scale_rule="none", warmup_steps=0, weight_decay=0.0,
            # More metrics: the gradient noise scale (with microbatches >= 2), and norms by group, as in (("blocks", "blocks/"),).
            noise_scale=False, norm_groups=()),
        "sample": {"steps": 250, "guidance": 1.5},
        "eval": {  # no metrics while kind is ""
            "encoder": {"kind": "", "path": ""}, "reference": "", "most": 10_000, "batch": 64, "in_loop": {"most": 5_000, "steps": 50}},
    })


def build(config):
    size = config.model.image
    autoencoder = Autoencoder(config.encoder, size)
    modalities = {"image": EncodedLatents(size, size, 4, encoder=autoencoder), "label": Labels(CLASSES)}
    net = nets.DiT.preset(classes=CLASSES, learn_sigma=True, **nets.options(config.model, without="size"), size=config.model.size)
    apply = nets.as_joint(net)
    image = LearnedSigma(schedules.linear_beta(STEPS), eps, prior_std=1.0)
    process = Joint(image=image, label=Given(null=CLASSES))
    sigma = (1 / (STEPS * log(2)), losses.on("image", losses.sigma_vlb(image, STEPS)))
    noise_levels = times.conditional("label", dropout=config.label_dropout, image=times.on_grid(STEPS))
    return Experiment(
        process=process, net=net, modalities=modalities,
        init=lambda key: net.init(key, jnp.zeros((1, size, size, 4)), jnp.ones(1), jnp.zeros(1, jnp.int32)),
        apply=apply,
        loss=losses.diffusion(process, apply, noise_levels, losses.of_parts(process, image=1.0) | {"sigma": sigma}),
        # Another optimizer is another call here; mmdiff/training/optim.py shows Lion, Muon and LAMB.
        optimizer=optim.adm(config.train), data=published(lambda split: open_source(config.data, split, modalities)),
        sampler={"channels": {"image": GUIDED}, "grid": lambda steps: (sampling.spaced_grid(steps, STEPS), ())},
        **evaluators_of(config.eval, condition="label"),
        **EncodedCache(config.data, modalities, [autoencoder]).for_experiment)
