"""CDCD on sequences whose law is known: ten Markov chains of 16 states, 32 tokens, given the chain.

    python -m mmdiff train  --config configs/cdcd/markov_class.py --workdir runs/markov_class
    python -m mmdiff eval   --config configs/cdcd/markov_class.py --workdir runs/markov_class
    python -m mmdiff sample --config configs/cdcd/markov_class.py --workdir runs/markov_class --given label=7

The likelihood and the class of any sample are exact here, so the contrasts (config.loss) can be compared without a classifier of ours:
launch/cdcd_experiments.py compares them.

Measured (seed 0, 2,000 samples of the held-out sequences' chains, EMA weights, 80 steps; in brackets the held-out sequences themselves):
Bayes' rule finds the chain of 0.893 (0.953); -log p under the true chain 2.595 nats per token (2.547); total variation of pairs of
neighbours 0.089 (0.076); bound on the likelihood 3.706 bits per token (3.675, the chains' own). A small network learns the chains better
without config.chain.evidence: 2.66 against 2.69 nats per token of the bound after 800 steps, for either of two seeds. Cost: eight minutes
of training on two CPU cores shared with other work.
"""

import optax
from ml_collections import ConfigDict

from mmdiff import contrastive, losses, nets, sampling, schedules, times
from mmdiff.data.modalities import Labels
from mmdiff.data.token_modalities import Sequences
from mmdiff.experiment import Experiment, initialiser
from mmdiff.processes import Given, Joint, MaskReplace
from mmdiff.projects.markov.markov_chains import chains, markov_source
from mmdiff.projects.markov.markov_sequences import MarkovSequences

CLASSES, STATES, LENGTH = 10, 16, 32  # the null label is CLASSES


def get_config():
    return ConfigDict({
        "seed": 0,
        "model": {"width": 64, "depth": 3, "heads": 4, "mlp_ratio": 2.0, "conv": True},
        "chain": {"steps": 80, "evidence": False},
        "label_dropout": 0.1,
        # The released weights; see mmdiff.contrastive.cdcd. A contrast of weight 0 is left out.
        "loss": {"auxiliary": 5e-4, "step_intra": 5e-5, "step_inter": 0.0, "sample_intra": 0.0, "sample_inter": 0.0, "count": 10},
        "form": "linear", "temperature": 1.0,  # or weighted or infonce, of all contrasts
        "train": {
            "steps": 2000, "global_batch": 128, "microbatches": 1, "ema": 0.998, "start": "",
            "learning_rate": 4e-3, "warmup_steps": 100, "weight_decay": 0.01, "clip": 1.0,
            "log_every": 50, "eval_every": 250, "checkpoint_every": 250, "keep": 2, "best": "", "prefetch": 4, "tensorboard": True,
            "mesh": {"slices": 1, "data": -1, "fsdp": 1, "seq": 1, "tensor": 1},
        },
        "sample": {"steps": 80, "guidance": 1.0},
        "eval": {"batch": 500},
    })


def build(config):
    steps, model, train = config.chain.steps, config.model, config.train
    tokens = MaskReplace(STATES, schedules.vqd_released(steps), config.chain.evidence)
    process = Joint(tokens=tokens, label=Given(null=CLASSES))
    net = nets.TokenTransformer(
        classes=STATES, grid=(1, LENGTH), depth=model.depth, width=model.width, heads=model.heads, labels=CLASSES + 1,
        mlp_ratio=model.mlp_ratio, conv=model.conv, scan=False)

    noisy = times.importance(steps, "vlb")
    when = times.mixture(
        (1 - config.label_dropout, times.joint(tokens=noisy, label=times.constant(0.0))),
        (config.label_dropout, times.joint(tokens=noisy, label=times.constant(1.0))))
    form = contrastive.form(config.form, config.temperature)
    terms = contrastive.cdcd(tokens, steps, of="tokens", given="label", form=form, **config.loss)

    rate = optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, train.warmup_steps, max(train.steps, train.warmup_steps + 1))
    shape = {"tokens": (LENGTH,), "label": ()}
    return Experiment(
        process=process,
        init=initialiser(net, process, shape),
        apply=net.apply,
        loss=losses.diffusion(process, net.apply, when, terms),
        optimizer=optax.chain(
            optax.clip_by_global_norm(train.clip), optax.adamw(rate, b2=0.99, weight_decay=train.weight_decay)),
        train_data=lambda: markov_source("train"),
        validation_data=lambda: markov_source("validation"),
        test_data=lambda: markov_source("test"),
        shape=shape,
        sample=sampling.make_sampler(process, net.apply, shape, drop=("label",)),
        modalities={"tokens": Sequences(LENGTH, STATES), "label": Labels(CLASSES)},
        evaluators=(MarkovSequences(chains(), bound_steps=steps, batch=config.eval.batch),),
    )
