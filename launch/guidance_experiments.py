"""Do pairs agree better where image and label are both guided (`each`) than where the label alone guides? One run, on validation data.

    python -m mmdiff train --config configs/digits_joint.py --workdir runs/digits_joint
    python launch/guidance_experiments.py --workdir runs/digits_joint --seeds 3

Images and labels are sampled together with the same weights and the same noise, by the config's sampler and these ways of guidance. For
each way and weight: joint agreement (an SVM that was trained on the real training images sees the label that was sampled with the image)
and the Fréchet ratio of the same images to the validation images. A stronger weight buys agreement with the ratio; therefore the last
column compares with the best that guidance one way reaches at no higher ratio, between the weights that were measured.

Found (configs/README.md, three sets of samples of one training): half a point more agreement at the same ratio, for three evaluations of
the network in a call instead of two. "each, label always" has not been run.
"""

import argparse
import dataclasses
import pathlib
import sys

import jax
import numpy as np

from mmdiff.data.sources import load_all
from mmdiff.evals.evaluator import sample_batched
from mmdiff.evals.frechet import frechet_ratio
from mmdiff.projects.digits import classifiers
from mmdiff.runs import open_run

CONFIG = pathlib.Path(__file__).parents[1] / "configs/digits_joint.py"
ONE_WAY, WEIGHTS = "one way", (1.0, 1.17, 1.5, 2.0)
WAYS = {
    ONE_WAY: {},
    "each": {"each": ("image", "label")},  # both while the config's interval lasts
    "each, label always": {"each": {"image": lambda w: w, "label": lambda w: lambda t: w}},
}


def measure(run, seeds, batch=250):
    """-> {(way, weight): [(agreement, Fréchet ratio) of each seed]}, as many samples a seed as there are training images."""
    experiment, steps = run.experiment, int(run.config.sample.steps)
    train, validation = load_all(experiment.train_data()), load_all(experiment.validation_data())
    classifier = classifiers.svm(train["image"], train["label"])
    ways = {way: dataclasses.replace(experiment, sample=None, sampler={**experiment.sampler, **own}) for way, own in WAYS.items()}
    settings = [(way, w) for way in WAYS for w in WEIGHTS if w != 1 or way == ONE_WAY]  # 1 guides nothing
    found = {setting: [] for setting in settings}
    for seed in range(seeds):
        for way, w in settings:
            options = {"batch": batch, "steps": steps, "guidance": w}
            pairs = sample_batched(ways[way], run.params, jax.random.key(seed), {}, len(train["image"]), **options)
            images = experiment.modalities["image"].quantize(pairs["image"])
            agreement = np.mean(classifiers.predict(classifier, images) == pairs["label"])
            found[way, w].append((agreement, frechet_ratio(images, validation["image"], train["image"])))
            print(f"seed {seed}, {way}, weight {w:g}: agreement {agreement:.4f}, ratio {found[way, w][-1][1]:.3f}", file=sys.stderr)
    return found


def table(found):
    """The lines of a Markdown table: means and their standard errors, and what a way gains at the Fréchet ratio of guidance one way."""
    yield "| guidance | weight | joint agreement | Fréchet ratio | agreement at the same ratio, minus one way |"
    yield "|---|---|---|---|---|"
    means = {setting: np.mean(values, 0) for setting, values in found.items()}
    ratios, base = zip(*sorted((ratio, agreement) for (way, _), (agreement, ratio) in means.items() if way == ONE_WAY))
    base = np.maximum.accumulate(base)
    for (way, w), values in found.items():
        agreement, ratio = means[way, w]
        errors = np.std(values, 0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else (np.nan, np.nan)
        gain = f"{agreement - np.interp(ratio, ratios, base):+.4f}" if way != ONE_WAY else "-"
        yield f"| {way} | {w:g} | {agreement:.4f} ± {errors[0]:.4f} | {ratio:.3f} ± {errors[1]:.3f} | {gain} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, metavar="DIR", help="of the run")
    parser.add_argument("--config", default=CONFIG, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="of the samples (default: 4)")
    args = parser.parse_args()
    print("\n".join(table(measure(open_run(args.config, args.workdir), args.seeds))))
