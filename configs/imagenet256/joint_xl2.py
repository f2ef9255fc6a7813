"""Joint image-label diffusion of XL size on 32x32x4 latents of 256-pixel ImageNet: one set of weights for pairs, images and labels.

    VAE="--config.encoder.path=weights/sd-vae-ft-ema"
    python -m mmdiff cache  --config configs/imagenet256/joint_xl2.py --out latents/imagenet256 $VAE --config.data.images=imagenet
    python -m mmdiff train  --config configs/imagenet256/joint_xl2.py --workdir runs/joint_xl2 $VAE --config.data.dir=latents/imagenet256
    python -m mmdiff sample --config configs/imagenet256/joint_xl2.py --workdir runs/joint_xl2 --given label=207
    python -m mmdiff sample --config configs/imagenet256/joint_xl2.py --workdir runs/joint_xl2 --given image=photo.jpg

Data and autoencoder are those of dit_xl2.py, and so is the cache. config.data.source=random makes up latents of the same shapes and needs
nothing.

`mmdiff eval` of a run measures label_accuracy, the label of each of 10,000 validation images by one network call, and with
--config.eval.encoder.kind=inception and its weights FID of samples given labels; FID of 50,000 samples as of dit_xl2.py.

configs/digits_joint.py at the size of DiT-XL/2: an MMDiT whose streams share their weights, the label one more token. Image: flow
matching, velocity. Label: absorbing diffusion, x_0 cross-entropy. The shares of the times lean further to class-conditional images.

Expected: nothing has been published or measured for it yet. Cost: 679M parameters, about the compute of DiT-XL/2.
"""

import optax
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Autoencoder, EncodedCache, EncodedLatents, Labels, published
from mmdiff.data.latents import open_source
from mmdiff.evals.held_out import LabelAccuracy
from mmdiff.evals.sampled_images import evaluators_of
from mmdiff.processes import Gaussian, Joint, absorbing, velocity
from mmdiff.training import optim

CLASSES = 1000


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "autoencoder_kl", "path": ""},  # or autoencoder_tiny
        "data": {"source": "latents", "dir": "", "set": "folder", "images": "", "max_skipped": 0},  # or random; cache reads set, images
        "model": {"size": "XL", "patch": 2, "dtype": "bfloat16", "remat": "auto", "scan": True},
        # Shares of the training times: both noisy; image given label; label given image; label given a noisy image; image without label.
        "times": {"joint": 0.2, "image_given_label": 0.5, "label_given_image": 0.05, "label_given_noisy": 0.15, "image_alone": 0.1},
        "label_weight": 0.1,
        "train": training_config(
            steps=400_000, global_batch=256, ema=0.9999, eval_every=50_000, checkpoint_every=5_000, log_every=100, sample_every=10_000,
            learning_rate=1e-4, base_batch=256, scale_rule="none", warmup_steps=1_000, weight_decay=0.0, clip=1.0,
            noise_scale=False, norm_groups=()),
        "sample": {"steps": 50, "guidance": 1.5},
        "eval": {  # no metrics of samples while kind is ""
            "encoder": {"kind": "", "path": ""}, "reference": "", "most": 10_000, "batch": 64, "in_loop": {"most": 5_000, "steps": 50}},
    })


def build(config):
    autoencoder = Autoencoder(config.encoder, 32)
    modalities = {"image": EncodedLatents(32, 32, 4, encoder=autoencoder), "label": Labels(CLASSES)}
    process = Joint(image=Gaussian(schedules.flow(), velocity), label=absorbing(CLASSES))
    net = nets.MMDiT(
        {"image": nets.Patches(32, 32, 4, config.model.patch), "label": nets.Label(states=CLASSES + 1, classes=CLASSES)}, shared=True,
        **nets.options(config.model, without="patch"))
    noise_levels = times.image_label(config.times)
    measured = evaluators_of(config.eval, condition="label")
    accuracy = LabelAccuracy(most=config.eval.most, batch=config.eval.batch)
    return Experiment(
        process=process, net=net, modalities=modalities,
        loss=losses.diffusion(process, net.apply, noise_levels, losses.of_parts(process, image=1.0, label=config.label_weight)),
        optimizer=optax.chain(optax.clip_by_global_norm(config.train.clip), optim.adm(config.train)),
        data=published(lambda split: open_source(config.data, split, modalities)),
        sampler={"drop": ("label",), "paths": {"label": sampling.settled_at(0.5)}},
        evaluators=(accuracy, *measured["evaluators"]), in_loop=measured["in_loop"],
        **EncodedCache(config.data, modalities, [autoencoder]).for_experiment)
