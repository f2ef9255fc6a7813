"""CDCD on CUB-200 256x256 given a caption: the network of coco_text.py on birds, the paper's setting (Zhu et al. 2023).

    ENCODERS="--config.encoder.path=weights/vqgan_gumbel_f8_8192.ckpt --config.text_encoder.path=weights/clip-vit-base-patch32"
    python -m mmdiff cache  --config configs/cdcd/cub200_text.py --out tokens/cub $ENCODERS --config.data.images=cub
    python -m mmdiff train  --config configs/cdcd/cub200_text.py --workdir runs/cub_text $ENCODERS --config.data.dir=tokens/cub
    python -m mmdiff sample --config configs/cdcd/cub200_text.py --workdir runs/cub_text --given text="a small red bird with black wings"
    python -m mmdiff aot    --config configs/cdcd/cub200_text.py --topology v5e:4x4 --config.data.source=random

8,855 images of 150 kinds for training, 2,933 of the other 50 for testing, ten captions each (mmdiff/data/image_datasets.py says what lies
in `cub`). Tokens, states of captions (7 GB) and network are as in coco_text.py, whose head says which files the encoders are and how to
train one's own, and so is what is ours and not the paper's. As released for this set: Sample-Inter (the negatives, theirs chosen once from
other kinds of birds, are here images of other kinds in the batch), a rate of 4.5e-4 halved after 25,000 steps without progress, batch 48
(released: 6 a GPU; eight GPUs are our guess), 400 epochs of one caption an image.

For orientation, from a paper: VQ-Diffusion-S, see coco_text.py, has FID 12.97 by 30,000 samples (Gu et al. 2022). This has not been
trained here; its cost is unknown. FID is measured of a set of samples, as in configs/imagenet256/README.md.

With a text encoder of its own (config.text.published=false), on 16 chips of v5e by the ahead-of-time report: 99.0M parameters, 9.2 GB a
chip of 16.9 and a step of 76 ms at least (compiled in two to six minutes).
"""

from coco_text import build as build
from coco_text import get_config as coco


def get_config():
    config = coco()
    # The released weights, Sample-Inter. Step-Intra: --config.loss.step_intra=5e-5 --config.loss.sample_inter=0
    config.data.update(set="cub200", classes=200)
    config.loss.update(step_intra=0.0, sample_inter=5e-6)
    config.train.update(steps=73_800, global_batch=48, learning_rate=4.5e-4, patience=25_000)
    return config
