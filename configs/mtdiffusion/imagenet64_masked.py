"""MT-Diffusion on masked ImageNet 64x64: images restored, and sampled from nothing (Chen et al. 2024, section 5.2).

    SET="--config.data.name=imagenet2012 --config.data.dir=tfds"
    python -m mmdiff train  --config configs/mtdiffusion/imagenet64_masked.py --workdir runs/masked $SET
    python -m mmdiff sample --config configs/mtdiffusion/imagenet64_masked.py --workdir runs/masked --given masked=A.npy --given mask=B.npy
    python -m mmdiff sample --config configs/mtdiffusion/imagenet64_masked.py --workdir runs/masked --absent masked
    python -m mmdiff aot    --config configs/mtdiffusion/imagenet64_masked.py --topology v5e:4x4 --config.data.name=random \\
        --config.train.mesh.data=1 --config.train.mesh.fsdp=16

config.data.name is imagenet2012 (TFDS), folder (one's own images in classes, which are not used) or random, which makes images up and needs
nothing; mmdiff/data/image_datasets.py says what config.data.dir holds. A.npy holds images [n, 64, 64, 3] in [-1, 1] with zeros where they
are hidden, B.npy [n, 64, 64, 1] is 1 there and 0 elsewhere: ones everywhere sample whole images, as the paper's X does.

Of the paper: up to ten patches of 16x16, hidden as zeros in the masked image, which is encoded by the identity; 0.1 times the loss of its
head, a copy of the output block, added to that of eps; a million steps from nothing. X is shown the masked image, and U is not:
config.times.known=0.0 with times.hidden=0.8. It builds on ADM (Dhariwal & Nichol 2021) and prints no more; imagenet64_label.py says
what is of ADM and what is ours. Ours are here, besides: the network is shown the mask, too, as a zero is also a grey; a tenth of the masks
hide everything, since ten patches leave at least 37 % to be seen and X is to sample from nothing; the shares of the times, those of
digits_masked.py. For 128 pixels config.data.size=128 with config.model.patch=8.

For orientation, from the paper: of 5,000 samples FID 9.85 (X) and 26.00 (U), against ADM's 23.22 without labels and 16.35 with them;
LPIPS of restored images 0.035, 0.068, 0.099, 0.133 for 5, 10, 15, 20 patches (X). This has not been trained here; its cost is unknown.
FID is measured of a set of samples, as in configs/imagenet256/README.md; LPIPS is not there. On 16 chips of v5e, by the ahead-of-time
report (the command above): 459.1M parameters, 2.9 GB a chip of 16.9, 11.9 GB of main memory and a step of 39 ms at least, bound by
compute (82 ms by the compiler's own time, and 17 ms of links exposed); with the whole state on every chip and remat=dots 11.4 GB and 54
ms.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Images, published
from mmdiff.data.image_datasets import open_image_dataset
from mmdiff.data.masks import masking
from mmdiff.processes import Aggregate, Gaussian, Given, Hidden, MeanShift, eps, identity, moving_target
from mmdiff.training import optim

STEPS = 1000  # of the chain


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"name": "imagenet2012", "dir": "", "size": 64, "damaged": 0.0},
        "model": {"size": "L", "patch": 4, "dtype": "bfloat16", "remat": "auto", "scan": True},
        "kappa": 1.0, "head_weight": 0.1,
        # Up to so many patches of so many pixels are hidden, and everything in some images.
        "patches": {"size": 16, "most": 10, "complete": 0.1},
        # Shares of the training times: masked image and mask known (X), hidden but in the mean (U), absent (plain DDPM).
        "times": {"known": 0.6, "hidden": 0.2, "absent": 0.2},
        "train": training_config(
            steps=1_000_000, global_batch=256, ema=0.9999, learning_rate=1e-4, warmup_steps=0, weight_decay=0.0,
            eval_every=50_000, checkpoint_every=5_000, log_every=100),
        "sample": {"steps": 250, "guidance": 1.0},
        "eval": {"examples": 2048},  # held-out ones whose loss is measured, evenly spread over all of them
    })


def build(config):
    size = config.data.size
    modalities = {name: Images(size, size, channels, name=name) for name, channels in (("image", 3), ("masked", 3), ("mask", 1))}
    patches, masked, mask = (nets.Patches(*each.shape, config.model.patch) for each in modalities.values())
    net = nets.MultiTaskDiT(
        patches, {"masked": nets.Grid(masked), "mask": nets.Grid(mask, head=False)}, **nets.options(config.model, without="patch"))
    schedule = schedules.cosine_beta(STEPS) if size <= 64 else schedules.linear_beta(STEPS)
    process = Aggregate(
        "image", {"masked": MeanShift(identity, moving_target(config.kappa))},
        image=Gaussian(schedule, eps, eta=1.0), masked=Hidden(0.0), mask=Given(1.0))
    noisy = times.on_grid(STEPS)
    noise_levels = times.mixture(
        (config.times.known, times.joint(image=noisy, masked=0.0, mask=0.0)),
        (config.times.hidden, times.shared("image", "masked", times=noisy, mask=1.0)),
        (config.times.absent, times.joint(image=noisy, masked=1.0, mask=1.0)))
    loss = losses.diffusion(process, net.apply, noise_levels, losses.weighted(process, masked=config.head_weight))
    return Experiment(
        process=process, net=net, modalities=modalities,
        loss=losses.prepared(loss, masking(**config.patches)),
        optimizer=optim.adm(config.train), data=published(lambda split: open_image_dataset(config.data, split, size), config.eval.examples),
        sampler={"drop": ("masked", "mask"), "transforms": [sampling.only("image", sampling.clip(-1, 1))]})
