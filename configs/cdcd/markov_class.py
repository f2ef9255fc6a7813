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

from ml_collections import ConfigDict

from mmdiff import Experiment, contrastive, losses, nets, schedules, times, training_config
from mmdiff.data import Labels, Sequences
from mmdiff.processes import Given, Joint, MaskReplace
from mmdiff.projects.markov.markov_chains import chains, markov_source
from mmdiff.projects.markov.markov_sequences import MarkovSequences
from mmdiff.training import optim

CLASSES, STATES, LENGTH = 10, 16, 32  # the null label is CLASSES


def get_config():
    return ConfigDict({
        "seed": 0,
        "model": {"width": 64, "depth": 3, "heads": 4, "mlp_ratio": 2.0, "conv": True},
        "chain": {"steps": 80, "evidence": False}, "label_dropout": 0.1,
        # The released weights; see mmdiff.contrastive.cdcd. A contrast of weight 0 is left out.
        "loss": {"auxiliary": 5e-4, "step_intra": 5e-5, "step_inter": 0.0, "sample_intra": 0.0, "sample_inter": 0.0, "count": 10},
        "form": "linear", "temperature": 1.0,  # or weighted or infonce, of all contrasts
        "train": training_config(
            steps=2000, global_batch=128, ema=0.998, learning_rate=4e-3, warmup_steps=100, weight_decay=0.01, clip=1.0, eval_every=250),
        "sample": {"steps": 80, "guidance": 1.0}, "eval": {"batch": 500},
    })


def build(config):
    steps = config.chain.steps
    tokens = MaskReplace(STATES, schedules.vqd_released(steps), config.chain.evidence)
    process = Joint(tokens=tokens, label=Given(null=CLASSES))
    net = nets.TokenTransformer(classes=STATES, grid=(1, LENGTH), labels=CLASSES + 1, **nets.options(config.model))
    return Experiment(
        process=process, net=net,
        modalities={"tokens": Sequences(LENGTH, STATES), "label": Labels(CLASSES)},
        loss=losses.diffusion(
            process, net.apply, times.conditional("label", dropout=config.label_dropout, tokens=times.importance(steps, "vlb")),
            contrastive.cdcd(
                tokens, steps, of="tokens", given="label", form=contrastive.form(config.form, config.temperature), **config.loss)),
        optimizer=optim.adamw(config.train), data=markov_source,
        evaluators=(MarkovSequences(chains(), bound_steps=steps, batch=config.eval.batch),))
