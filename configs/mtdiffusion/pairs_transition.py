"""MT-Diffusion on pairs of images of one scene, 64x64: the paper's image transition (Chen et al. 2024, section 5.1).

    SET="--config.data.name=cityscapes --config.data.dir=cityscapes"
    python -m mmdiff train  --config configs/mtdiffusion/pairs_transition.py --workdir runs/pairs $SET
    python -m mmdiff sample --config configs/mtdiffusion/pairs_transition.py --workdir runs/pairs
    python -m mmdiff sample --config configs/mtdiffusion/pairs_transition.py --workdir runs/pairs --given segmentation=FOLDER
    python -m mmdiff sample --config configs/mtdiffusion/pairs_transition.py --workdir runs/pairs --given image=FOLDER --steps 1
    python -m mmdiff aot    --config configs/mtdiffusion/pairs_transition.py --topology v5e:4x4 --config.data.name=random

These sample pairs, photographs of segmentations and segmentations of photographs; FOLDER holds images of 64x64 pixels. config.data.name is
cityscapes or cityscapes_tfds, whose other image is `segmentation`, night2day, whose other image is `night`, or random, which makes images
up and needs nothing; mmdiff/projects/pairs/paired.py says what config.data.dir holds.

Of the paper: the other image is encoded by the identity; 0.1 times the loss of its head, a copy of the output block, added to that of eps;
pairs are sampled of night2day and photographs of Cityscapes' segmentations. It shows images, no metrics, and prints neither sizes nor
settings; imagenet64_label.py says what is of ADM, on which it builds, and what is ours. Ours are here, besides: DiT-B, as there are 2,975
pairs of Cityscapes; one network for all three uses, by the shares of its times; 100,000 steps of 128. For 128 pixels config.data.size=128
with config.model.patch=8.

This has not been trained here; its cost is unknown, and there is no evaluator. On 16 chips of v5e,
by the ahead-of-time report: 130.8M parameters, 4.6 GB a chip of 16.9 and a step of 19 ms at least.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Images, published
from mmdiff.processes import Aggregate, Gaussian, Hidden, MeanShift, eps, identity, moving_target
from mmdiff.projects.pairs.paired import OTHER, open_pairs
from mmdiff.training import optim

STEPS = 1000  # of the chain


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"name": "cityscapes", "dir": "", "size": 64, "damaged": 0.0},
        "model": {"size": "B", "patch": 4, "dtype": "bfloat16", "remat": "auto", "scan": True},
        "kappa": 1.0, "head_weight": 0.1,
        # Shares of the training times: other image hidden in the mean (U), known (X), absent (plain DDPM), absent with a clean image.
        "times": {"hidden": 0.4, "known": 0.4, "absent": 0.1, "clean": 0.1},
        "train": training_config(
            steps=100_000, global_batch=128, ema=0.9999, learning_rate=1e-4, warmup_steps=0, weight_decay=0.0,
            eval_every=5_000, log_every=100),
        "sample": {"steps": 250, "guidance": 1.0},
        "eval": {"examples": 512},  # held-out ones whose loss is measured, evenly spread over all of them
    })


def build(config):
    data, size = config.data, config.data.size
    other = OTHER.get(data.name, "segmentation")
    patches = nets.Patches(size, size, 3, config.model.patch)
    net = nets.MultiTaskDiT(patches, {other: nets.Grid(patches)}, **nets.options(config.model, without="patch"))
    schedule = schedules.cosine_beta(STEPS) if size <= 64 else schedules.linear_beta(STEPS)
    process = Aggregate(
        "image", {other: MeanShift(identity, moving_target(config.kappa))},
        {"image": Gaussian(schedule, eps, eta=1.0), other: Hidden(0.0)})
    noise_levels = times.multitask("image", other, times.on_grid(STEPS), config.times, ("hidden", "known", "absent", "clean"))
    return Experiment(
        process=process, net=net,
        modalities={name: Images(size, size, 3, name=name) for name in ("image", other)},
        loss=losses.diffusion(process, net.apply, noise_levels, losses.of_parts(process, image=1.0, **{other: config.head_weight})),
        optimizer=optim.adm(config.train), data=published(lambda split: open_pairs(data, split, size), config.eval.examples),
        sampler={"drop": (other,), "transforms": [sampling.only("image", sampling.clip(-1, 1))]})
