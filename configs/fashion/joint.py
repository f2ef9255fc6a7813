"""Joint image-label diffusion on Fashion-MNIST: 32x32 grey images of clothes in ten classes.

    python -m mmdiff train  --config configs/fashion/joint.py --workdir runs/fashion --config.data.dir=FOLDER
    python -m mmdiff eval   --config configs/fashion/joint.py --workdir runs/fashion
    python -m mmdiff sample --config configs/fashion/joint.py --workdir runs/fashion --given label=sandal
    python -m mmdiff sample --config configs/fashion/joint.py --workdir runs/fashion --given image=FILE

FOLDER holds the four idx files, plain or compressed, or what TFDS has prepared (mmdiff/projects/fashion/fashion.py says where to get
them). 5,000 of the 60,000 training images are for validation, and `eval --split validation` measures on them; the test images are for
reporting.

One set of weights samples pairs, samples images of a label and labels images. Image: flow matching, velocity. Label: absorbing diffusion.
A convolutional stem (config.model.stem) is added to the patches of 4x4 pixels; there are no mirrored images, as all shoes point one way.

`eval` takes one set of 10,000 class-balanced samples, compares it with the test images, and as many training images with them (`_real`):
lite0-FD, precision and recall on EfficientNet-Lite0's features (the extra `features`), agreement and score by a small convolutional
classifier (configs/fashion/README.md). `--config.train.metrics_every=2000` measures 500 samples on validation images while it trains.

Measured (seed 0, 10,000 test images and as many samples, EMA weights, guidance 2 chosen on validation images, two CPU cores): label
accuracy 0.917, conditional agreement 0.936 (the classifier: 0.910 on real images), classification accuracy score 0.792, lite0-FD 406.9
(32.7 of as many training images), precision 0.610 (0.830), recall 0.308 (0.827). Cost: 1.35M parameters; 83 minutes of training beside
much other work, an estimated 60 on two quiet cores (0.40 s a step) of an AMD EPYC.
"""

from functools import partial

from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Images, Labels
from mmdiff.processes import Gaussian, Joint, absorbing, velocity
from mmdiff.projects.fashion import fashion_metrics
from mmdiff.projects.fashion.fashion import NAMES, SIZE, fashion_source
from mmdiff.training import optim

CLASSES = len(NAMES)


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"dir": ""},
        "model": {"width": 128, "depth": 4, "heads": 4, "patch": 4, "stem": 32},
        "times": {"joint": 0.15, "image_given_label": 0.35, "label_given_image": 0.4, "label_given_noisy": 0.05, "image_alone": 0.05},
        "label_weight": 0.4,
        "train": training_config(
            steps=9000, global_batch=128, ema=0.999, learning_rate=2.5e-3, warmup_steps=100, weight_decay=0.1, clip=1.0,
            eval_every=1000, checkpoint_every=250),
        "sample": {"steps": 12, "guidance": 2.0},
        "eval": {"samples": 10_000, "batch": 250, "classifier_steps": 2000, "in_loop": {"samples": 500, "classifier_steps": 300}},
    })


def build(config):
    process = Joint(image=Gaussian(schedules.flow(), velocity), label=absorbing(CLASSES))
    patches = nets.Patches(SIZE, SIZE, 1, config.model.patch, stem=config.model.stem)
    net = nets.MMDiT(
        {"image": patches, "label": nets.Label(states=CLASSES + 1, classes=CLASSES)}, shared=True,
        **nets.options(config.model, without=("patch", "stem")))
    return Experiment(
        process=process, net=net,
        modalities={"image": Images(SIZE, SIZE), "label": Labels(CLASSES, synonyms=NAMES)},
        loss=losses.diffusion(
            process, net.apply, times.image_label(config.times), losses.of_parts(process, image=1.0, label=config.label_weight)),
        optimizer=optim.muon(config.train), data=partial(fashion_source, folder=config.data.dir),
        sampler={"drop": ("label",), "heun": True, "paths": {"label": sampling.settled_at(0.5)}},
        **fashion_metrics.evaluators_of(config.data.dir, config.eval))
