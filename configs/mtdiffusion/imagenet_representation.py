"""MT-Diffusion on 32x32x4 latents of 256-pixel ImageNet and CLIP's vectors of 768: after Chen et al. 2024, section 5.4.

    VAE="--config.encoder.path=weights/sd-vae-ft-ema"
    CLIP="--config.vector_encoder.path=weights/clip-vit-large-patch14"
    DATA="--config.data.dir=latents/imagenet256_clip"
    python -m mmdiff cache  --config configs/mtdiffusion/imagenet_representation.py --out latents/imagenet256_clip $VAE $CLIP \\
        --config.data.images=imagenet
    python -m mmdiff train  --config configs/mtdiffusion/imagenet_representation.py --workdir runs/clip $DATA $VAE $CLIP
    python -m mmdiff sample --config configs/mtdiffusion/imagenet_representation.py --workdir runs/clip --given representation=a.jpg
    python -m mmdiff sample --config configs/mtdiffusion/imagenet_representation.py --workdir runs/clip --given image=b.jpg --steps 1
    python -m mmdiff aot    --config configs/mtdiffusion/imagenet_representation.py --topology v5e:4x4 --config.data.source=random

Data: a latent cache that the first command writes, with the latents of configs/imagenet256/dit_xl2.py (its head says which images and which
autoencoder) and, for each, the image's vector of CLIP's image tower, times sqrt(768) over its length. weights/clip-vit-large-patch14 is the
folder of "openai/clip-vit-large-patch14" (MIT, with a statement of use in its card): config.json, preprocessor_config.json and
model.safetensors. config.vector_encoder.kind=dinov2 with the folder of "facebook/dinov2-base" (Apache-2.0, 768 numbers, too) takes its
class tokens, siglip_vision SigLIP's vectors. config.data.source=random makes up both and needs nothing. Vectors of another length are
config.data.vector numbers long: 512 of CLIP's ViT-B. --given takes images, or vectors [n, 768] and latents [n, 32, 32, 4] in .npy files.

Of the paper: images with CLIP's representations in the space of Stable Diffusion's latents, 0.1 times the head's loss added to that of eps;
it samples images of texts, reports no metrics and prints no settings. Ours are the rest: a DiT-XL/2 from nothing and without texts, in the
place of Stable Diffusion; the recipe of dit_xl2.py with fixed variances; as the encoder a fixed orthogonal projection into the latents'
space, as large as they are; as the head an MLP on the network's middle, with the squared error; the weight of the vector in the mean,
sqrt(alpha_bar) t; the shares of the times, those of digits_representation.py.

This has not been trained here; its cost is unknown. FID is measured of a set of samples, as in configs/imagenet256/README.md.
680.3M parameters, whose state takes 10.9 GB: on chips of 16 GB split it, by config.train.mesh.data=1 and mesh.fsdp=16: with
config.model.remat=dots then 3.9 GB a chip of v5e and a step of 59 ms at least, by the ahead-of-time report for 16.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, schedules, times, training_config
from mmdiff.data import Autoencoder, EncodedCache, EncodedLatents, EncodedVectors, ImageVectors, published
from mmdiff.data.latents import open_source
from mmdiff.processes import Aggregate, Gaussian, Hidden, MeanShift, eps, moving_target
from mmdiff.projects.digits.digit_features import projection
from mmdiff.training import optim

STEPS = 1000  # of the chain


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "autoencoder_kl", "path": ""},  # or autoencoder_tiny
        "vector_encoder": {"kind": "clip_vision", "path": ""},  # or siglip_vision or dinov2
        "data": {"source": "latents", "dir": "", "set": "folder", "images": "", "max_skipped": 0, "vector": 768},  # or random
        "model": {"size": "XL", "patch": 2, "dtype": "bfloat16", "remat": "auto", "scan": True},
        "kappa": 1.0, "head_weight": 0.1,
        # Shares of the training times: representation known (X), hidden in the mean (U), absent (plain DDPM), absent with an image.
        "times": {"known": 0.35, "hidden": 0.25, "absent": 0.3, "clean": 0.1},
        "train": training_config(
            steps=400_000, global_batch=256, ema=0.9999, learning_rate=1e-4, warmup_steps=0, weight_decay=0.0,
            eval_every=50_000, checkpoint_every=5_000, log_every=100),
        "sample": {"steps": 250, "guidance": 1.5},
    })


def build(config):
    autoencoder, vectors = Autoencoder(config.encoder, 32), ImageVectors(config.vector_encoder, config.data.vector)
    modalities = {
        "image": EncodedLatents(32, 32, 4, encoder=autoencoder),
        "representation": EncodedVectors(config.data.vector, encoder=vectors)}
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
        sampler={"drop": ("representation",)}, **EncodedCache(config.data, modalities, [autoencoder, vectors]).for_experiment)
