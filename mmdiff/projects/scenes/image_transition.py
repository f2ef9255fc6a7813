"""How well an image and another image of the same scene are sampled together, and each from the other."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from mmdiff.data.sources import Subset, load_all
from mmdiff.evals import plots
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, predict_batched, sample_batched, states
from mmdiff.evals.frechet import frechet_distance, real_distance
from mmdiff.projects.scenes import paired_scenes
from mmdiff.projects.scenes.captioned_scenes import trained_judge

RULES = {
    "segmentation": "the scenes' judge, which saw real scenes only: digit where more than half of a pixel is ink",
    "night": "the map from day to night, exact",
}


@dataclasses.dataclass(frozen=True)
class ImageTransition:
    """Metrics and figures of a joint model of digit scenes and their segmentation, or their night (`paired_scenes`).

    Over as many held-out pairs, and as many samples of each kind, as `test_data` holds.

    * night, mean squared errors: `error_predicted`, of the night that the network predicts from an image in one call;
      `error_predicted_mean` (the training images' mean) and `error_predicted_linear` (linear regression, pixel by pixel) without a network;
      `error_given...`, the same of images sampled for their night, which determines the day; `error_joint`, of the night sampled with
      an image to that image's night;
    * segmentation, mean IoU: `miou_predicted`, of the likeliest classes that the network predicts from an image in one call; `miou_given`,
      of what an independent rule sees in an image sampled for a segmentation, to that segmentation; `miou_joint`, of both sampled together;
      `miou_rule`, the rule's on real images: the ceiling of the last two;
    * `..._shuffled`: of pairs that do not belong together;
    * `frechet_ratio_given`, `_joint`, `_absent`: images sampled for another image, with one, and without any.

    Attributes:
      other: "segmentation" or "night".
      batch: examples in a call of the network or the sampler.
    """

    other: str
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        other, steps, guidance = self.other, int(config.sample.steps), float(config.sample.guidance)
        test = load_all(experiment.test_data())
        count = len(test["image"])
        train = load_all(Subset(experiment.train_data(), count))
        read_key, *keys = jax.random.split(key, 4)
        options = {"batch": self.batch, "steps": steps, "guidance": guidance}
        clock = Clock()
        clock.start("predicted", f"predicting the {other} of {count} images in one network call each")
        predicted = self._predict(experiment, params, read_key, test["image"])
        sampled = {}
        settings = {"given": ({other: test[other]}, ()), "joint": ({}, ()), "absent": ({}, (other,))}
        for (name, (given, absent)), own in zip(settings.items(), keys):
            clock.start(name, f"sampling {count} images, {other} {name}")
            found = sample_batched(experiment, params, own, given, count, absent=absent, **options)
            sampled[name] = {each: _seen(experiment, each, found[each]) for each in ("image", other)}
        clock.start("judge", "comparing the images")
        # Images sampled for held-out images are nearer to these than fresh ones would be: they are compared with training images.
        real = {"given": train["image"], "joint": test["image"], "absent": test["image"]}
        unit = real_distance(train["image"], test["image"])
        metrics = {f"frechet_ratio_{name}": frechet_distance(sampled[name]["image"], real[name]) / unit for name in sampled}
        implied = {name: self._implied(pair["image"]) for name, pair in {**sampled, "test": test}.items() if name != "absent"}
        apart = np.roll(test[other], 1, 0)
        if other == "night":
            metrics |= self._errors("predicted", other, "image", predicted, test, train)
            metrics |= self._errors("given", "image", other, sampled["given"]["image"], test, train)
            metrics["error_joint"] = error(implied["joint"], sampled["joint"][other])
            metrics["error_shuffled"] = error(implied["test"], apart)
        else:
            pairs = {
                "predicted": (predicted, test[other]), "given": (implied["given"], test[other]),
                "joint": (implied["joint"], sampled["joint"][other]),
                "rule": (implied["test"], test[other]), "shuffled": (test[other], apart),
            }  # fmt: skip
            metrics |= {f"miou_{name}": miou(*pair, len(paired_scenes.PALETTE)) for name, pair in pairs.items()}
        clock.start("chain", "keeping the states of ten trajectories")
        trajectory = functools.partial(states, experiment, params, steps=steps, guidance=guidance)
        chains = {"given": trajectory(keys[0], {other: test[other]}, "image"), "joint": trajectory(keys[1], {}, "image")}
        clock.stop()
        return EvalResult(
            metrics=metrics,
            definitions=self._definitions(count),
            figures=self._figures(experiment, test, predicted, sampled, implied, chains, f"{steps} steps, guidance {guidance:g}"),
            settings={
                "sample_steps": steps, "guidance": guidance, "test_images": count, "samples_of_each_kind": count,
                "what_an_image_implies": RULES[other], "frechet_features": "raw pixels", "evaluation_seconds": clock.seconds},
        )  # fmt: skip

    def _predict(self, experiment, params, key, images):
        found = predict_batched(experiment, params, key, {"image": images}, self.other, self.batch)
        return _seen(experiment, self.other, found if self.other == "night" else found.argmax(-1))

    def _implied(self, images):
        """The other image of images, by a rule that has nothing to do with the network."""
        return paired_scenes.night(images) if self.other == "night" else trained_judge(images.shape[1]).segments(images)

    def _errors(self, way, target, source, found, test, train):
        """The errors of `target` images made from `source` images, by the network and without one."""
        plain = {"": found, "_mean": train[target].mean(0), "_linear": linear(test[source], train[source], train[target])}
        return {f"error_{way}{name}": error(np.clip(made, -1, 1), test[target]) for name, made in plain.items()}

    def _definitions(self, count):
        other = self.other
        definitions = {
            "error_predicted": f"mean squared error of the {other} predicted from an image in one network call; {count} held-out images",
            "error_given": f"mean squared error of an image sampled for its {other} to the true one; {count} held-out pairs",
            "error_joint": f"mean squared error of the {other} sampled together with an image to that image's {other} ({RULES[other]}); "
            f"{count} pairs",
            "error_shuffled": f"the same of a real image and the {other} of another one",
            "miou_predicted": f"mean over 11 classes of intersection over union, all pixels counted together, of the {other} "
            f"predicted from an image in one network call; {count} held-out images",
            "miou_given": f"the same of what the rule sees in an image sampled for a {other}, to that; {count} held-out ones; the rule: "
            f"{RULES[other]}",
            "miou_joint": f"the same of what the rule sees in an image to the {other} sampled together with it; {count} pairs",
            "miou_rule": "the same of what the rule sees in real images to the truth: the ceiling of the two",
            "miou_shuffled": f"the same of the {other} of two real images",
        }
        for way in ("predicted", "given"):
            definitions[f"error_{way}_mean"] = "the same of the training images' mean"
            definitions[f"error_{way}_linear"] = "the same of linear regression of a pixel's colour on its colour in the other image"
        ratio = f"squared Fréchet distance (raw pixels) of {count} images"
        return definitions | {
            "frechet_ratio_given": f"{ratio} sampled for held-out {other}s to as many training images, over that of the held-out images",
            "frechet_ratio_joint": f"{ratio} sampled together with their {other} to as many held-out ones, over that of training images",
            "frechet_ratio_absent": f"the same of images sampled without a {other}: plain DDPM",
        }

    def _figures(self, experiment, test, predicted, sampled, implied, chains, sampler):
        other = self.other
        show, show_other = (experiment.modalities[name].show for name in ("image", other))
        given, joint = sampled["given"]["image"], sampled["joint"]

        def rows(*shown):
            return plots.grid(np.concatenate([each[:10] for each in shown]), 10, rows=list("abcd"[: len(shown)]))

        rule = f"the {other} that b implies" if other == "night" else "what the independent rule sees in b"
        return {
            f"Image to {other}": Figure(
                rows(show(test["image"]), show_other(predicted), show_other(test[other])),
                "a: real, held out; b: predicted from a in one network call; c: the truth."),
            f"{other.capitalize()} to image": Figure(
                rows(show_other(test[other]), show(given), show_other(implied["given"]), show(test["image"])),
                f"a: real, held out; b: sampled for a, {sampler}; c: {rule}; d: the image that a is of."),
            "Both sampled together": Figure(
                rows(show_other(joint[other]), show(joint["image"]), show_other(implied["joint"])),
                f"a: {other}; b: image; c: {rule}; {sampler}."),
            "From noise to image": Figure(
                plots.grid(show(chains["given"]), 10),
                f"States of ten trajectories with a held-out {other} given, from noise, above, to the image; {sampler}."),
            "From noise to both": Figure(
                plots.grid(show(chains["joint"]), 10),
                f"The same where the {other} is sampled, too: the mean carries what is believed of it."),
            "Images alone": Figure(plots.grid(show(sampled["absent"]["image"][:50]), 10), f"Sampled without a {other}; {sampler}."),
        }  # fmt: skip


def _seen(experiment, name, array):
    return getattr(experiment.modalities[name], "quantize", np.asarray)(array)


def error(images: np.ndarray, real: np.ndarray) -> float:
    """Mean squared error."""
    return float(np.mean((images - real) ** 2))


def miou(found: np.ndarray, true: np.ndarray, classes: int) -> float:
    """The mean of intersection over union of integer maps of one shape; classes that neither of them has do not count."""
    counts = np.zeros((classes, classes))
    np.add.at(counts, (found.ravel(), true.ravel()), 1)
    both, either = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
    return float(np.mean(both[either > 0] / either[either > 0]))


def linear(source: np.ndarray, train_source: np.ndarray, train_target: np.ndarray) -> np.ndarray:
    """Images [n, ..., C] made of `source` pixel by pixel, by the affine map of colours with the least squared error in training."""

    def padded(pixels):
        pixels = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64)
        return np.append(pixels, np.ones((len(pixels), 1)), 1)

    weights = np.linalg.lstsq(padded(train_source), train_target.reshape(-1, train_target.shape[-1]), rcond=None)[0]
    return (padded(source) @ weights).reshape(*source.shape[:-1], -1).astype(np.float32)
