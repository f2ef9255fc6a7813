"""DiffDis on emoji: one network draws pictures of captions, writes captions of pictures, and finds either by denoising a caption's vector.

    DATA="--config.data.dir=emoji64.tar --config.text_encoder.path=minilm"
    python -m mmdiff train  --config configs/joint/emoji_diffdis.py --workdir runs/emoji_diffdis $DATA
    python -m mmdiff eval   --config configs/joint/emoji_diffdis.py --workdir runs/emoji_diffdis
    python -m mmdiff sample --config configs/joint/emoji_diffdis.py --workdir runs/emoji_diffdis --given text="dark skin, handshake"

Data, captions, times and the loss of generation are those of configs/joint/emoji_tokens.py. The query is the vector of the caption by
MiniLM, a frozen, published encoder of sentences (configs/joint/README.md says how to get it); or, where config.data.towers names what
configs/joint/emoji_towers.py writes, by a tower that was trained on these captions. The picture's part in the vector's task is as in
configs/diffdis/scenes.py.

Measured (one seed, EMA weights, 80 to 200 examples of each metric, test data; the sampler's settings are those of emoji_tokens.py): by
vectors tones of held-out pairs are told in 0.961, their names among 322 in 0.812, the category of held-out names in 0.588, Recall@1 among
100 training pairs is 0.98 of texts and 0.99 of images, by denoising losses 0.52 and 1.00; pictures of held-out pairs have the tone asked
for in 0.805, pairs sampled together agree in tone in 0.744, tones and names of held-out pairs are read in 0.905 and 0.911. What was aimed
at, and emoji_tokens.py beside it: configs/joint/README.md. Cost: 4.11M parameters; 3,500 steps of 64 pairs, 55 minutes of one core of an
AMD EPYC.
"""

from functools import partial

from ml_collections import ConfigDict

from mmdiff import Experiment, initialiser, losses, matching, nets, sampling, schedules, times, training_config
from mmdiff.data import Features, Texts, TextStates
from mmdiff.data.own import CroppedImages
from mmdiff.data.sources import digest
from mmdiff.data.tower_cache import Towers, WithTextEmbedding
from mmdiff.errors import UserError
from mmdiff.evals.alignment import Aligner
from mmdiff.processes import Gaussian, Joint, absorbing, velocity, x0
from mmdiff.projects.emoji.emoji import LENGTH, SHAPE, emoji_source, emoji_tokenizer
from mmdiff.projects.emoji.emoji_alignment import VECTOR, EmojiAlignment, SentenceVectors
from mmdiff.projects.emoji.emoji_metrics import evaluators_of
from mmdiff.training import optim


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"dir": "", "towers": ""},
        "text_encoder": {"kind": "sentence_bert", "path": "", "tokenizer": ""},  # by default the tokenizer lies where the weights do
        "model": {
            "width": 128, "depth": 4, "heads": 4, "patch": 4, "stem": 32, "shared": 2, "head_depth": 1, "pooled": True,
            "fusion": "mmdit", "two_way": False, "reinject": True},
        "query": {"size": 384, "gamma": 0.5, "loss": "infonce", "weight": 0.2},  # or siglip, mse
        # As in emoji_tokens.py; and of the picture, while the query is denoised.
        "times": {
            "joint": 0.15, "image_given_text": 0.35, "text_given_image": 0.3, "text_given_noisy": 0.1, "image_alone": 0.05,
            "text_alone": 0.05, "clean": 0.6, "noisy": 0.3, "dropped": 0.1},
        "text_weight": 0.5, "padding_weight": 0.1, "cap": 5.0,  # of the text's 1/t
        "tasks": "both",  # or generate or align: a single one
        "train": training_config(
            steps=3500, global_batch=64, ema=0.998, learning_rate=2.5e-3, warmup_steps=100, weight_decay=0.1, clip=1.0, eval_every=1000,
            checkpoint_every=500),
        "sample": {"steps": 16, "guidance": 6.0, "temperature": 0.5},
        "eval": {
            "most": 200, "candidates": 100, "draws": 4, "batch": 50, "category_classifier_steps": 600,
            "in_loop": {"most": 60, "candidates": 0, "category_classifier_steps": 0}},
    })


