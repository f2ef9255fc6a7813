"""Your own images with captions: images of a text, texts for an image, both together and images alone, by one set of weights.

    python -m mmdiff train  --config configs/own/captions.py --workdir runs/mine --config.data.dir=FOLDER
    python -m mmdiff sample --config configs/own/captions.py --workdir runs/mine --given caption="a red circle"
    python -m mmdiff eval   --config configs/own/captions.py --workdir runs/mine

FOLDER holds tar files as of WebDataset and img2dataset (NAME.png with NAME.txt, or a NAME.json with "caption"), or is one of them; or
images next to such files, or images and a captions.csv, .tsv or .json (mmdiff/data/image_folders.py). A tenth each is held out for
validation and test, unless FOLDER has folders train, val and test. `--given image=FILE` writes captions of an image, and
`--absent caption` samples images alone.

The captions' tokenizer (byte pairs) is learnt from those of the training images, and has config.data.vocabulary ids at most; a caption
has config.data.length of them at most. The words of a text that is given must occur in these captions.

config.task=conditional trains images of a text only. The head of configs/own/images.py says how images are read, and what to set for
larger ones. For tokens of a VQ autoencoder instead of pixels: configs/cdcd/images_tokenizer.py with --config.data.name=captioned.

Image: flow matching, velocity. Caption: absorbing diffusion of its ids. Cost: 2.6M parameters; ten minutes on two CPU cores, estimated.

Measured on 300 made-up images in a tar file, "a red circle" and eight other captions (240 for training), with config.data.size=16 and 750
steps of batch 32: 48 of 48 samples for three texts have their colour; the own caption is found among nine in 0.80 of 30 test images, the
Fréchet ratio is 1.42.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, schedules, times, training_config
from mmdiff.data.own import open_images
from mmdiff.errors import UserError
from mmdiff.evals.held_out import HeldOut
from mmdiff.evals.sampled_images import sample_metrics
from mmdiff.processes import Gaussian, Given, Joint, absorbing, velocity
from mmdiff.training import optim


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {
            "dir": "", "size": 32, "channels": 3, "flips": 0.0, "damaged": 0.0, "validation": 0.1, "test": 0.1,
            "length": 64, "vocabulary": 1024},
        "model": {"width": 128, "depth": 4, "heads": 4, "patch": 4, "dtype": "float32", "scan": False, "remat": "none"},
        "task": "joint",  # or conditional: images of a text alone
        # Shares of the training times: both noisy; image given caption; caption given image; image without caption.
        "times": {"joint": 0.1, "image_given_caption": 0.6, "caption_given_image": 0.2, "image_alone": 0.1},
        "caption_weight": 0.3,
        "train": training_config(
            steps=3000, global_batch=64, ema=0.998, learning_rate=2e-3, warmup_steps=100, weight_decay=0.1, clip=1.0, eval_every=500,
            sample_every=1000, metrics_every=0),
        "sample": {"steps": 25, "guidance": 2.0},
        "eval": {"most": 200, "batch": 64, "encoder": {"kind": "", "path": ""}, "in_loop": {"most": 200, "steps": 10}},
    })


def build(config):
    if config.task not in ("joint", "conditional"):
        raise UserError(f"config.task is {config.task!r}: choose joint or conditional.")
    own, shares = open_images(config.data, "caption"), config.times
    joint, tokenizer = config.task == "joint", own.modalities["caption"].tokenizer
    caption = absorbing(tokenizer.size) if joint else Given(null=tokenizer.padding)
    process = Joint(image=Gaussian(schedules.flow(), velocity), caption=caption)
    streams = {
        "image": nets.Patches(*own.shape["image"], config.model.patch),
        "caption": nets.Tokens(tokenizer.length, states=tokenizer.size + 1, classes=tokenizer.size)}
    net = nets.MMDiT(streams, **nets.options(config.model, without="patch"))

    noisy = times.uniform()
    all_tasks = times.mixture(
        (shares.joint, times.joint(image=noisy, caption=noisy)),
        (shares.image_given_caption, times.joint(image=noisy, caption=0.0)),
        (shares.caption_given_image, times.joint(image=0.0, caption=noisy)),
        (shares.image_alone, times.joint(image=noisy, caption=1.0)))
    noise_levels = all_tasks if joint else times.conditional("caption", dropout=shares.image_alone, image=noisy)
    weights = {"image": 1.0, "caption": config.caption_weight} if joint else {"image": 1.0}
    loss = losses.diffusion(process, net.apply, noise_levels, losses.of_parts(process, **weights))
    measured = {"most": config.eval.most, "batch": config.eval.batch}
    return Experiment(
        process=process, net=net, **own.for_experiment,
        loss=losses.prepared(loss, losses.flips("image", config.data.flips)),
        optimizer=optim.muon(config.train),
        sampler={"drop": ("caption",), "heun": True},
        evaluators=(HeldOut(condition="caption", **measured), *sample_metrics(config.eval.encoder, condition="caption", **measured)),
        in_loop=sample_metrics(config.eval.encoder, condition="caption", limits=False, **{**measured, **config.eval.in_loop}),
    )
