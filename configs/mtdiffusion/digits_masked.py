"""MT-Diffusion on masked digits: the mean of the chain carries the masked image, and a network restores it or samples from nothing.

    python -m mmdiff train --config configs/mtdiffusion/digits_masked.py --workdir runs/digits_masked
    python -m mmdiff eval  --config configs/mtdiffusion/digits_masked.py --workdir runs/digits_masked

Measured (seed 0, 1,097 training and 500 test digits, EMA weights), with 5, 10, 15 and 20 hidden patches: squared error on the hidden
pixels, mean of 16 samples, 0.110, 0.140, 0.178 and 0.211 (linear regression 0.153, 0.172, 0.198, 0.217); perceptual distance 0.069, 0.186,
0.354 and 0.546 (0.102, 0.227, 0.388, 0.542). Sampled from nothing: Fréchet ratio 1.95; without a masked image, plain DDPM, 1.53. Cost:
0.74M parameters; 3,200 steps took six minutes on one CPU core.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, schedules, times, training_config
from mmdiff.data import Images
from mmdiff.data.masks import masking
from mmdiff.processes import Aggregate, Gaussian, Given, Hidden, MeanShift, identity, moving_target, velocity
from mmdiff.projects.digits import digit_features
from mmdiff.projects.digits.digits import digits_source
from mmdiff.projects.digits.restoration import Restoration
from mmdiff.training import optim


def get_config():
    return ConfigDict({
        "seed": 0,
        "model": {"width": 96, "depth": 4, "heads": 4, "patch": 2},
        "kappa": 1.0, "head_weight": 0.1,
        # Up to so many patches of 2 x 2 are hidden, as many as of 16 x 16 in the paper's 64 x 64, and everything in some images.
        "patches": {"size": 2, "most": 10, "complete": 0.1},
        # Shares of the training times: masked image and mask known (X), hidden but in the mean (U), absent (plain DDPM).
        "times": {"known": 0.6, "hidden": 0.2, "absent": 0.2},
        "train": training_config(
            steps=3200, global_batch=128, ema=0.998, learning_rate=2.5e-3, warmup_steps=100, weight_decay=0.7, clip=1.0, eval_every=500),
        "sample": {"steps": 12, "guidance": 1.0}, "eval": {"batch": 250, "draws": 16},
    })


def build(config):
    patches = nets.Patches(8, 8, 1, config.model.patch)
    conditions = {"masked": nets.Grid(patches), "mask": nets.Grid(patches, head=False)}
    net = nets.MultiTaskDiT(patches, conditions, **nets.options(config.model, without="patch"))
    process = Aggregate(
        "image", {"masked": MeanShift(identity, moving_target(config.kappa))},
        image=Gaussian(schedules.flow(), velocity), masked=Hidden(0.0), mask=Given(1.0))
    noise_levels = times.mixture(
        (config.times.known, times.joint(image=times.uniform(), masked=0.0, mask=0.0)),
        (config.times.hidden, times.shared("image", "masked", mask=1.0)),
        (config.times.absent, times.joint(image=times.uniform(), masked=1.0, mask=1.0)))
    loss = losses.diffusion(process, net.apply, noise_levels, losses.weighted(process, masked=config.head_weight))
    return Experiment(
        process=process, net=net,
        modalities=dict.fromkeys(("image", "masked", "mask"), Images(8, 8, 1, levels=17)),
        loss=losses.prepared(loss, masking(**config.patches)),
        optimizer=optim.adamw(config.train), data=digits_source,
        sampler={"drop": ("masked", "mask"), "heun": True},
        evaluators=(Restoration(
            config.patches.size, config.patches.most, digit_features.distance, "digits' features",
            draws=config.eval.draws, batch=config.eval.batch),))
