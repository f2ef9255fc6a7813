"""Does the contrast of CDCD help music to fit a dance? Compares vanilla, Step-Intra and Sample-Inter on dance_music, three seeds each.

    python -m mmdiff train --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer
    python -m mmdiff cache --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer --out runs/music_tokens
    python launch/dance_experiments.py --out runs/dance_experiments          # everything, or what is missing of it
    python launch/dance_experiments.py --out runs/dance_experiments --table  # the table of what is done so far

Beat coverage, hit and strict F1 with their levels by chance, genre accuracy and Fréchet audio distance, of 100 held-out dances.

Cost: nine trainings of four to six minutes on one core each, and their evaluation: about forty minutes on two cores. The README has the
table.

The trainings are short: compare the losses with each other, not with the config's own metrics.
"""

import pathlib

import experiments
import jax

from mmdiff import config as configs

CONFIG = pathlib.Path(__file__).parents[1] / "configs/cdcd/dance_music.py"
LOSSES = {
    "vanilla": {"loss.step_intra": "0.0", "loss.sample_inter": "0.0"},
    "step-intra": {"loss.step_intra": "5e-5", "loss.sample_inter": "0.0"},
    "sample-inter": {"loss.step_intra": "0.0", "loss.sample_inter": "5e-6"},
}
SMALL = {"train.steps": "400", "train.global_batch": "16", "sample.steps": "10", "eval.clips": "100"}
METRICS = (
    "beat_coverage", "beat_coverage_shuffled", "beat_hit", "beat_hit_shuffled", "beat_f1", "beat_f1_shuffled", "genre_accuracy",
    "frechet_audio",
)  # fmt: skip


def settings():
    """-> (part, name of the setting, data, overrides), each to be run with every seed."""
    return [("dance", name, "dance_music", {**SMALL, **loss}) for name, loss in LOSSES.items()]


def run(seed, data, overrides):
    """One training and what its samples are like: (metrics, seconds)."""
    config, module = configs.load(str(CONFIG), [*overrides.items(), ("seed", str(seed))])
    experiment = module.build(config)
    params, seconds = experiments.train(experiment, config)
    key = jax.random.key(1000 + seed)
    found = experiment.evaluators[0].samples(experiment, params, key, config.sample.steps, config.sample.guidance)
    return {name: found.metrics[name] for name in METRICS}, seconds


if __name__ == "__main__":
    experiments.main(__doc__, settings(), run, {"dance": "vanilla"})
