"""The tokenizer of CDCD's images: 256x256 pixels as 16x16 tokens of 974 codes (ImageNet) or 32x32 of 2,887 (COCO, CUB-200).

    SET="--config.data.name=coco_captions --config.data.dir=tfds"
    python -m mmdiff train  --config configs/cdcd/images_tokenizer.py --workdir runs/coco_tokenizer $SET
    python -m mmdiff eval   --config configs/cdcd/images_tokenizer.py --workdir runs/coco_tokenizer
    python -m mmdiff sample --config configs/cdcd/images_tokenizer.py --workdir runs/coco_tokenizer --given image=FOLDER
    python -m mmdiff cache  --config configs/cdcd/images_tokenizer.py --workdir runs/coco_tokenizer --out tokens/coco

FOLDER holds images of 256x256 pixels. config.data.name is imagenet2012, coco_captions, cub200 or folder (one's own images in classes, as
16x16 tokens); mmdiff/data/image_datasets.py says what config.data.dir then holds and where to get it. name=random makes images up and
needs nothing.

`cache` encodes every image once, with its label or the ids of its captions, for imagenet256_class.py, coco_text.py and cub200_text.py. The
tokenizer of the captions is trained on those of the training images and lies in the cache.

The paper's tokenizers are not ours: a VQGAN (ImageNet, one token for 16x16 pixels, 973 of 16,384 codes in use and one class for the rest)
and a Gumbel VQGAN (OpenImages, 8x8 pixels, 2,886 of 8,192), with a perceptual and an adversarial loss. This one has their token grids and
numbers of classes, is trained from nothing on the set itself by the squared error alone, and will blur what theirs renders sharply: do not
compare Fréchet distances of its images with theirs. It has not been trained here.
"""

from functools import cache, partial

from ml_collections import ConfigDict

from mmdiff import Experiment, training_config
from mmdiff.data import CacheWriter, Images, image_datasets, published
from mmdiff.evals.tokenizer import Reconstructions
from mmdiff.experiment import reconstructing
from mmdiff.nets.tokenizers import VQAutoencoder, vq_loss
from mmdiff.training import optim

SIZE = 256
CLASS = {"codes": 974, "halvings": 4, "multipliers": (1, 1, 2, 4)}  # of configs/cdcd/imagenet256_class.py
TEXT = {"codes": 2887, "halvings": 3, "multipliers": (1, 2, 4)}  # of configs/cdcd/coco_text.py and cub200_text.py


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"name": "imagenet2012", "dir": "", "damaged": 0.0},
        "model": {"code_size": 8, "features": 64, "encoder_blocks": 2, "decoder_blocks": 2},
        "loss": {"commitment": 0.25, "revive": 1.0},
        "train": training_config(
            steps=200_000, global_batch=64, ema=0.999, learning_rate=3e-4, warmup_steps=1000, weight_decay=1e-4, clip=1.0,
            eval_every=10_000, checkpoint_every=5_000, log_every=100),
        "sample": {"steps": 1, "guidance": 1.0},
        "eval": {"count": 1000},  # held-out ones, evenly spread over all of them, and as many of training
    })


def build(config):
    data, captioned = config.data, config.data.name in image_datasets.CAPTIONS
    net = VQAutoencoder(SIZE, SIZE, 3, **(TEXT if captioned else CLASS), **config.model)
    # Only `cache` needs the captions.
    tokenizer = cache(lambda: image_datasets.tokenizer(data.name, data.dir)) if captioned else None

    def split(name, tokenizer=None):
        return image_datasets.open_image_dataset(data, name, SIZE, tokenizer() if tokenizer else None)

    return Experiment(
        **reconstructing(net),
        modalities={name: Images(SIZE, SIZE, 3, name=name) for name in ("image", "reconstruction")},
        loss=vq_loss(net, **config.loss),
        optimizer=optim.adamw(config.train), data=published(split, config.eval.count),
        evaluators=(Reconstructions(net, pool=16),),
        cache=CacheWriter(net, {name: partial(split, name, tokenizer) for name in ("train", "val")}, tokenizer=tokenizer))
