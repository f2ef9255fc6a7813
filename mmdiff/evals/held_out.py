"""What can be measured of any joint model on held-out data, without a network that judges: losses, bounds, accuracy, recall, novelty."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.data.modalities import Images, Labels
from mmdiff.data.sources import Subset, load_all
from mmdiff.data.token_modalities import Texts
from mmdiff.errors import UserError
from mmdiff.evals import likelihood, plots
from mmdiff.evals.accuracy import accuracy, confusion, denoising_losses
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, best, example_keys, in_batches, predict_batched, sample_batched
from mmdiff.evals.frechet import flatten, frechet_ratio, pooled, real_distance

SIDE = 8  # images are shrunk to this side before they are compared
SHOWN = 40  # samples in a grid
CANDIDATES = 10  # captions of which one is right
NOISELESS = 2e-3  # the time at which the 256 levels, 2 / 255 apart, hardly blur


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Metrics and grids of a joint model of `target`, an image or vectors, and the modalities of the same examples.

    * `held_out_loss`, and each term of it: the training loss of the held-out examples, with fixed noise.
    * `bits_per_dim` of images: a bound on -log p(image | condition) of 8-bit pixels, in bits per channel of a pixel.
    * `label_accuracy`: the most likely label of each held-out image, by one network call.
    * `caption_recall`: the share of held-out images whose own caption explains them best (the least denoising loss) among ten.
    * `frechet_ratio` of samples with the training examples' conditions: 1 is as good as fresh real data.
    * `novelty`: how far a sample is from the nearest training example, over how far a held-out example is: near 0 they are copies.
    * `sample_agreement`, `real_agreement`: the share of samples for a class whose nearest training example is of that class, and of real
      held-out examples, which is what can be expected.

    Images are compared as their means over 8 x 8 fields.

    Attributes:
      target: the modality that is sampled.
      condition: the modality that samples are given, "" for none.
      most: the most held-out examples that are measured, and the most samples, evenly spread.
      draws: noisy copies of an example in a bound, or with a candidate caption.
      batch: examples in a call of the network.
    """

    target: str = "image"
    condition: str = ""
    most: int = 500
    draws: int = 16
    batch: int = 64

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        steps, guidance = int(config.sample.steps), float(config.sample.guidance)
        test, train = (load_all(Subset(source, self.most)) for source in (experiment.test_data(), experiment.train_data()))
        count = len(test[self.target])
        if count < 2:
            raise UserError(f"{count} held-out example is too few to measure anything: hold out more (config.data.test).")
        keys = dict(zip(("loss", "bound", "label", "caption", "samples", "joint"), jax.random.split(key, 6)))
        clock, metrics, definitions, figures = Clock(), {}, {}, {}

        def found(part: tuple[Mapping, Mapping, Mapping]) -> None:
            for into, more in zip((metrics, definitions, figures), part):
                into.update(more)

        clock.start("loss", f"the loss of {count} held-out examples")
        found(self._losses(experiment, params, keys["loss"], test))
        learnt = {name for name, part in experiment.process.parts.items() if part.learnt}
        modality = experiment.modalities[self.target]
        if isinstance(modality, Images):
            clock.start("bound", f"a bound on their likelihood, {self.draws + 1} calls each")
            found(self._bound(experiment, params, keys["bound"], test))
        for name in sorted(learnt - {self.target}):
            if isinstance(experiment.modalities[name], Labels):
                clock.start(f"{name}_accuracy", f"the {name} of each, one call")
                found(label_accuracy(experiment, params, keys["label"], test, self.target, name, self.batch))
        if isinstance(experiment.modalities.get(self.condition), Texts):
            clock.start("caption_recall", f"the caption of each, {self.draws * CANDIDATES} calls")
            found(self._recall(experiment, params, keys["caption"], test))
        clock.start("samples", f"{len(train[self.target])} samples, {steps} steps")
        given = {self.condition: train[self.condition]} if self.condition else {}
        options = {"batch": self.batch, "steps": steps, "guidance": guidance}
        sampled = sample_batched(experiment, params, keys["samples"], given, len(train[self.target]), **options)[self.target]
        sampled = getattr(modality, "quantize", np.asarray)(sampled)
        found(self._quality(experiment, sampled, train, test))
        clock.start("grids", f"{SHOWN} samples of everything at once")
        joint = sample_batched(experiment, params, keys["joint"], {}, SHOWN, **options)
        found(({}, {}, self._grids(experiment, sampled, joint, train, test, f"{steps} steps, guidance {guidance:g}")))
        clock.stop()
        settings = {
            "sample_steps": steps, "guidance": guidance, "held_out_examples": count, "samples": len(sampled), "noise_draws": self.draws,
            "compared_features": f"means over fields, {SIDE} x {SIDE}" if isinstance(modality, Images) else "raw values",
            "evaluation_seconds": clock.seconds}
        return EvalResult(metrics, definitions, figures, settings)

    def _losses(self, experiment, params, key, test):
        """The mean of every term, over batches of one size; what is left over is a batch of its own."""
        loss, count = jax.jit(lambda params, batch: experiment.loss(params, batch, key)), len(test[self.target])
        totals: dict[str, float] = {}
        for start in range(0, count, self.batch):
            rows = np.arange(start, min(start + self.batch, count))
            value, terms = loss(params, {"index": rows.astype(np.uint32), **{name: array[rows] for name, array in test.items()}})
            for name, each in {"loss": value, **terms}.items():
                totals[name] = totals.get(name, 0.0) + float(each) * len(rows) / count
        names = {name: f"held_out_{name.replace('/', '_')}" for name in totals}
        definitions = {names[name]: f"the training {name} of {count} held-out examples, the same noise every time" for name in totals}
        return {names[name]: value for name, value in totals.items()}, definitions, {}

    def _bound(self, experiment, params, key, test):
        absent = [name for name in experiment.shape if name not in (self.target, self.condition)]
        pinned = [self.condition] if self.condition else []
        path = likelihood.along(experiment.process, likelihood.geometric(NOISELESS), pinned, absent)
        decoders = {self.target: likelihood.levels(jnp.linspace(-1, 1, 256))}

        def bound(params, keys, x0):
            parts = likelihood.continuous_time(experiment.process, experiment.apply, params, keys, x0, path, self.draws, decoders)
            return likelihood.bits_per_dim(parts[self.target], experiment.shape[self.target])

        count = len(test[self.target])
        bits = in_batches(bound, params, example_keys(key, count), {name: test[name] for name in experiment.shape}, self.batch)
        given = f" given {self.condition}" if self.condition else ""
        definition = f"variational bound on -log2 p(image{given}) of 8-bit pixels, per channel of a pixel; {count} held-out images"
        return {"bits_per_dim": float(bits.mean())}, {"bits_per_dim": definition}, {}

    def _recall(self, experiment, params, key, test):
        """A candidate is another held-out caption; equal captions are one."""
        texts, own = np.unique(test[self.condition], axis=0, return_inverse=True)
        places = min(CANDIDATES, len(texts))
        if places < 2:
            return {}, {}, {}
        spread = 1 + np.arange(places - 1) * (len(texts) - 1) // (places - 1)  # the others, in a circle
        candidates = texts[(own.reshape(-1, 1) + np.array([0, *spread])) % len(texts)]

        def losses(params, keys, given):
            image, candidates = given
            process, apply, shape = experiment.process, experiment.apply, experiment.shape
            return denoising_losses(process, apply, params, keys, {self.target: image}, self.condition, candidates, shape, self.draws)

        count = len(own)
        given = test[self.target], candidates
        scores = -in_batches(losses, params, example_keys(key, count), given, max(1, self.batch // places))
        name = f"{self.condition}_recall"
        definition = f"share of {count} held-out images whose own {self.condition} gives the least denoising loss of {places}"
        definition += f" (by chance {1 / places:.2f})"
        return {name: float(np.mean(best("minus the denoising losses", scores) == 0))}, {name: definition}, {}

    def _quality(self, experiment, sampled, train, test):
        image = isinstance(experiment.modalities[self.target], Images)
        made, known, held = (
            pooled(array, SIDE) if image else flatten(array) for array in (sampled, train[self.target], test[self.target]))
        near, place = _nearest(made, known)
        real, real_place = _nearest(held, known)
        metrics = {"novelty": float(near.mean() / max(real.mean(), 1e-12))}
        definitions = {
            "novelty": f"mean distance of {len(made)} samples to their nearest of {len(known)} training examples, over that of "
            f"{len(held)} held-out examples: 1 as new as these, near 0 copies"}
        if real_distance(known, held) > 0:
            metrics["frechet_ratio"] = frechet_ratio(made, held, known)
            definitions["frechet_ratio"] = (
                f"squared Fréchet distance of {len(made)} samples to {len(held)} held-out examples, over that of as many training "
                "examples: 1 is the limit; of few examples a rough measure")
        if isinstance(experiment.modalities.get(self.condition), Labels):
            labels = train[self.condition]
            metrics["sample_agreement"] = accuracy(labels[place], labels)
            metrics["real_agreement"] = accuracy(labels[real_place], test[self.condition])
            definitions["sample_agreement"] = f"share of {len(made)} samples for a class whose nearest training example is of that class"
            definitions["real_agreement"] = f"the same of {len(held)} held-out examples: what can be expected"
        if not image:
            return metrics, definitions, {}
        rows = np.stack([sampled[:SHOWN], train[self.target][place[:SHOWN]]], 1).reshape(-1, *sampled.shape[1:])
        sheet = plots.grid(experiment.modalities[self.target].show(rows), 10 if len(rows) >= 10 else len(rows))
        return metrics, definitions, {"Samples and their nearest training images": Figure(sheet, "In turn: a sample, the nearest to it.")}

    def _grids(self, experiment, sampled, joint, train, test, sampler):
        if not isinstance(experiment.modalities[self.target], Images):
            return {}
        show = experiment.modalities[self.target].show
        words = {name: modality.show for name, modality in experiment.modalities.items() if isinstance(modality, (Labels, Texts))}

        def sheet(arrays, names):
            texts = [words[name](arrays[name][:SHOWN]) for name in names if name in words]
            captions = [" ".join(row) for row in zip(*texts)] if texts else None
            return plots.grid(show(arrays[self.target][:SHOWN]), 10, captions)

        others = [name for name in experiment.shape if name != self.target]
        given = [self.condition] if self.condition else []
        what = f"Given {self.condition}; {sampler}." if given else f"{sampler}."
        return {
            "Samples": Figure(sheet({**train, self.target: sampled}, given), what),
            "Joint samples": Figure(sheet(joint, others), f"All modalities sampled together; {sampler}."),
            "Real data": Figure(sheet(test, others), "Held out, for comparison."),
        }


@dataclasses.dataclass(frozen=True)
class LabelAccuracy:
    """`label_accuracy` of held-out data alone, as `HeldOut` has it: the label of each `target` by one network call.

    Attributes:
      target: what is given. label: what is predicted. most, batch: as of `HeldOut`.
    """

    target: str = "image"
    label: str = "label"
    most: int = 500
    batch: int = 64

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        test, clock = load_all(Subset(experiment.test_data(), self.most)), Clock()
        clock.start(f"{self.label}_accuracy", f"the {self.label} of {len(test[self.target])} held-out examples, one call each")
        found = label_accuracy(experiment, params, key, test, self.target, self.label, self.batch)
        clock.stop()
        return EvalResult(*found, {f"{self.label}_accuracy_examples": len(test[self.target]), "evaluation_seconds": clock.seconds})


def label_accuracy(experiment, params, key, test, target: str, name: str, batch: int) -> tuple[dict, dict, dict]:
    """(metrics, definitions, figures) of the most likely label `name` of each `target` in `test`."""
    true, count = test[name], len(test[target])
    beliefs = predict_batched(experiment, params, key, {target: test[target]}, name, batch)
    predicted = best(f"p({name} | {target})", beliefs)
    modality = experiment.modalities[name]
    metrics = {f"{name}_accuracy": accuracy(predicted, true)}
    definitions = {
        f"{name}_accuracy": f"argmax of p({name} | {target}), one network call; {count} held-out examples, "
        f"{np.bincount(true).max() / count:.3f} of them in the largest class"}
    if modality.count > 30:
        return metrics, definitions, {}
    table = plots.matrix(confusion(predicted, true, modality.count), modality.show(np.arange(modality.count)), "true", "predicted")
    return metrics, definitions, {f"{target} to {name}".capitalize(): Figure(table, f"{count} held-out examples.")}


def _nearest(examples: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of examples [n, d] the distance to the nearest of `known` [m, d], and its place: [n] each."""
    examples, known = (np.asarray(array, np.float64) for array in (examples, known))
    squared = (examples**2).sum(1)[:, None] - 2 * examples @ known.T + (known**2).sum(1)
    return np.sqrt(np.maximum(squared.min(1), 0)), squared.argmin(1)
