"""DiffDis on digit scenes of 16x16 pixels: one network samples scenes of captions, retrieves captions of scenes, and writes them.

    python -m mmdiff train  --config configs/diffdis/scenes_towers.py --workdir runs/scenes_towers
    python -m mmdiff cache  --config configs/diffdis/scenes_towers.py --workdir runs/scenes_towers --out runs/towers
    python -m mmdiff train  --config configs/diffdis/scenes.py --workdir runs/diffdis_scenes
    python -m mmdiff eval   --config configs/diffdis/scenes.py --workdir runs/diffdis_scenes
    python -m mmdiff sample --config configs/diffdis/scenes.py --workdir runs/diffdis_scenes \\
        --given text="a small red seven on a blue background, top left"
    python -m mmdiff sample --config configs/diffdis/scenes.py --workdir runs/diffdis_scenes --given image=scene.png
    python -m mmdiff eval   --config configs/diffdis/scenes.py --workdir runs/diffdis_scenes --zeroshot cifar10  # unseen photographs

The query is the vector of the frozen text tower. The caption is a stream of ids, which masked diffusion fills in given an image (not in the
paper, whose captions are states of the tower and a condition alone: sd_scale.py). One in ten combinations of digit, colour and position
never occurs in training.

Measured (seed 0, 1,000 scenes of each split, EMA weights): digit, colour and place right for 0.996 of the test scenes, among 200 captions
and in ten steps from noise (0.995 in one; the towers themselves 0.971; 0.006 without the image; 0.951 and 0.778 among captions with all ten
digits); for 0.933 of the held-out combinations, where each caption is there with all ten digits (0.936 in one step; the towers 0.738).
Samples for held-out captions show all that they say in 1.000 (classifiers that are right on 0.985 of real scenes), unguided 0.949, the best
of four by the alignment branch 0.990; Fréchet ratio 1.22; round trip 1.000. Captions of test scenes are written without a mistake in 0.946,
of held-out ones in 0.920. Cost: 3.5M parameters, 73 minutes on one CPU core shared with other work.

The network's matrices are Muon's. With AdamW, a text_weight of 0.1 and 3,000 steps the sampled digit was right in 0.501; the loss of images
that it had after 2,000 steps is reached here after 1,400.
"""

from functools import partial

import jax
from ml_collections import ConfigDict

from mmdiff import Experiment, initialiser, losses, matching, nets, schedules, times, training_config
from mmdiff.data import Features, Images, Texts
from mmdiff.data.tower_cache import Towers, WithTextEmbedding
from mmdiff.errors import UserError
from mmdiff.evals import zeroshot
from mmdiff.evals.alignment import Aligner
from mmdiff.processes import Gaussian, Joint, absorbing, velocity, x0
from mmdiff.projects.scenes import scenes
from mmdiff.projects.scenes.captioned_scenes import CaptionedScenes
from mmdiff.projects.scenes.scene_alignment import SceneAlignment
from mmdiff.training import optim

SIZE, SHAPE = 16, (16, 16, 3)


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"towers": "runs/towers"},
        "model": {
            "width": 128, "depth": 4, "heads": 4, "patch": 4, "shared": 2, "head_depth": 1, "pooled": True,
            "fusion": "mmdit", "two_way": False, "reinject": True},  # or shared: the paper's
        "query": {"size": 64, "gamma": 0.5, "loss": "infonce", "weight": 0.2},  # or siglip, mse
        "text_weight": 0.5,
        # Shares of the times: an image of a caption, without one, and a caption of an image; of the image, while the query is denoised.
        "times": {
            "text_to_image": 0.72, "unconditional": 0.08, "image_to_text": 0.2, "clean": 0.6, "noisy": 0.3, "dropped": 0.1},
        "tasks": "both",  # or generate or align: a single one
        "train": training_config(
            steps=5000, global_batch=128, ema=0.998, learning_rate=2.5e-3, warmup_steps=100, weight_decay=0.1, clip=1.0,
            eval_every=1000, checkpoint_every=500),
        "sample": {"steps": 25, "guidance": 2.0},
        "eval": {"batch": 250, "zeroshot": "", "zeroshot_dir": "", "zeroshot_prompts": "", "zeroshot_images": 0},
    })


def build(config):
    shares, size, tokenizer, towers = config.times, config.query.size, scenes.tokenizer(), Towers(config.data.towers)
    modalities = {"image": Images(*SHAPE), "text": Texts(tokenizer), "query": Features(size, "query", norm=1.0)}
    net = nets.DualStream(
        nets.Patches(*SHAPE, config.model.patch), nets.Tokens(tokenizer.length, tokenizer.size + 1, tokenizer.size), size, captions=True,
        logits=matching.init_logits(config.query.loss), **nets.options(config.model, without="patch"))
    generate, align = (partial(net.apply, tasks=(task,)) for task in ("generate", "align"))
    image, text = Gaussian(schedules.flow(), velocity), absorbing(tokenizer.size)
    query = Gaussian(schedules.scaled(schedules.scaled_linear_beta(), config.query.gamma), x0, norm=1.0)
    generation, alignment = Joint(image=image, text=text), Joint(image=image, query=query)
    noisy = times.uniform()
    captioned = times.mixture(
        (shares.text_to_image, times.joint(image=noisy, text=0.0)),
        (shares.unconditional, times.joint(image=noisy, text=1.0)),
        (shares.image_to_text, times.joint(image=0.0, text=noisy)))
    align_times = times.joint(query=noisy, image=times.mixture(
        (shares.clean, 0.0), (shares.noisy, times.uniform(0.0, 0.7)), (shares.dropped, 1.0)))
    tasks = {
        "generate": (1.0, losses.diffusion(generation, generate, captioned, losses.weighted(generation, text=config.text_weight))),
        "align": (config.query.weight, losses.diffusion(alignment, align, align_times, matching.terms(query, "query", config.query.loss)))}
    if config.tasks not in ("both", *tasks):
        raise UserError(f"config.tasks is {config.tasks!r}: choose both, generate or align.")
    aligner = Aligner(net, query, size, SHAPE)
    encode_image = jax.jit(aligner.function(10, cached=not config.model.two_way))
    classify = CaptionedScenes("image", decode=lambda images: images, asked=tuple(scenes.ATTRIBUTES), batch=config.eval.batch)
    return Experiment(
        process=generation, modalities=modalities,
        init=initialiser(net, Joint(image=image, text=text, query=query), {name: each.shape for name, each in modalities.items()}),
        apply=generate,
        loss=losses.combine(**(tasks if config.tasks == "both" else {config.tasks: tasks[config.tasks]})),
        optimizer=optim.muon(config.train),
        data=lambda split: WithTextEmbedding(scenes.Scenes(split, SIZE), towers, size),
        sampler={"drop": ("text",), "heun": True}, frozen_deps={"towers": towers.fingerprint},
        evaluators=(
            *zeroshot.asked(config.eval, encode_image, lambda params, texts: towers.encode(texts), SIZE),
            SceneAlignment(aligner, towers, classify)))
