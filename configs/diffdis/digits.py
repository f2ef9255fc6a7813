"""DiffDis on the 8x8 digits: one network samples a digit of its caption, and classifies a digit by denoising its caption's vector.

    python -m mmdiff train  --config configs/diffdis/digits.py --workdir runs/diffdis_digits
    python -m mmdiff eval   --config configs/diffdis/digits.py --workdir runs/diffdis_digits
    python -m mmdiff sample --config configs/diffdis/digits.py --workdir runs/diffdis_digits --given text="a handwritten seven"

The captions' vectors are ten random directions. Classification is also trained on noisy images (config.times.noisy), which keeps it from
learning 1,097 images by heart; the paper's on clean ones alone.

Measured before the validation split (seed 0, 1,297 training and 500 held-out digits, EMA weights): alignment accuracy 0.994 from noise in
one and in ten steps, 0.984 in fifty, 0.138 without the image; agreement of sampled digits 0.993, classification accuracy score 0.968,
Fréchet ratio 1.56, round trip 0.997; the diffusion classifier 0.985 of 200. Cost: 2.0M parameters, 21 minutes on two CPU cores shared with
other work.
"""

from functools import partial

import optax
from ml_collections import ConfigDict

from mmdiff import losses, matching, nets, sampling, schedules, times
from mmdiff.data.modalities import Features, Images
from mmdiff.data.token_modalities import Texts
from mmdiff.evals.alignment import Aligner
from mmdiff.experiment import Experiment, initialiser
from mmdiff.processes import Gaussian, Given, Joint, velocity, x0
from mmdiff.projects.digits import digits
from mmdiff.projects.digits.digit_alignment import DigitAlignment
from mmdiff.training import optim

SHAPE = (8, 8, 1)


def get_config():
    return ConfigDict({
        "seed": 0,
        "model": {
            "width": 96, "depth": 4, "heads": 4, "patch": 2, "shared": 2, "head_depth": 1,
            "fusion": "mmdit", "two_way": False, "reinject": True},  # or shared: the paper's
        "query": {"size": 64, "gamma": 0.5, "loss": "infonce", "weight": 0.3},  # or siglip, mse
        "text_dropout": 0.1,
        "times": {"clean": 0.5, "noisy": 0.4, "dropped": 0.1},  # of the image beside the query
        "train": {
            "steps": 3000, "global_batch": 96, "microbatches": 1, "ema": 0.998, "start": "",
            "learning_rate": 2.5e-3, "warmup_steps": 100, "weight_decay": 0.7, "clip": 1.0,
            "log_every": 50, "eval_every": 500, "checkpoint_every": 500, "keep": 2, "best": "", "prefetch": 4, "tensorboard": True,
            "mesh": {"slices": 1, "data": -1, "fsdp": 1, "seq": 1, "tensor": 1},
        },
        "sample": {"steps": 25, "guidance": 1.2},
        "eval": {"batch": 250},
    })


def build(config):
    model, train, tokenizer = config.model, config.train, digits.caption_tokenizer()
    size = config.query.size
    net = nets.DualStream(
        nets.Patches(*SHAPE, model.patch), nets.Tokens(tokenizer.length, tokenizer.size, tokenizer.size), size,
        depth=model.depth, width=model.width, heads=model.heads, shared=model.shared, head_depth=model.head_depth,
        fusion=model.fusion, two_way=model.two_way, reinject=model.reinject,
        logits=matching.init_logits(config.query.loss), scan=False)
    image = Gaussian(schedules.flow(), velocity)
    query = Gaussian(schedules.scaled(schedules.scaled_linear_beta(), config.query.gamma), x0, norm=1.0)
    drawing, naming = Joint(image=image, text=Given(0)), Joint(image=image, query=query)
    draw, name = (partial(net.apply, tasks=(task,)) for task in ("generate", "align"))

    clean, absent = times.constant(0.0), times.constant(1.0)
    captioned = times.joint(
        image=times.uniform(), text=times.mixture((1 - config.text_dropout, clean), (config.text_dropout, absent)))
    named = times.joint(query=times.uniform(), image=times.mixture(
        (config.times.clean, clean), (config.times.noisy, times.uniform(0.0, 0.7)), (config.times.dropped, absent)))
    match = losses.on("query", query.loss) if config.query.loss == "mse" else matching.embedding_loss(query, "query", config.query.loss)

    rate = optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, train.warmup_steps, max(train.steps, train.warmup_steps + 1))
    shape = {"image": SHAPE, "text": (tokenizer.length,), "query": (size,)}
    seen = {name: shape[name] for name in ("image", "text")}
    return Experiment(
        process=drawing,
        init=initialiser(net, Joint(image=image, text=Given(0), query=query), shape),
        apply=draw,
        loss=losses.combine(
            draw=(1.0, losses.diffusion(drawing, draw, captioned, losses.weighted(drawing))),
            name=(config.query.weight, losses.diffusion(naming, name, named, {config.query.loss: (1.0, match)}))),
        optimizer=optax.chain(
            optax.clip_by_global_norm(train.clip),
            optax.adamw(rate, b2=0.99, weight_decay=train.weight_decay, mask=optim.all_but("logit_"))),
        train_data=lambda: digits.captioned(digits.digits_source("train"), digits.random_prompts(size)),
        validation_data=lambda: digits.captioned(digits.digits_source("validation"), digits.random_prompts(size)),
        test_data=lambda: digits.captioned(digits.digits_source("test"), digits.random_prompts(size)),
        shape=seen,
        sample=sampling.make_sampler(drawing, draw, seen, drop=("text",), heun=True),
        modalities={"image": Images(*SHAPE, levels=17), "text": Texts(tokenizer), "query": Features(size, "query", norm=1.0)},
        evaluators=(DigitAlignment(Aligner(net, query, size, SHAPE), digits.random_prompts(size), batch=config.eval.batch),),
    )