def build(config):
    tokenizer, shares, noisy, size = emoji_tokenizer(config.data.dir), config.times, times.uniform(), config.query.size
    vectors = sentence_vectors(config, tokenizer)
    modalities = {"image": CroppedImages(*SHAPE), "text": Texts(tokenizer), "query": Features(size, VECTOR, norm=1.0)}
    net = nets.DualStream(
        nets.Patches(*SHAPE, config.model.patch, stem=config.model.stem),
        nets.Tokens(tokenizer.length, states=tokenizer.size + 1, classes=tokenizer.size), size, captions=True,
        logits=matching.init_logits(config.query.loss), **nets.options(config.model, without=("patch", "stem")))
    generate, align = partial(net.apply, tasks=("generate",)), partial(net.apply, tasks=("align",))
    image, text = Gaussian(schedules.flow(), velocity), absorbing(tokenizer.size)
    query = Gaussian(schedules.scaled(schedules.scaled_linear_beta(), config.query.gamma), x0, norm=1.0)
    generation, alignment = Joint(image=image, text=text), Joint(image=image, query=query)
    pairs = times.mixture(
        (shares.joint, times.joint(image=noisy, text=noisy)),
        (shares.image_given_text, times.joint(image=noisy, text=0.0)),
        (shares.text_given_image, times.joint(image=0.0, text=noisy)),
        (shares.text_given_noisy, times.joint(image=times.uniform(0.0, 0.5), text=noisy)),
        (shares.image_alone, times.joint(image=noisy, text=1.0)),
        (shares.text_alone, times.joint(image=1.0, text=noisy)))
    align_times = times.joint(query=noisy, image=times.mixture(
        (shares.clean, 0.0), (shares.noisy, times.uniform(0.0, 0.7)), (shares.dropped, 1.0)))
    tasks = {
        "generate": (1.0, losses.diffusion(generation, generate, pairs, {
            "image": (1.0, losses.on("image", image.loss)),
            "text": (config.text_weight, losses.on("text", losses.masked_ce(
                text, losses.masked_elbo(config.cap), {tokenizer.padding: config.padding_weight})))})),
        "align": (config.query.weight, losses.diffusion(alignment, align, align_times, matching.terms(query, "query", config.query.loss)))}
    if config.tasks not in ("both", *tasks):
        raise UserError(f"config.tasks is {config.tasks!r}: choose both, generate or align.")
    aligner = Aligner(net, query, size, SHAPE)
    aligned = EmojiAlignment(
        config.data.dir, partial(aligner, steps=10), lambda params, texts: vectors.encode(texts),
        config.eval.most, config.eval.candidates)
    measured = evaluators_of(config.data.dir, config.eval)
    return Experiment(
        process=generation, modalities=modalities,
        init=initialiser(net, Joint(image=image, text=text, query=query), {name: each.shape for name, each in modalities.items()}),
        apply=generate,
        loss=losses.combine(**(tasks if config.tasks == "both" else {config.tasks: tasks[config.tasks]})),
        optimizer=optim.muon(config.train),
        data=lambda split: WithTextEmbedding(emoji_source(split, config.data.dir), vectors, size),
        sampler={
            "drop": ("text",), "heun": True, "paths": {"text": sampling.settled_at(0.7)},
            "transforms": [sampling.only("text", sampling.temperature(config.sample.temperature))]},
        frozen_deps={"captions' tokenizer": lambda: digest(tokenizer.size, tokenizer.rules), "captions' vectors": vectors.fingerprint},
        evaluators=(aligned, *measured["evaluators"]), in_loop=(aligned, *measured["in_loop"]))


def sentence_vectors(config, tokenizer):
    """What makes the captions' vectors: towers of one's own where config.data.towers names them, else the published encoder."""
    if config.data.towers:
        return Towers(config.data.towers)
    return SentenceVectors(tokenizer, TextStates(config.text_encoder, vector=VECTOR, length=2 * LENGTH))
