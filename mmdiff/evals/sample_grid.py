"""The evaluator that shows samples: a grid of them, with the same noise and the same conditions each time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from mmdiff.data.sources import Subset, load_all
from mmdiff.errors import UserError
from mmdiff.evals import plots
from mmdiff.evals.evaluator import EvalResult, Figure, sample_batched


@dataclasses.dataclass(frozen=True)
class SampleGrid:
    """A figure of each modality that is sampled and seen as images, with what is text below them.

    Conditions of the process, and what guidance drops, are those of validation examples, evenly spread over them.

    Attributes:
      side: images in a row, and rows. large: the same of images of more than `wide` pixels.
    """

    side: int = 8
    large: int = 4
    wide: int = 128

    def prepared(self, experiment, config) -> Callable[..., EvalResult]:
        """The evaluator with its conditions read. Raises UserError: a model that samples no images, a decoder that is not there."""
        conditions = {*getattr(experiment.process, "conditions", ()), *experiment.sampler.get("drop", ())}
        examples = load_all(Subset(experiment.validation_data(), self.side**2)) if conditions else {}
        given = {name: examples[name] for name in experiment.shape if name in conditions}
        sample = functools.partial(experiment.sample, **_settings(config))
        keys = jax.random.split(jax.random.key(0), 1)
        like = jax.eval_shape(sample, jax.eval_shape(experiment.init, keys[0]), keys, {name: array[:1] for name, array in given.items()})
        seen = {
            name: experiment.modalities[name].show(np.zeros(array.shape, array.dtype))
            for name, array in like.items() if name in experiment.modalities and name not in given}
        widths = {name: images.shape[2] for name, images in seen.items() if isinstance(images, np.ndarray)}
        if not widths:
            raise UserError("config.train.sample_every asks for grids of images, and this model samples none: set it to 0.")
        side = self.side if max(widths.values()) <= self.wide else self.large
        count = min([side**2, *map(len, given.values())])
        return functools.partial(self._show, side, count, {name: array[:count] for name, array in given.items()}, tuple(widths))

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        return self.prepared(experiment, config)(experiment, params, config, key, step)

    def _show(self, side: int, count: int, given: Mapping, images: tuple[str, ...], experiment, params, config, key, step) -> EvalResult:
        settings = _settings(config)
        samples = sample_batched(experiment, params, key, given, count, batch=-(-count // jax.device_count()), **settings)
        modalities = experiment.modalities
        shown = {name: modalities[name].show(array) for name, array in {**samples, **given}.items() if name in modalities}
        words = [" ".join(map(str, row)) for row in zip(*(value for value in shown.values() if isinstance(value, list)))]
        caption = f"Step {step}: {settings['steps']} steps, guidance {settings['guidance']:g}."
        figures = {name: Figure(plots.grid(shown[name], min(side, count), words or None), caption) for name in images}
        return EvalResult({}, {}, figures, settings)


def _settings(config) -> dict[str, int | float]:
    return {"steps": int(config.sample.steps), "guidance": float(config.sample.get("guidance", 1.0))}
