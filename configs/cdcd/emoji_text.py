"""CDCD from text to image on real pictures: emoji of 32x32 pixels as codes of a VQ autoencoder, given their captions.

    DATA="--config.data.dir=emoji64.tar"
    python -m mmdiff train  --config configs/cdcd/emoji_tokenizer.py --workdir runs/emoji_tokenizer $DATA
    python -m mmdiff cache  --config configs/cdcd/emoji_tokenizer.py --workdir runs/emoji_tokenizer --out runs/emoji_tokens
    python -m mmdiff train  --config configs/cdcd/emoji_text.py --workdir runs/emoji_text $DATA
    python -m mmdiff eval   --config configs/cdcd/emoji_text.py --workdir runs/emoji_text
    python -m mmdiff sample --config configs/cdcd/emoji_text.py --workdir runs/emoji_text --given text="dark skin, man getting massage"

emoji64.tar is made of an npm package by one command, and pairs of a name and its tones are held out (configs/joint/README.md). Captions
and their tokenizer are those of configs/joint/emoji_tokens.py; the text encoder is trained with the network, and the chain is that of
configs/cdcd/scenes_text.py.

`eval` measures whether pictures sampled for captions of held-out pairs have their tone, and those for training captions their category,
beside what the tokenizer makes of the real pictures.

Not trained whole. In small trainings, three seeds, Sample-Inter at 300 times its released weight makes better samples, with Step-Intra at
a thousand times more so (configs/cdcd/README.md). 4.18M parameters.
"""

from functools import partial

from ml_collections import ConfigDict

from mmdiff import Experiment, contrastive, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Texts, TokenImages, network_fingerprint
from mmdiff.data.sources import digest
from mmdiff.data.token_cache import decoder
from mmdiff.processes import Given, Joint, MaskReplace
from mmdiff.projects.emoji.captioned_emoji import CaptionedEmoji
from mmdiff.projects.emoji.emoji import emoji_tokenizer, emoji_tokens
from mmdiff.training import optim

GRID, CODES = (8, 8), 512  # of configs/cdcd/emoji_tokenizer.py


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"dir": "", "tokens": "runs/emoji_tokens"},
        "model": {"width": 192, "depth": 4, "heads": 4, "patch": 2, "mlp_ratio": 4.0, "pooled": True},
        "text": {"width": 128, "depth": 1, "heads": 4},
        "chain": {"steps": 80, "evidence": True}, "text_dropout": 0.1,
        # The released weights; see mmdiff.contrastive.cdcd. A contrast of weight 0 is left out.
        "loss": {"auxiliary": 5e-4, "step_intra": 5e-5, "step_inter": 0.0, "sample_intra": 0.0, "sample_inter": 0.0, "count": 10},
        "form": "linear", "temperature": 1.0,  # or weighted or infonce, of all contrasts
        "train": training_config(
            steps=4000, global_batch=64, ema=0.998, learning_rate=2e-3, warmup_steps=100, weight_decay=0.1, clip=1.0, eval_every=500,
            checkpoint_every=500),
        "sample": {"steps": 40, "guidance": 2.0, "top_p": 0.86},  # truncated as released
        "eval": {"most": 200, "category_classifier_steps": 600, "batch": 50},
    })


def build(config):
    data, chain, tokenizer = config.data, config.chain, emoji_tokenizer(config.data.dir)
    tokens = MaskReplace(CODES, schedules.vqd_released(chain.steps), chain.evidence)
    process = Joint(tokens=tokens, text=Given(null=tokenizer.padding))
    encoder = nets.TextEncoder(tokenizer.size, tokenizer.length, scan=False, **config.text)
    net = nets.TokenTransformer(classes=CODES, grid=GRID, context=("text",), encoder=encoder, **nets.options(config.model))
    modalities = {"tokens": TokenImages(*GRID, CODES, decode=decoder(data.tokens)), "text": Texts(tokenizer)}
    return Experiment(
        process=process, net=net, modalities=modalities,
        loss=losses.diffusion(
            process, net.apply, times.conditional("text", dropout=config.text_dropout, tokens=times.importance(chain.steps, "vlb")),
            contrastive.cdcd(
                tokens, chain.steps, of="tokens", given="text", inter_negatives=contrastive.inter(config.loss.count, by="text"),
                form=contrastive.form(config.form, config.temperature), **config.loss)),
        optimizer=optim.muon(config.train), data=partial(emoji_tokens, folder=data.tokens, file=data.dir, modalities=modalities),
        sampler={"transforms": [sampling.only("tokens", sampling.top_p(config.sample.top_p))]},
        frozen_deps={
            "tokenizer": partial(network_fingerprint, data.tokens),
            "captions' tokenizer": lambda: digest(tokenizer.size, tokenizer.rules)},
        evaluators=(CaptionedEmoji(data.dir, "tokens", **config.eval),))
