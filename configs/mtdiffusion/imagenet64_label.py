"""MT-Diffusion on ImageNet 64x64 and its 1,000 classes: the paper's joint image and label (Chen et al. 2024, section 5.3).

    SET="--config.data.name=imagenet2012 --config.data.dir=tfds"
    python -m mmdiff train  --config configs/mtdiffusion/imagenet64_label.py --workdir runs/label $SET
    python -m mmdiff sample --config configs/mtdiffusion/imagenet64_label.py --workdir runs/label --given label=207
    python -m mmdiff sample --config configs/mtdiffusion/imagenet64_label.py --workdir runs/label --given image=FOLDER --steps 1
    python -m mmdiff aot    --config configs/mtdiffusion/imagenet64_label.py --topology v5e:4x4 --config.data.name=random \\
        --config.train.mesh.data=1 --config.train.mesh.fsdp=16

config.data.name is imagenet2012 (TFDS), folder (one's own copy of it) or random, which makes images up and needs nothing;
mmdiff/data/image_datasets.py says what config.data.dir holds. FOLDER holds images of 64x64 pixels; the third command predicts classes.

Of the paper: 0.1 times the head's loss added to that of eps, the network itself as the encoder of labels (here its average, of weights and,
where it guesses, of embeddings), the head an MLP on its middle (M) or, by config.model.head=output, a classifier on its output (E), a
million steps from nothing. Its M* and E* were tuned further on one task: to sample,

    --config.train.start=runs/label --config.head_weight=0.0 --config.times.hidden=0.0 --config.times.known=0.9 \\
        --config.times.absent=0.1 --config.times.clean=0.0

or, with times.clean=1.0 alone, to name. It builds on ADM (Dhariwal & Nichol 2021) and prints no more; of ADM are 1,000 steps, betas by
the cosine for 64 pixels and linear above, AdamW without decay or warm-up and EMA 0.9999. From memory, unverified: ADM's rate is 3e-4
with a batch of 2,048 for 64 pixels, and 1e-4 with 256 for 128, for which its U-Nets have 296M and 422M parameters.

Ours: DiT-L on 4x4 patches in the place of the U-Net; fixed variances, where ADM learns them; the weight of the label in the mean,
sqrt(alpha_bar) t (the paper names none); the shares of the times, those of digits_label.py; the rate and the batch; bfloat16.
For 128 pixels config.data.size=128 with config.model.patch=8.

For orientation, from the paper, 5,000 samples: FID 33.92 (M), 13.48 (M*), 41.00 (E), 11.28 (E*), against ADM's 23.22 without labels and
16.35 with them. This has not been trained here; its cost is unknown. FID is measured of a set of samples, as in
configs/imagenet256/README.md.

On 16 chips of v5e, by the ahead-of-time report (the command above): 462.0M parameters (M; 499.9M with E), 3.0 GB a chip of 16.9, 12.2 GB of
main memory and a step of 52 ms at least, bound by compute (98 ms by the compiler's own time, and 18 ms of links exposed). With the whole
state on every chip, remat=dots, 11.4 GB, 52.5 GB, half of it the optimizer's, and 64 ms.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Images, Labels, published
from mmdiff.data.image_datasets import open_image_dataset
from mmdiff.processes import Aggregate, Gaussian, MeanShift, absorbing, by_network, eps, moving_target
from mmdiff.training import optim

CLASSES, STEPS = 1000, 1000  # the null label is CLASSES; STEPS of the chain


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"name": "imagenet2012", "dir": "", "size": 64, "damaged": 0.0},
        "model": {"size": "L", "patch": 4, "head": "middle", "dtype": "bfloat16", "remat": "auto", "scan": True},
        "kappa": 1.0, "head_weight": 0.1,
        # Shares of the training times: label hidden in the mean (U), known (X), absent (plain DDPM), absent with a clean image.
        "times": {"hidden": 0.3, "known": 0.3, "absent": 0.3, "clean": 0.1},
        "train": training_config(
            steps=1_000_000, global_batch=256, ema=0.9999, learning_rate=1e-4, warmup_steps=0, weight_decay=0.0,
            eval_every=50_000, checkpoint_every=5_000, log_every=100),
        "sample": {"steps": 250, "guidance": 1.0},
        "eval": {"examples": 2048},  # held-out ones whose loss is measured, evenly spread over all of them
    })


def build(config):
    size = config.data.size
    net = nets.MultiTaskDiT(
        nets.Patches(size, size, 3, config.model.patch), {"label": nets.Classes(CLASSES + 1, CLASSES, config.model.head)},
        **nets.options(config.model, without=("patch", "head")))
    image = Gaussian(schedules.cosine_beta(STEPS) if size <= 64 else schedules.linear_beta(STEPS), eps, eta=1.0)
    encode = by_network(net.apply, image, (size, size, 3), "label", CLASSES, mixed=True)
    process = Aggregate(
        "image", {"label": MeanShift(encode, moving_target(config.kappa), shared=True)},
        image=image, label=absorbing(CLASSES, schedules.at_once()))
    noise_levels = times.multitask("image", "label", times.on_grid(STEPS), config.times, ("hidden", "known", "absent", "clean"))
    return Experiment(
        process=process, net=net,
        modalities={"image": Images(size, size, 3), "label": Labels(CLASSES)},
        loss=losses.diffusion(process, net.apply, noise_levels, losses.of_parts(process, image=1.0, label=config.head_weight)),
        optimizer=optim.adm(config.train), data=published(lambda split: open_image_dataset(config.data, split, size), config.eval.examples),
        sampler={"drop": ("label",), "transforms": [sampling.only("image", sampling.clip(-1, 1))]})
