"""Do generation and alignment help each other? DiffDis on digit scenes against its two halves and a CLIP, three seeds each.

    python -m mmdiff train --config configs/diffdis/scenes_towers.py --workdir runs/scenes_towers
    python -m mmdiff cache --config configs/diffdis/scenes_towers.py --workdir runs/scenes_towers --out runs/towers
    python launch/diffdis_experiments.py --out runs/diffdis_experiments          # everything, or what is missing of it
    python launch/diffdis_experiments.py --out runs/diffdis_experiments --table  # the tables of what is done so far

    tasks    two towers (CLIP), generation alone, alignment alone, both; alignment without noise (a query of zeros: no diffusion)
    weight   both, with other weights of the alignment loss than the 0.2 of tasks; for all of these the norms of the two losses' gradients
             on the trunk that they share

All are of equal width, batch and steps, and of one optimizer, whose rate was chosen for `both`, of 3e-3, 1e-2 and 2e-2 at seed 0 (at 3e-3
two towers are a little better: 0.823 for 0.783 of the held-out combinations). `both` goes through the trunk twice in a step, the others
once. All but the two towers, which also learn the text encoder, compare with the vectors of the frozen text tower of scenes_towers.py:
alignment without noise is such a network without diffusion.

About an hour on two CPU cores. All are small and briefly trained: compare them with each other, not with the configs' own metrics. The
results are in configs/diffdis/README.md.
"""

import dataclasses
import functools
import pathlib

import experiments
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config as configs
from mmdiff import losses, matching, times
from mmdiff.data.sources import load_all
from mmdiff.evals.evaluator import example_keys, in_batches
from mmdiff.matching import l2_normalize
from mmdiff.processes import Given, Joint
from mmdiff.projects.scenes import scenes
from mmdiff.projects.scenes.scene_alignment import SPLITS, held_out_retrieval, scene_retrieval, zero_shot

CONFIGS = pathlib.Path(__file__).parents[1] / "configs/diffdis"
COUNT = 600  # scenes of each split
TRAIN = {
    "train.steps": "1400", "train.global_batch": "128", "train.learning_rate": "1e-2", "train.warmup_steps": "50", "train.ema": "0.995",
    "eval.batch": "200"}
SMALL = {
    **TRAIN, "model.width": "64", "sample.steps": "12", "times.text_to_image": "0.9", "times.unconditional": "0.1",
    "times.image_to_text": "0.0"}
NO_CAPTIONS = {"text_weight": "0.0"}  # nor is an absent caption predicted from the image: that would be alignment
BOTH = {**NO_CAPTIONS, "query.weight": "0.2"}
TASKS = {
    "two towers": {**TRAIN, "model.width": "64", "model.depth": "3"},
    "generation alone": {**SMALL, **NO_CAPTIONS, "tasks": "generate"},
    "alignment alone": {**SMALL, "tasks": "align"},
    "both": {**SMALL, **BOTH},
    "alignment without noise": {**SMALL, "tasks": "align"},
}
WEIGHTS = ("0.02", "1.0")


def settings():
    """-> (part, name of the setting, what it is run as, overrides), each to be run with every seed."""
    kinds = {"two towers": "towers", "generation alone": "generate", "alignment alone": "align", "alignment without noise": "without noise"}
    for name, overrides in TASKS.items():
        yield "tasks", name, kinds.get(name, "both"), overrides
    for weight in WEIGHTS:
        yield "weight", f"both at {weight}", "both", {**SMALL, **BOTH, "query.weight": weight}


def retrieval_metrics(vectors, towers, data):
    """The retrieval and digit accuracy of the vectors of both splits' scenes."""
    metrics = {}
    for split in SPLITS:
        suffix = "" if split == "test" else f"_{split}"
        if split == "test":
            metrics["retrieval_r1"] = scene_retrieval(vectors[split], towers.texts(data[split]["text"])[1], data[split])["r1"]
        else:
            metrics["retrieval_r1_held_out"] = held_out_retrieval(vectors[split], towers.encode, data[split])
        metrics[f"digit_accuracy{suffix}"] = zero_shot(vectors[split], towers.encode, data[split], ("digit",))["digit"]
    return metrics


