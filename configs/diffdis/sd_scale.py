"""DiffDis at the paper's scale (Huang et al. 2023) on a diffusion transformer: latents, 77 text tokens, a query of 768, CC3M.

    ENCODERS="--config.encoder.path=weights/sd-vae-ft-ema --config.text_encoder.path=weights/clip-vit-large-patch14"
    DATA="--config.data.dir=latents/cc3m"
    python -m mmdiff cache --config configs/diffdis/sd_scale.py --out latents/cc3m $ENCODERS --config.data.images=cc3m
    python -m mmdiff convert --config configs/diffdis/sd_scale.py --workdir runs/dit --from weights/DiT-XL-2-256x256.pt --as dit
    python -m mmdiff train --config configs/diffdis/sd_scale.py --workdir runs/generator $ENCODERS $DATA \\
        --config.train.start=runs/dit --config.tasks=generate --config.train.steps=500000 --config.train.learning_rate=1e-4
    python -m mmdiff train --config configs/diffdis/sd_scale.py --workdir runs/diffdis $ENCODERS $DATA \\
        --config.train.start=runs/generator
    python -m mmdiff eval  --config configs/diffdis/sd_scale.py --workdir runs/diffdis
    python -m mmdiff eval  --config configs/diffdis/sd_scale.py --workdir runs/diffdis --zeroshot all
    python -m mmdiff aot   --config configs/diffdis/sd_scale.py --topology v5e:4x4 --config.data.source=random \\
        --config.train.mesh.data=1 --config.train.mesh.fsdp=16 --config.model.remat=full

Data: a latent cache that the first command writes, with the latents of the images and, for each, what CLIP's frozen text tower makes of its
caption: the tokens' states (zeros after its end), and the projected vector at a length of 1. `cc3m` has tar shards of images and captions
as img2dataset writes them (mmdiff/data/image_folders.py). weights/sd-vae-ft-ema is the folder of "stabilityai/sd-vae-ft-ema" (MIT): the
encoder of Stable Diffusion's autoencoder, with another decoder; weights/clip-vit-large-patch14 that of "openai/clip-vit-large-patch14"
(MIT, with a statement of use in its card), Stable Diffusion's text tower and its projection. config.data.source=random makes all three up.
Both encoders classify images of the twelve data sets by prompts, too (mmdiff/evals/zeroshot.py). With the cache of COCO or Flickr30k, by
--config.data.set=coco_karpathy or flickr30k and --config.eval.count=5000, retrieval is theirs with five captions.

The generator begins as DiT-XL/2 (facebook's file of 256 pixels, CC BY-NC 4.0), which works on the latents of the same encoder: Stable
Diffusion's U-Net fits no transformer. At first it generates what DiT does without a class, whatever the caption, for cross-attention has
gates of 0; the query's MLPs are copies of the image's; text, query and head are new. Hence its times and betas; from scratch (leave convert
and its start out) config.noise=scaled_linear has Stable Diffusion's.

Of the paper: the two losses on every batch, both with weight 1; the query rides in the image's self-attention with the image's weights,
enters again at every block and has an MLP of its own (fusion="shared", two-way); a head of M = 6 blocks of width 768 with 12 heads; x_0 of
the query by InfoNCE over the global batch; the caption, or the query's image, left out for 10 % of the examples; AdamW with 1e-5 for what
the generator brings and 1e-4 for what is new, 1,000 steps of warm-up, weight decay 1e-4, averages of 0.9999, six epochs. Its batch was not
stated, nor gamma, ours are 1,024 and 0.5. Ours, too: a DiT-XL/2 in the place of Stable Diffusion's U-Net, of whose 28 blocks half are
shared, as its encoder is about half; a learned logit scale.

This has not been trained here. By the ahead-of-time report on 16 chips of v5e (the last command): 1,254.1M parameters, 4.5 GB a chip of
16.9, 245 GB of main memory and a step of 0.56 s at least, 1.33 PFLOP of the model (75 % of the peak at most, bound by compute, of which
rematerialisation takes a quarter; 1.06 s by the compiler's own time, and 68 ms of links exposed), where before attention and norms were
kernels it took 0.87 s (48 %, bound by memory): the second stage takes three hours or more.
"""

from functools import partial

import jax
import optax
from ml_collections import ConfigDict

from mmdiff import Experiment, initialiser, losses, matching, nets, schedules, times, training_config
from mmdiff.data import Autoencoder, EncodedCache, EncodedLatents, EncodedTexts, TextStates, published
from mmdiff.data.image_datasets import test_split
from mmdiff.data.latents import open_source
from mmdiff.errors import UserError
from mmdiff.evals import zeroshot
from mmdiff.evals.alignment import Aligner, PairRetrieval
from mmdiff.processes import Gaussian, Given, Joint, eps, x0
from mmdiff.training import optim

