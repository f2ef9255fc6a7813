"""Which solver should a config sample with? Heun against DPM-Solver++(2M) and UniPC at equal network calls, on validation data.

    python launch/solver_experiments.py --out runs/solvers [--parts digits_joint diffdis_scenes ...]

Each config is trained with three seeds and shortened (`STEPS`); then the solvers sample with the same weights, the same noise and the same
conditions. Heun of N steps makes 2N - 1 network calls, and so do 2M and UniPC of 2N - 1 steps. Measured:

    error    root mean square difference of the images to those of `REFERENCE` Heun steps from the same noise: the solver's own error
    frechet  Fréchet ratio to the validation images (raw pixels): what it does to the samples

Found (configs/README.md, 13 of the 21 runs): at a config's own number of calls 2M's error is 0.4 to 0.7 of Heun's, but in
mtdiffusion/digits_transition, where it is twice as large; and yet its Fréchet ratio is higher in every config and seed that was run, by
0.002 to 0.065. UniPC has not been run here; launch/calls_experiments.py compares it for a network that was trained to the end. Each run
took four to seven minutes of one quiet core with the two.
"""

import dataclasses
import pathlib

import experiments
import jax
import numpy as np

from mmdiff import config as configs
from mmdiff import sampling
from mmdiff.data.sources import load_all
from mmdiff.evals.evaluator import sample_batched
from mmdiff.evals.frechet import frechet_ratio
from mmdiff.projects.scenes.scenes import Scenes

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = (
    "digits_joint", "mtdiffusion/digits_label", "mtdiffusion/digits_masked", "mtdiffusion/digits_representation",
    "mtdiffusion/digits_transition", "diffdis/digits", "diffdis/scenes",
)  # fmt: skip
STEPS = 500
OVERRIDES = {"diffdis/scenes": {"tasks": "generate"}, "digits_joint": {"sample.heun": "true", "sample.steps": "12"}}
REFERENCE, COUNT = 50, 500


SOLVERS = {"2m": lambda image: sampling.dpmpp_2m(image.schedule), "unipc": sampling.unipc}  # for the image's process


def by(experiment, solver):
    """The experiment, whose sampler takes `solver` in the place of Heun: "ddim", or one of `SOLVERS`."""
    own = (sampling.only("image", SOLVERS[solver](experiment.process.parts["image"])),) if solver in SOLVERS else ()
    transforms = (*experiment.sampler.get("transforms", ()), *own)
    return dataclasses.replace(experiment, sample=None, sampler={**experiment.sampler, "heun": solver == "heun", "transforms": transforms})


def build(module, config, solver):
    """The config's experiment with `solver`."""
    experiment = by(module.build(config), solver)
    if "towers" in config.get("data", {}):  # the query's vectors, which come from frozen towers, have no part in sampling images
        train, validation = (Scenes(split, experiment.shape["image"][0]) for split in ("train", "validation"))
        experiment = dataclasses.replace(experiment, train_data=lambda: train, validation_data=lambda: validation)
    return experiment


def run(seed, data, overrides):
    """One training, sampled by all solvers: (metrics, seconds)."""
    config, module = configs.load(str(CONFIGS / f"{data}.py"), [*overrides.items(), ("seed", str(seed))])
    heun, *multistep = (build(module, config, solver) for solver in ("heun", *SOLVERS))
    params, seconds = experiments.train(heun, config)
    train, validation = load_all(heun.train_data()), load_all(heun.validation_data())
    count = min(COUNT, len(train["image"]))
    known = {name: np.asarray(train[name][:count]) for name in heun.shape if name != "image" and name in train}
    key, quantize = jax.random.key(1000 + seed), getattr(heun.modalities["image"], "quantize", np.asarray)

    def images(experiment, steps, guidance):
        sampled = sample_batched(experiment, params, key, known, count, batch=250, steps=steps, guidance=guidance)
        return np.asarray(sampled["image"])

    guidance = float(config.sample.guidance)
    reference = images(heun, REFERENCE, guidance)
    metrics = {}
    for steps in sorted({6, 12, int(config.sample.steps)}):
        for name, experiment, own in (("heun", heun, steps), *((name, each, 2 * steps - 1) for name, each in zip(SOLVERS, multistep))):
            found = images(experiment, own, guidance)
            metrics[f"error {name}/{2 * steps - 1}"] = np.sqrt(np.mean((found - reference) ** 2))
            metrics[f"frechet {name}/{2 * steps - 1}"] = frechet_ratio(quantize(found), validation["image"], train["image"][:count])
    return metrics, seconds


def settings():
    """-> (part, name, config, overrides)."""
    for name in NAMES:
        yield name.replace("/", "_"), "all solvers", name, {"train.steps": str(STEPS), **OVERRIDES.get(name, {})}


if __name__ == "__main__":
    experiments.main(__doc__, list(settings()), run, {})
