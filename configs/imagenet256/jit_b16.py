"""Class-conditional JiT-B/16 on the pixels of 256-pixel ImageNet, no autoencoder: the network predicts the image (Li & He 2025).

    SET="--config.data.name=folder --config.data.dir=imagenet"
    python -m mmdiff train   --config configs/imagenet256/jit_b16.py --workdir runs/jit $SET
    python -m mmdiff sample  --config configs/imagenet256/jit_b16.py --workdir runs/jit --given label=207
    python -m mmdiff convert --config configs/imagenet256/jit_b16.py --workdir runs/jit_b16 --from weights/checkpoint-last.pth --as jit
    python -m mmdiff aot     --config configs/imagenet256/jit_b16.py --topology v5e:4x4 --config.data.name=random

config.data.name is imagenet2012 (TFDS), folder (one's own copy of it) or random, which makes images up and needs nothing;
mmdiff/data/image_datasets.py says what config.data.dir holds.

A token is a patch of 16x16x3 numbers, and the noise fills them all; images do not, so x_0 is what the network predicts, and its error in
velocity what counts, 1 / max(t, 0.05)^2 of that in x_0. Patches enter through 128 features; RMSNorm, SwiGLU, rotary positions and qk-norm;
32 tokens of the label from the fifth block on. Times by a logit-normal law around 0.69 (0.8, 0.8; the authors' time runs the other way:
-0.8, 0.8), label dropout 0.1, half of the images mirrored; AdamW, rate 2e-4 after 5 epochs of warm-up, b2 0.95, batch 1,024, EMA 0.9999.
Samples take 50 Heun steps, guidance 2.9 while t < 0.9. Other than there, the last steps of a trajectory, t < 0.05, go to the predicted
image by the flow itself, and not by a velocity of which 1 / t is capped.

Other published sizes: --config.model.size=L --config.model.in_context="(32,8)"; H, in_context "(32,10)" and bottleneck 256 (guidance 2.2;
they also drop out 0.2 of the features in the middle blocks of H, which is not here).

Expected, from the paper (50,000 samples, 600 epochs; not measured here): FID 3.66 for B/16, 2.36 for L/16, 1.86 for H/16. Cost: 131M
parameters, 288 tokens an image, 0.15 TFLOP an image and step, counted; not trained here.
"""

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, schedules, times, training_config
from mmdiff.data import Images, Labels, published
from mmdiff.data.image_datasets import open_image_dataset
from mmdiff.evals.sampled_images import evaluators_of
from mmdiff.processes import Gaussian, Given, Joint, velocity, x0
from mmdiff.training import optim

CLASSES = 1000  # and the null label


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"name": "imagenet2012", "dir": "", "size": 256, "damaged": 0.0, "flips": 0.5},
        "model": {
            "size": "B", "patch": 16, "bottleneck": 128, "in_context": (32, 4), "norm": "rms", "mlp": "swiglu", "rope": True,
            "qk_norm": True, "time_scale": -1.0, "time_offset": 1.0, "dtype": "bfloat16", "remat": "auto", "scan": True},
        "label_dropout": 0.1, "floor": 0.05, "time": {"mean": 0.8, "std": 0.8},
        "train": training_config(
            steps=750_600, global_batch=1024, ema=0.9999, learning_rate=2e-4, warmup_steps=6_255, eval_every=50_000,
            checkpoint_every=5_000, log_every=100, sample_every=25_000),
        "sample": {"steps": 50, "guidance": 2.9, "guided_during": (0.0, 0.9)},
        "eval": {
            "examples": 2048, "encoder": {"kind": "", "path": ""}, "reference": "", "most": 10_000, "batch": 64,
            "in_loop": {"most": 5_000, "steps": 25}},
    })


def build(config):
    side, gaussian = config.data.size, Gaussian(schedules.flow(), x0)
    process = Joint(image=gaussian, label=Given(null=CLASSES))
    patches = nets.Patches(side, side, 3, config.model.patch, bottleneck=config.model.bottleneck)
    net = nets.DiT(patches, CLASSES, **nets.options(config.model, without=("patch", "bottleneck")))
    apply, noise = nets.as_joint(net), times.logit_normal(config.time.mean, config.time.std)
    noise_levels = times.conditional("label", dropout=config.label_dropout, image=noise)
    term = losses.on("image", losses.error_in(gaussian, velocity, config.floor))
    loss = losses.diffusion(process, apply, noise_levels, {"image": (1.0, term)})
    return Experiment(
        process=process, net=net, modalities={"image": Images(side, side, 3), "label": Labels(CLASSES)}, apply=apply,
        init=lambda key: net.init(key, jnp.zeros((1, side, side, 3)), jnp.ones(1), jnp.zeros(1, jnp.int32)),
        loss=losses.prepared(loss, losses.flips("image", config.data.flips)),
        optimizer=optax.adamw(optim.warmup(config.train.learning_rate, config.train.warmup_steps), b2=0.95, weight_decay=0.0),
        data=published(lambda split: open_image_dataset(config.data, split, side), config.eval.examples),
        sampler={"heun": True, "guided_during": ("image", *config.sample.guided_during)},
        **evaluators_of(config.eval, condition="label"))
