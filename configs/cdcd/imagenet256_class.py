"""CDCD on ImageNet 256x256 given the class: 16x16 tokens of 974 codes, the paper's setting (Zhu et al. 2023).

    SET="--config.data.name=imagenet2012 --config.data.dir=tfds"
    python -m mmdiff train  --config configs/cdcd/pictures_tokenizer.py --workdir runs/imagenet_tokenizer $SET
    python -m mmdiff cache  --config configs/cdcd/pictures_tokenizer.py --workdir runs/imagenet_tokenizer --out tokens/imagenet
    python -m mmdiff train  --config configs/cdcd/imagenet256_class.py --workdir runs/imagenet_class --config.data.dir=tokens/imagenet
    python -m mmdiff sample --config configs/cdcd/imagenet256_class.py --workdir runs/imagenet_class --given label=207
    python -m mmdiff aot    --config configs/cdcd/imagenet256_class.py --topology v5e:4x4 --config.data.source=random

The tokenizer is ours (see configs/cdcd/pictures_tokenizer.py), the network the published one, whose position table has 32 columns for a
grid of 16.

The recipe, as released: Step-Intra with ten negatives, importance-sampled times, auxiliary weight 1e-3; AdamW (0.9, 0.96) with decay
4.5e-2 on every weight, gradients clipped at 0.5 from first to last; a rate of 4.5e-4, reached in 5,000 steps from 3e-6 and halved after
100,000 without progress; batch 192 (released: 24 a GPU; eight GPUs are our guess), 100 epochs. Their average takes 0.99 every 25 steps,
ours the same 0.9996 every step. Sampling takes 80 steps and keeps the likeliest classes of total probability 0.86. Not theirs: labels are
dropped for a tenth of the examples, so that config.sample.guidance can be above 1, and activations are bfloat16.
config.loss.sample_inter=5e-6 with step_intra=0 is Sample-Inter, its negatives being others of the batch.

For orientation, from a paper: VQ-Diffusion, without the contrast but with 100 steps and their tokenizer, has FID 11.89 (Gu et al. 2022;
others who ran its code found about 20). This has not been trained here; its cost is unknown, and there is no evaluator: FID needs the
weights of an Inception network, which do not come along.

On 16 chips of v5e, by the ahead-of-time report: 517.8M parameters, 15.9 GB a chip of 16.9 and a step of 60 ms at least (compiled in
two minutes). config.train.mesh.data=1 with mesh.fsdp=16 splits the state, 8.3 GB of these.
"""

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mmdiff import contrastive, losses, nets, sampling, schedules, times
from mmdiff.data.modalities import Labels
from mmdiff.data.network_cache import network_fingerprint
from mmdiff.data.sources import Subset
from mmdiff.data.token_cache import decoder, open_tokens
from mmdiff.data.token_modalities import TokenImages
from mmdiff.experiment import Experiment, initialiser
from mmdiff.processes import Given, Joint, MaskReplace
from mmdiff.training import optim

CLASSES, GRID, CODES = 1000, (16, 16), 974  # the null label is CLASSES; tokens as of configs/cdcd/pictures_tokenizer.py


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"source": "tokens", "dir": ""},  # or random
        "model": {"width": 512, "depth": 24, "heads": 16, "dtype": "bfloat16", "remat": "none", "scan": True},
        "chain": {"steps": 80, "evidence": False},
        "label_dropout": 0.1,
        # The released weights, Step-Intra; see mmdiff.contrastive.cdcd. A contrast of weight 0 is left out.
        "loss": {"auxiliary": 1e-3, "step_intra": 5e-5, "step_inter": 0.0, "sample_intra": 0.0, "sample_inter": 0.0, "count": 10},
        "form": "linear", "temperature": 1.0,  # or weighted or infonce, of all contrasts
        "train": {
            "steps": 667_000, "global_batch": 192, "microbatches": 1, "ema": 0.9996, "start": "",
            "learning_rate": 4.5e-4, "warmup_steps": 5000, "patience": 100_000, "weight_decay": 4.5e-2, "clip": 0.5,
            "log_every": 100, "eval_every": 10_000, "checkpoint_every": 5_000, "keep": 2, "best": "", "prefetch": 4, "tensorboard": True,
            "mesh": {"slices": 1, "data": -1, "fsdp": 1, "seq": 1, "tensor": 1},
        },
        "sample": {"steps": 80, "guidance": 1.0, "top_p": 0.86},
        "eval": {"examples": 2048},  # held-out ones whose loss is measured, evenly spread over all of them
    })


def build(config):
    data, steps, train = config.data, config.chain.steps, config.train
    tokens = MaskReplace(CODES, schedules.vqd_released(steps), config.chain.evidence)
    process = Joint(tokens=tokens, label=Given(null=CLASSES))
    net = nets.cdcd("imagenet", labels=CLASSES + 1, times=steps, **{**config.model, "dtype": jnp.dtype(config.model.dtype)})

    noisy = times.importance(steps, "vlb")
    when = times.mixture(
        (1 - config.label_dropout, times.joint(tokens=noisy, label=times.constant(0.0))),
        (config.label_dropout, times.joint(tokens=noisy, label=times.constant(1.0))))
    form = contrastive.form(config.form, config.temperature)
    terms = contrastive.cdcd(tokens, steps, of="tokens", given="label", form=form, **config.loss)

    optimizer = optax.chain(
        optax.clip_by_global_norm(train.clip),
        optax.scale_by_adam(b1=0.9, b2=0.96),
        optax.add_decayed_weights(train.weight_decay),
        optim.plateau(train.learning_rate, train.warmup_steps, train.patience))

    decode = decoder(data.dir) if data.dir else None
    modalities = {"tokens": TokenImages(*GRID, CODES, decode=decode), "label": Labels(CLASSES)}
    shape = {name: modality.shape for name, modality in modalities.items()}
    truncated = sampling.only("tokens", sampling.top_p(config.sample.top_p))
    return Experiment(
        process=process,
        init=initialiser(net, process, shape),
        apply=net.apply,
        loss=losses.diffusion(process, net.apply, when, terms),
        optimizer=optimizer,
        train_data=lambda: open_tokens(data, "train", modalities),
        validation_data=lambda: Subset(open_tokens(data, "val", modalities), config.eval.examples),
        test_data=lambda: Subset(open_tokens(data, "val", modalities), config.eval.examples),  # the set has no third part with answers
        shape=shape,
        sample=sampling.make_sampler(process, net.apply, shape, drop=("label",), transforms=(truncated,)),
        modalities=modalities,
        frozen_deps={"tokenizer": lambda: network_fingerprint(data.dir)},
    )
