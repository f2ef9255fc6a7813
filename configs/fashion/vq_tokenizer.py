"""The tokenizer of Fashion-MNIST: 32x32 grey pixels as 8x8 tokens of 256 codes, by a VQ autoencoder.

    DATA="--config.data.dir=FOLDER"
    python -m mmdiff train --config configs/fashion/vq_tokenizer.py --workdir runs/fashion_tokenizer $DATA
    python -m mmdiff eval  --config configs/fashion/vq_tokenizer.py --workdir runs/fashion_tokenizer
    python -m mmdiff cache --config configs/fashion/vq_tokenizer.py --workdir runs/fashion_tokenizer --out runs/fashion_tokens

FOLDER holds the four idx files, or what TFDS has prepared (mmdiff/projects/fashion/fashion.py). `cache` encodes every image once, for
configs/fashion/vq_class.py.

Measured (seed 0, 10,000 test images, EMA weights): reconstruction PSNR 24.9 dB, mean squared error 0.0128, all 256 codes in use, perplexity
204, Fréchet ratio of pixels 2.01. Cost: 0.21M parameters.
"""

from functools import partial

from ml_collections import ConfigDict

from mmdiff import Experiment, training_config
from mmdiff.data import CacheWriter, Images
from mmdiff.evals.tokenizer import Reconstructions
from mmdiff.experiment import reconstructing
from mmdiff.nets.tokenizers import VQAutoencoder, vq_loss
from mmdiff.projects.fashion.fashion import SIZE, SPLITS, fashion_source
from mmdiff.training import optim


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"dir": ""},
        "model": {
            "codes": 256, "code_size": 8, "halvings": 2, "features": 32, "multipliers": (1, 2), "encoder_blocks": 1, "decoder_blocks": 1},
        "loss": {"commitment": 0.25, "revive": 1.0},
        "train": training_config(
            steps=2500, global_batch=64, ema=0.995, learning_rate=2e-3, warmup_steps=50, weight_decay=1e-4, clip=1.0, eval_every=500),
        "sample": {"steps": 1, "guidance": 1.0},
    })


def build(config):
    net, clothes = VQAutoencoder(SIZE, SIZE, 1, **config.model), partial(fashion_source, folder=config.data.dir)
    return Experiment(
        **reconstructing(net),
        modalities={name: Images(SIZE, SIZE, name=name) for name in ("image", "reconstruction")},
        loss=vq_loss(net, **config.loss),
        optimizer=optim.adamw(config.train), data=clothes,
        evaluators=(Reconstructions(net, pool=16),),
        cache=CacheWriter(net, {split: partial(clothes, split) for split in SPLITS}))
