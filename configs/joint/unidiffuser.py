"""UniDiffuser: latents, CLIP's vector of the image and CLIP's states of the text in one diffusion, from the published weights; on COCO.

    ENCODERS="--config.encoder.path=weights/unidiffuser-v1/vae --config.vector_encoder.path=weights/clip-vit-base-patch32"
    ENCODERS="$ENCODERS --config.text_encoder.path=weights/clip-vit-large-patch14"
    ENCODERS="$ENCODERS --config.text_encoder.reduce=weights/unidiffuser-v1/text_decoder"
    USE="--config configs/joint/unidiffuser.py $ENCODERS"
    python -m mmdiff convert $USE --workdir runs/u --from weights/unidiffuser-v1 --as unidiffuser       # or --from uvit_v1.pth
    python -m mmdiff sample  $USE --workdir runs/u --given text="an elephant under the sea"             # images of a text
    python -m mmdiff sample  $USE --workdir runs/u --absent text                                        # images alone; without it, pairs
    python -m mmdiff cache   --config configs/joint/unidiffuser.py --out latents/unidiffuser $ENCODERS --config.data.images=coco
    python -m mmdiff train   $USE --workdir runs/tuned --config.train.start=runs/u --config.data.dir=latents/unidiffuser
    python -m mmdiff eval    $USE --workdir runs/tuned                                                  # retrieval, both ways
    python -m mmdiff aot     --config configs/joint/unidiffuser.py --topology v5e:4x4 --config.data.source=random \\
        --config.train.mesh.fsdp=16 --config.model.remat=full

weights/unidiffuser-v1: the folder of "thu-ml/unidiffuser-v1" as diffusers reads it, of which `convert` takes unet. Or name the authors'
uvit_v1.pth (AGPL-3.0 for their code; of the weights, see their page). Of v0: --config.model.data_types=0 --config.model.data_type=0.
Encoders and data are those of coco_vectors.py, whose head says what lies in `coco`; here images have 512 pixels, CLIP's vector of an image
keeps its length, and an example takes 75 KiB.

As published (the authors' sampler): the network, Stable Diffusion's table of 1,000 betas, eps, priors N(0, 1), one time for the latents and
the vector and another for the text. Guidance is of latents and vector by the text and of the text by these, w = 8: theirs, (1 + 7) c - 7 u.
`data_type` 1 is the authors' own pairs, 0 the web's. Recalled from the paper (Bao et al. 2023), for its training is not published: both
times uniform on 1/1000, ..., 1, and the squared error of all three noises as one vector.

Not theirs: 50 calls of DPM-Solver++(2M) down to t = 0 for DPM-Solver++-fast of third order down to 1/1000; the noise in the place of what
is absent from the unguided branch is drawn once a sample, not at every call; fine-tuning (all values of `train` are
ours); the text decoder, which is not part of mmdiff: a text is found among others (retrieval), not written.

This has not been sampled or trained here: no weights came along. tests/parity compares the network with diffusers'.
Cost: see configs/joint/README.md.
"""

from math import prod

from coco_vectors import encoded
from coco_vectors import get_config as coco_vectors
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, sampling, schedules, times
from mmdiff.processes import Gaussian, Joint, eps

AT_ONE_TIME, STEPS = ("image", "vision"), 1000


def get_config():
    config = coco_vectors()
    config.data.size = 64
    config.model = ConfigDict({
        "depth": 30, "width": 1536, "heads": 24, "patch": 2, "data_types": 2, "data_type": 1, "dtype": "bfloat16", "remat": "auto",
        "scan": True})
    config.weights.update(image=1.0, vision=1.0, text=1.0)  # of sums of squared errors
    config.train.update(steps=20_000, global_batch=256, learning_rate=2e-5, warmup_steps=1_000)
    config.sample.guidance = 8.0
    del config.times, config.eval.likelihood  # of the image alone, without its vector
    return config


def build(config):
    schedule, noisy = schedules.scaled_linear_beta(STEPS), times.on_grid(STEPS)
    streams, parts = encoded(config, normalized=False)
    process = Joint(**{name: Gaussian(schedule, eps, prior_std=1.0) for name in streams})
    net = nets.UViT(**streams, **nets.options(config.model, without="patch"))
    sizes = {name: prod(parts["modalities"][name].shape) for name in streams}  # a term is a mean over so many numbers
    weights = {name: config.weights[name] * size / sizes["image"] for name, size in sizes.items()}
    noise_levels = times.shared(*AT_ONE_TIME, times=noisy, text=noisy)
    solver = [sampling.only(name, sampling.dpmpp_2m(schedule)) for name in streams]
    return Experiment(
        process=process, net=net, loss=losses.diffusion(process, net.apply, noise_levels, losses.of_parts(process, **weights)),
        sampler={"each": tuple(streams), "shared": (AT_ONE_TIME,), "transforms": solver}, **parts)
