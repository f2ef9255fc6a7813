"""MT-Diffusion on 32x32x4 latents of 256-pixel ImageNet and CLIP's vectors of 768: after Chen et al. 2024, section 5.4.

    DATA="--config.data.dir=latents/imagenet256_clip"
    python -m mmdiff train  --config configs/mtdiffusion/imagenet_representation.py --workdir runs/clip $DATA
    python -m mmdiff sample --config configs/mtdiffusion/imagenet_representation.py --workdir runs/clip --given representation=A.npy
    python -m mmdiff sample --config configs/mtdiffusion/imagenet_representation.py --workdir runs/clip --given image=B.npy --steps 1
    python -m mmdiff aot    --config configs/mtdiffusion/imagenet_representation.py --topology v5e:4x4 --config.data.source=random

Data: a latent cache, whose layout mmdiff/data/latents.py describes, with the latents of configs/imagenet256/dit_xl2.py and, for each, the
image's vector of CLIP's image tower (ViT-L/14 or another of that size), times sqrt(768) over its length. Neither network comes along:

    write_latents(folder, "train", batches, {"image": Latents(32, 32, 4), "representation": Features(768)})

config.data.source=random makes up both and needs nothing. A.npy holds such vectors [n, 768], B.npy latents [n, 32, 32, 4]. Vectors of
another length are config.data.vector numbers long: 512 of ViT-B.

Of the paper: images with CLIP's representations in the space of Stable Diffusion's latents, 0.1 times the head's loss added to that of eps;
it samples images of texts, reports no metrics and prints no settings. Ours are the rest: a DiT-XL/2 from nothing and without texts, in the
place of Stable Diffusion; the recipe of dit_xl2.py with fixed variances; as the encoder a fixed orthogonal projection into the latents'
space, as large as they are; as the head an MLP on the network's middle, with the squared error; the weight of the vector in the mean,
sqrt(alpha_bar) t; the shares of the times, those of digits_representation.py.

This has not been trained here; its cost is unknown, and there is no evaluator: FID needs the weights of an Inception network, which do
not come along. 680.3M parameters, whose state takes 10.9 GB: on chips of 16 GB split it, by config.train.mesh.data=1 and mesh.fsdp=16:
with config.model.remat=dots then 3.9 GB a chip of v5e and a step of 59 ms at least, by the ahead-of-time report for 16.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, schedules, times, training_config
from mmdiff.data import Features, Latents, published
from mmdiff.data.latents import open_source
from mmdiff.processes import Aggregate, Gaussian, Hidden, MeanShift, eps, moving_target
from mmdiff.projects.digits.digit_features import projection
from mmdiff.training import optim

STEPS = 1000  # of the chain


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"source": "latents", "dir": "", "vector": 768},  # or random
        "model": {"size": "XL", "patch": 2, "dtype": "bfloat16", "remat": "none", "scan": True},
        "kappa": 1.0, "head_weight": 0.1,
        # Shares of the training times: representation known (X), hidden in the mean (U), absent (plain DDPM), absent with an image.
        "times": {"known": 0.35, "hidden": 0.25, "absent": 0.3, "clean": 0.1},
        "train": training_config(
            steps=400_000, global_batch=256, ema=0.9999, learning_rate=1e-4, warmup_steps=0, weight_decay=0.0,
            eval_every=50_000, checkpoint_every=5_000, log_every=100),
        "sample": {"steps": 250, "guidance": 1.5},
    })


def build(config):
    modalities = {"image": Latents(32, 32, 4), "representation": Features(config.data.vector)}
    net = nets.MultiTaskDiT(
        nets.Patches(32, 32, 4, config.model.patch), {"representation": nets.Vector(config.data.vector)},
        **nets.options(config.model, without="patch"))
    encode = projection(config.data.vector, (32, 32, 4), 1.0)  # as large as the latents
    process = Aggregate(
        "image", {"representation": MeanShift(encode, moving_target(config.kappa))},
        image=Gaussian(schedules.linear_beta(STEPS), eps, eta=1.0), representation=Hidden(0.0))
    noise_levels = times.multitask("image", "representation", times.on_grid(STEPS), config.times)
    return Experiment(
        process=process, net=net, modalities=modalities,
        loss=losses.diffusion(process, net.apply, noise_levels, losses.of_parts(process, image=1.0, representation=config.head_weight)),
        optimizer=optim.adm(config.train), data=published(lambda split: open_source(config.data, split, modalities)),
        sampler={"drop": ("representation",)})
