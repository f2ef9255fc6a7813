"""Two towers for DiffDis on emoji, a caption's and a picture's, trained with CLIP's loss, then frozen; and a baseline of their own.

    python -m mmdiff train --config configs/joint/emoji_towers.py --workdir runs/emoji_towers --config.data.dir=emoji64.tar
    python -m mmdiff eval  --config configs/joint/emoji_towers.py --workdir runs/emoji_towers
    python -m mmdiff cache --config configs/joint/emoji_towers.py --workdir runs/emoji_towers --out runs/emoji_vectors

configs/joint/emoji_diffdis.py reads the captions' vectors from runs/emoji_vectors, where config.data.towers names that folder.
Cost: 0.52M parameters, 1,500 steps of 256 pairs. Tested in small; not trained here.
"""

from functools import partial

import jax
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, matching, nets, times, training_config
from mmdiff.data import CacheWriter, Texts
from mmdiff.data.own import CroppedImages
from mmdiff.processes import Given, Joint
from mmdiff.projects.emoji.emoji import SHAPE, emoji_source, emoji_tokenizer
from mmdiff.projects.emoji.emoji_alignment import EmojiAlignment
from mmdiff.training import optim


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"dir": ""},
        "model": {"size": 64, "depth": 3, "width": 96, "text_depth": 2, "text_width": 64, "heads": 4, "patch": 4},
        "train": training_config(
            steps=1500, global_batch=256, ema=0.998, learning_rate=2e-3, warmup_steps=100, weight_decay=0.2, clip=1.0, eval_every=500),
        "sample": {"steps": 1, "guidance": 1.0}, "eval": {"most": 200, "candidates": 100},
    })


def build(config):
    tokenizer = emoji_tokenizer(config.data.dir)
    net = nets.TwoTowers(
        nets.Patches(*SHAPE, config.model.patch), vocabulary=tokenizer.size, length=tokenizer.length, padding=tokenizer.padding,
        **nets.options(config.model, without="patch"))
    process = Joint(image=Given(0.0), text=Given(0))
    encode_image = jax.jit(lambda params, images: net.apply(params, images, method="encode_image"))
    encode_text = jax.jit(lambda params, ids: net.apply(params, ids, method="encode_text")[1])
    return Experiment(
        process=process, net=net, modalities={"image": CroppedImages(*SHAPE), "text": Texts(tokenizer)},
        loss=losses.diffusion(process, net.apply, times.joint(image=0.0, text=0.0), {"infonce": (1.0, matching.clip_loss())}),
        optimizer=optim.adamw(config.train, optim.all_but("logit_")), data=partial(emoji_source, file=config.data.dir),
        evaluators=(EmojiAlignment(
            config.data.dir, lambda params, key, images: encode_image(params, images),
            lambda params, texts: encode_text(params, tokenizer.encode(texts)), **config.eval),),
        cache=CacheWriter(net, tokenizer=lambda: tokenizer))