def without_noise(experiment, config, aligner):
    """The experiment of alignment by a query of zeros: the vector is predicted from the image in one call, and no noise goes in."""
    process = Joint(image=experiment.process.parts["image"], query=Given(0.0))
    shares = config.times
    align_times = times.joint(query=1.0, image=times.mixture(
        (shares.clean, 0.0), (shares.noisy, times.uniform(0.0, 0.7)), (shares.dropped, 1.0)))
    apply = functools.partial(aligner.net.apply, tasks=("align",))
    term = matching.embedding_loss(aligner.query, "query", config.query.loss)
    loss = losses.combine(align=(config.query.weight, losses.diffusion(process, apply, align_times, {config.query.loss: (1.0, term)})))

    def vectors(params, keys, images):
        x, t = {"image": images, "query": jnp.zeros((len(images), aligner.size))}, jnp.zeros(len(images))
        return l2_normalize(apply(params, x, {"image": t, "query": t + 1})["query"])

    return dataclasses.replace(experiment, loss=loss), vectors


def norms(config, module, params, batch, key):
    """The norms of both losses' gradients, unweighted, on the image's weights in the shared trunk."""
    found = {}
    for task in ("generate", "align"):
        only, _ = configs.load(str(CONFIGS / "scenes.py"), [])
        only.update(config)
        with only.unlocked():
            only.tasks, only.query.weight = task, 1.0
        gradient = jax.jit(jax.grad(module.build(only).loss, has_aux=True))(params, batch, key)[0]
        leaves = jax.tree_util.tree_leaves_with_path(gradient["params"]["trunk"])
        squares = [jnp.vdot(leaf, leaf) for path, leaf in leaves if "image_" in jax.tree_util.keystr(path)]
        found[f"gradient_{task}"] = float(jnp.sqrt(sum(squares)))
    return found


def run(seed, data, overrides):
    """One training and what it is good for: (metrics, seconds)."""
    name = "scenes_towers" if data == "towers" else "scenes"
    config, module = configs.load(str(CONFIGS / f"{name}.py"), [*overrides.items(), ("seed", str(seed))])
    experiment = module.build(config)
    key = jax.random.key(1000 + seed)
    if data == "towers":
        like, scenes_config = configs.load(str(CONFIGS / "scenes.py"), [(name, overrides[name]) for name in TRAIN])
        experiment = dataclasses.replace(experiment, optimizer=scenes_config.build(like).optimizer)
        params, seconds = experiments.train(experiment, config)
        found = dataclasses.replace(experiment.evaluators[0], count=COUNT)(experiment, params, config, key, config.train.steps).metrics
        wanted = [f"{metric}{suffix}" for metric in ("retrieval_r1", "digit_accuracy") for suffix in ("", "_held_out")]
        return {metric: found[metric] for metric in wanted}, seconds
    towers, aligner = experiment.evaluators[0].towers, experiment.evaluators[0].aligner
    scenes_of = {split: load_all(scenes.Scenes(split, 16, COUNT)) for split in SPLITS}
    if data == "without noise":
        experiment, vectors_of = without_noise(experiment, config, aligner)
    params, seconds = experiments.train(experiment, config)
    metrics = {}
    if data == "without noise":
        keys = example_keys(key, COUNT)
        vectors = {split: in_batches(vectors_of, params, keys, each["image"], 250) for split, each in scenes_of.items()}
        metrics |= retrieval_metrics(vectors, towers, scenes_of)
    elif data != "generate":
        vectors = {split: aligner(params, key, each["image"], steps=10) for split, each in scenes_of.items()}
        metrics |= retrieval_metrics(vectors, towers, scenes_of)
    if data in ("generate", "both"):
        captioned = dataclasses.replace(experiment.evaluators[0].captioned, count=COUNT)
        found = captioned.samples(experiment, params, key, config.sample.steps, config.sample.guidance).metrics
        metrics |= {name: found[name] for name in ("prompt_correctness", "prompt_correctness_seen", "frechet_ratio")}
    if data == "both":
        few = experiment.train_data().take(np.arange(256)) | {"index": np.arange(256, dtype=np.uint32)}
        metrics |= norms(config, module, params, few, key)
    return metrics, seconds


if __name__ == "__main__":
    experiments.main(__doc__, list(settings()), run, {"tasks": "both"})
