"""MT-Diffusion on pairs of images of one scene, 64x64: the paper's image transition (Chen et al. 2024, section 5.1).

    SET="--config.data.name=cityscapes --config.data.dir=cityscapes"
    python -m mmdiff train  --config configs/mtdiffusion/pairs_transition.py --workdir runs/pairs $SET
    python -m mmdiff sample --config configs/mtdiffusion/pairs_transition.py --workdir runs/pairs
    python -m mmdiff sample --config configs/mtdiffusion/pairs_transition.py --workdir runs/pairs --given segmentation=FOLDER
    python -m mmdiff sample --config configs/mtdiffusion/pairs_transition.py --workdir runs/pairs --given image=FOLDER --steps 1
    python -m mmdiff aot    --config configs/mtdiffusion/pairs_transition.py --topology v5e:4x4 --config.data.name=random

These sample pairs, photographs of segmentations and segmentations of photographs; FOLDER holds images of 64x64 pixels. config.data.name is
cityscapes or cityscapes_tfds, whose other image is `segmentation`, night2day, whose other image is `night`, or random, which makes images
up and needs nothing; what config.data.dir holds says mmdiff/projects/pairs/paired.py.

Of the paper: the other image is encoded by the identity; 0.1 times the loss of its head, a copy of the output block, added to that of eps;
pairs are sampled of night2day and photographs of Cityscapes' segmentations. It shows images, no metrics, and prints neither sizes nor
settings; what is of ADM, on which it builds, and what is ours, says imagenet64_label.py. Ours are here, besides: DiT-B, as there are 2,975
pairs of Cityscapes; one network for all three uses, by the shares of its times; 100,000 steps of 128. For 128 pixels config.data.size=128
with config.model.patch=8.

This has not been trained here; its cost is unknown, and there is no evaluator. On 16 chips of v5e,
by the ahead-of-time report: 130.8M parameters, 4.6 GB a chip of 16.9 and a step of 19 ms at least.
"""

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mmdiff import losses, nets, sampling, schedules, times
from mmdiff.data.modalities import Images
from mmdiff.data.sources import Subset
from mmdiff.experiment import Experiment, initialiser
from mmdiff.processes import Aggregate, Gaussian, Hidden, MeanShift, eps, identity, moving_target
from mmdiff.projects.pairs.paired import OTHER, open_pairs
from mmdiff.training import optim

STEPS = 1000  # of the chain


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"name": "cityscapes", "dir": "", "size": 64, "damaged": 0.0},
        "model": {"size": "B", "patch": 4, "dtype": "bfloat16", "remat": "none", "scan": True},
        "kappa": 1.0,
        # Shares of the training times: other picture hidden in the mean (U), known (X), absent (plain DDPM), absent beside a clean image.
        "times": {"hidden": 0.4, "known": 0.4, "absent": 0.1, "clean": 0.1},
        "head_weight": 0.1,
        "train": {
            "steps": 100_000, "global_batch": 128, "microbatches": 1, "ema": 0.9999, "start": "",
            "learning_rate": 1e-4, "warmup_steps": 0, "weight_decay": 0.0,
            "log_every": 100, "eval_every": 5_000, "checkpoint_every": 5_000, "keep": 2, "best": "", "prefetch": 4, "tensorboard": True,
            "mesh": {"slices": 1, "data": -1, "fsdp": 1, "seq": 1, "tensor": 1},
        },
        "sample": {"steps": 250, "guidance": 1.0},
        "eval": {"examples": 512},  # held-out ones whose loss is measured, evenly spread over all of them
    })


def build(config):
    data, model, train = config.data, config.model, config.train
    other = OTHER.get(data.name, "segmentation")
    modalities = {name: Images(data.size, data.size, 3, name=name) for name in ("image", other)}
    shape = {name: modality.shape for name, modality in modalities.items()}
    patches = nets.Patches(*shape["image"], model.patch)
    depth, width, heads = nets.sizes(model.size)
    net = nets.MultiTaskDiT(
        patches, {other: nets.Grid(patches)},
        depth=depth, width=width, heads=heads, scan=model.scan, remat=model.remat, dtype=jnp.dtype(model.dtype))
    schedule = schedules.cosine_beta(STEPS) if data.size <= 64 else schedules.linear_beta(STEPS)
    process = Aggregate(
        "image", {other: MeanShift(identity, moving_target(config.kappa))},
        {"image": Gaussian(schedule, eps, eta=1.0), other: Hidden(0.0)})

    noisy, known, absent = times.on_grid(STEPS), times.constant(0.0), times.constant(1.0)
    when = times.mixture(
        (config.times.hidden, times.shared("image", other, times=noisy)),
        (config.times.known, times.joint(image=noisy, **{other: known})),
        (config.times.absent, times.joint(image=noisy, **{other: absent})),
        (config.times.clean, times.joint(image=known, **{other: absent})))
    # Each by itself: the other picture's also where it is absent, which is how it is told from an image.
    terms = {
        "image": (1.0, losses.on("image", process.parts["image"].loss)),
        other: (config.head_weight, losses.on(other, process.parts[other].loss)),
    }

    rate = optim.warmup(train.learning_rate, train.warmup_steps)
    return Experiment(
        process=process,
        init=initialiser(net, process, shape),
        apply=net.apply,
        loss=losses.diffusion(process, net.apply, when, terms),
        optimizer=optax.adamw(rate, weight_decay=train.weight_decay),
        train_data=lambda: open_pairs(data, "train", data.size),
        validation_data=lambda: Subset(open_pairs(data, "val", data.size), config.eval.examples),
        test_data=lambda: Subset(open_pairs(data, "val", data.size), config.eval.examples),  # the set has no third part with answers
        shape=shape,
        sample=sampling.make_sampler(process, net.apply, shape, drop=(other,), transforms=(sampling.only("image", sampling.clip(-1, 1)),)),
        modalities=modalities,
    )
