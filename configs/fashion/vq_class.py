"""CDCD on Fashion-MNIST: 32x32 pixels as 8x8 codes of a VQ autoencoder, given the class, by mask-and-replace diffusion with its contrast.

    DATA="--config.data.dir=FOLDER"
    python -m mmdiff train --config configs/fashion/vq_tokenizer.py --workdir runs/fashion_tokenizer $DATA
    python -m mmdiff cache --config configs/fashion/vq_tokenizer.py --workdir runs/fashion_tokenizer --out runs/fashion_tokens
    python -m mmdiff train --config configs/fashion/vq_class.py --workdir runs/fashion_class $DATA
    python -m mmdiff eval  --config configs/fashion/vq_class.py --workdir runs/fashion_class
    python -m mmdiff sample --config configs/fashion/vq_class.py --workdir runs/fashion_class --given label=sandal

FOLDER, of which the evaluation takes the real images, is that of configs/fashion/joint.py; the chain is configs/cdcd/digits_class.py's.
`eval` measures what configs/fashion/README.md says, but the label.

Measured (seed 0, 10,000 test images and as many samples, EMA weights, 40 steps, guidance 1.5 chosen on validation images, one CPU core):
conditional agreement 0.934 (the classifier: 0.909 on real images), classification accuracy score 0.827, lite0-FD 540 (32.7 of as many
training images), precision 0.410 (0.830), recall 0.103 (0.827). Cost: 2.77M parameters; 3,000 steps of 1.1 s on one core of an AMD EPYC,
which took 93 minutes beside much other work.
"""

from functools import partial

from ml_collections import ConfigDict

from mmdiff import Experiment, contrastive, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Labels, TokenImages, network_fingerprint
from mmdiff.data.token_cache import decoder, token_source
from mmdiff.processes import Given, Joint, MaskReplace
from mmdiff.projects.fashion import fashion_metrics
from mmdiff.projects.fashion.fashion import NAMES
from mmdiff.training import optim

GRID, CODES = (8, 8), 256  # of configs/fashion/vq_tokenizer.py


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"dir": "", "tokens": "runs/fashion_tokens"},
        "model": {"width": 192, "depth": 4, "heads": 4, "patch": 2, "mlp_ratio": 4.0},
        "chain": {"steps": 80, "evidence": True}, "label_dropout": 0.1,
        # The released weights; see mmdiff.contrastive.cdcd. A contrast of weight 0 is left out.
        "loss": {"auxiliary": 5e-4, "step_intra": 5e-5, "step_inter": 0.0, "sample_intra": 0.0, "sample_inter": 0.0, "count": 10},
        "form": "linear", "temperature": 1.0,  # or weighted or infonce, of all contrasts
        "train": training_config(
            steps=3000, global_batch=128, ema=0.999, learning_rate=2e-3, warmup_steps=200, weight_decay=0.05, clip=1.0,
            eval_every=1000, checkpoint_every=500),
        "sample": {"steps": 40, "guidance": 1.5, "top_p": 1.0},
        "eval": {"samples": 10_000, "batch": 250, "classifier_steps": 2000, "in_loop": {"samples": 500, "classifier_steps": 300}},
    })


def build(config):
    data, chain, classes = config.data, config.chain, len(NAMES)  # the null label is `classes`
    tokens = MaskReplace(CODES, schedules.vqd_released(chain.steps), chain.evidence)
    process = Joint(tokens=tokens, label=Given(null=classes))
    net = nets.TokenTransformer(classes=CODES, grid=GRID, labels=classes + 1, **nets.options(config.model))
    modalities = {"tokens": TokenImages(*GRID, CODES, decode=decoder(data.tokens)), "label": Labels(classes, synonyms=NAMES)}
    return Experiment(
        process=process, net=net, modalities=modalities,
        loss=losses.diffusion(
            process, net.apply, times.conditional("label", dropout=config.label_dropout, tokens=times.importance(chain.steps, "vlb")),
            contrastive.cdcd(
                tokens, chain.steps, of="tokens", given="label", form=contrastive.form(config.form, config.temperature), **config.loss)),
        optimizer=optim.muon(config.train), data=partial(token_source, data.tokens, modalities=modalities),
        sampler={"transforms": [sampling.only("tokens", sampling.top_p(config.sample.top_p))]},
        frozen_deps={"tokenizer": partial(network_fingerprint, data.tokens)},
        **fashion_metrics.evaluators_of(data.dir, config.eval, target="tokens"))