STEPS, TOKENS, VECTOR = 1000, 77, 768  # of the chain; of CLIP's text tower
NEW = r"query|head|logit"  # the weights that a generator does not bring
NOISE = {"linear": schedules.linear_beta, "scaled_linear": schedules.scaled_linear_beta}


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "autoencoder_kl", "path": ""},
        "text_encoder": {"kind": "clip_text", "path": "", "tokenizer": ""},  # by default the tokenizer lies where the weights do
        "data": {"source": "latents", "dir": "", "set": "captioned", "images": "", "max_skipped": 0, "size": 32},  # or random; 32 of 256
        "model": {
            "size": "XL", "patch": 2, "shared": 14, "head_depth": 6, "head_width": 768, "head_heads": 12, "fusion": "shared",
            "two_way": True, "reinject": True, "dtype": "bfloat16", "remat": "auto", "scan": True, "time_offset": -1.0},  # DiT's times
        "noise": "linear",  # DiT's betas; or scaled_linear, Stable Diffusion's
        "query": {"gamma": 0.5, "loss": "infonce", "weight": 1.0},
        "dropout": 0.1,
        "tasks": "both",  # or generate or align: a single one
        "train": training_config(
            steps=19_500, global_batch=1024, ema=0.9999, eval_every=5_000, checkpoint_every=1_000, log_every=100,
            learning_rate=1e-5, new_learning_rate=1e-4, warmup_steps=1000, weight_decay=1e-4),
        "sample": {"steps": 50, "guidance": 4.0},
        "eval": {"batch": 100, "count": 1000, "zeroshot": "", "zeroshot_dir": "", "zeroshot_prompts": "", "zeroshot_images": 0},
    })


def build(config):
    data, train = config.data, config.train
    autoencoder = Autoencoder(config.encoder, data.size)
    captions = TextStates(config.text_encoder, vector="query", masked=True)
    modalities = {
        "image": EncodedLatents(data.size, data.size, 4, encoder=autoencoder),
        "text": EncodedTexts(VECTOR, "text", TOKENS, encoder=captions),
        "query": EncodedTexts(VECTOR, "query", norm=1.0, encoder=captions)}
    shape = {name: modality.shape for name, modality in modalities.items()}
    net = nets.DualStream(
        nets.Patches(*shape["image"], config.model.patch), nets.Vectors(VECTOR, TOKENS), VECTOR,
        logits=matching.init_logits(config.query.loss), **nets.options(config.model, without="patch"))
    generate, align = (partial(net.apply, tasks=(task,)) for task in ("generate", "align"))
    if config.noise not in NOISE:
        raise UserError(f"config.noise is {config.noise!r}: choose {' or '.join(NOISE)}.")
    noise = NOISE[config.noise](STEPS)
    image, query = Gaussian(noise, eps), Gaussian(schedules.scaled(noise, config.query.gamma), x0, norm=1.0)
    generation, alignment = Joint(image=image, text=Given(0.0)), Joint(image=Given(0.0), query=query)
    noisy, dropped = times.on_grid(STEPS), times.mixture((1 - config.dropout, 0.0), (config.dropout, 1.0))
    tasks = {
        "generate": (1.0, losses.diffusion(generation, generate, times.joint(image=noisy, text=dropped))),
        "align": (config.query.weight, losses.diffusion(
            alignment, align, times.joint(image=dropped, query=noisy), matching.terms(query, "query", config.query.loss)))}
    if config.tasks not in ("both", *tasks):
        raise UserError(f"config.tasks is {config.tasks!r}: choose both, generate or align.")
    aligner = Aligner(net, query, VECTOR, shape["image"])
    encode_image = aligner.function(10, cached=not config.model.two_way)
    return Experiment(
        process=generation, net=net, modalities=modalities,
        init=initialiser(net, Joint(image=image, text=Given(0.0), query=query), shape),
        apply=generate,
        loss=losses.combine(**(tasks if config.tasks == "both" else {config.tasks: tasks[config.tasks]})),
        optimizer=optax.multi_transform(
            {"kept": optim.adm(train),
             "new": optax.adamw(train.new_learning_rate, weight_decay=train.weight_decay, mask=optim.all_but("logit"))},
            groups),
        data=published(lambda split: open_source(data, split, modalities), test=test_split(data.set)),
        evaluators=(
            *classifiers(config.eval, encode_image, autoencoder, captions),
            PairRetrieval(aligner, config.eval.count, config.eval.batch)),
        **EncodedCache(data, modalities, [autoencoder, captions], mirrored=False).for_experiment)


def classifiers(options, align, autoencoder, captions):
    """Zero-shot classification by prompts, if asked for, with the autoencoder and the text tower that made the cache."""
    if not options.zeroshot:
        return ()
    align = jax.jit(align)
    return zeroshot.asked(
        options, lambda params, keys, given: align(params, keys, {"image": autoencoder.latents(given["image"])}),
        lambda params, texts: captions.encode(texts)["query"], autoencoder.pixels)


def groups(params):
    """The generator's weights are "kept", the others "new"."""
    return jax.tree.map(lambda kept: "kept" if kept else "new", optim.all_but(NEW)(params))
