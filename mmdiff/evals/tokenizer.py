"""What is measured of a tokenizer: how much of an image its tokens keep, and how many of its codes are in use."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from mmdiff.data import media
from mmdiff.data.network_cache import map_batched, part_of
from mmdiff.data.sources import load_all
from mmdiff.evals import plots
from mmdiff.evals.evaluator import Clock, EvalResult, Figure
from mmdiff.evals.frechet import frechet_ratio, pooled
from mmdiff.nets.tokenizers import VQAutoencoder, usage


@dataclasses.dataclass(frozen=True)
class Reconstructions:
    """The metrics and figures of a `VQAutoencoder`, on the held-out images and as many training images.

    Attributes:
      net: the network.
      judge: `() -> judge`, and `judge(images) -> {name: values [n]}` reads what the source says of its images (`captioned_scenes.Judge`);
        then it is measured whether the reconstructions still show it.
      all_of: the names that must be right together for `reading_correctness`.
      image: the images' entry in the source.
      pool: if above 0, the features of the Fréchet distance are the images shrunk to pool x pool; raw pixels would be too many.
    """

    net: VQAutoencoder
    judge: Callable[[], Callable[[np.ndarray], Mapping[str, np.ndarray]]] | None = None
    all_of: tuple[str, ...] = ()
    image: str = "image"
    pool: int = 0

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        test = load_all(experiment.test_data())
        real, train = test[self.image], experiment.train_data()
        fresh = train.take(np.arange(min(len(real), len(train))))[self.image]
        clock = Clock()
        clock.start("reconstructions", f"encoding and decoding {len(real) + len(fresh)} images")
        encode, decode = (jax.jit(lambda x, method=method: self.net.apply(params, x, method=method)) for method in ("encode", "decode"))
        part, features = part_of(self.net), f"images of {self.pool} x {self.pool}" if self.pool else "raw pixels"
        shrink = functools.partial(pooled, side=self.pool) if self.pool else None
        ids = map_batched(encode, real, part)
        images, train_images = map_batched(decode, ids, part), map_batched(decode, map_batched(encode, fresh, part), part)
        mse = float(((images - real) ** 2).mean())
        share, perplexity = usage(np.bincount(ids.reshape(-1), minlength=self.net.codes))
        metrics = {
            "reconstruction_mse": mse,
            "reconstruction_psnr": 10 * math.log10(4 / max(mse, 1e-12)),
            "codebook_usage": float(share),
            "codebook_perplexity": float(perplexity),
            "frechet_ratio": frechet_ratio(train_images, real, fresh, shrink),
        }
        definitions = {
            "reconstruction_mse": f"squared error of a channel of a pixel, in [-1, 1]; {len(real)} held-out images",
            "reconstruction_psnr": "the same in decibels: 10 log10(2^2 / mse)",
            "codebook_usage": f"share of the {self.net.codes} codes that occur in the tokens of these images",
            "codebook_perplexity": "exp(entropy) of the codes' frequencies in them, in nats: as many equally frequent codes say as much",
            "frechet_ratio": f"squared Fréchet distance ({features}, float64) of {len(fresh)} reconstructed training images to the "
            "held-out ones, over that of the images themselves: 1 if nothing is lost",
        }
        if self.judge is not None:
            clock.start("judge", "reading what the reconstructions show")
            judge = self.judge()
            for kind, found in (("", judge(images)), ("_real", judge(real))):
                right = {name: values == test[name] for name, values in found.items()}
                metrics[f"reading_correctness{kind}"] = float(np.logical_and.reduce([right[name] for name in self.all_of]).mean())
                metrics |= {f"{name}_correctness{kind}": float(values.mean()) for name, values in right.items()}
                what = "images themselves" if kind else "reconstructions"
                definitions[f"reading_correctness{kind}"] = f"share of the {what} in which a judge trained on real ones reads the true " + (
                    f"{', '.join(self.all_of)}, all of them"
                )
                definitions |= {f"{name}_correctness{kind}": f"share of the {what} with the right {name}" for name in right}
        clock.stop()
        return EvalResult(
            metrics=metrics,
            definitions=definitions,
            figures={
                "Reconstructions": Figure(
                    self._sheet(real, images), "Held-out images, and below each what its tokens decode to; the first ones, none chosen."
                )
            },
            settings={"held_out_images": len(real), "frechet_features": features, "evaluation_seconds": clock.seconds},
        )

    @staticmethod
    def _sheet(real: np.ndarray, images: np.ndarray, columns: int = 10, lines: int = 4):
        """Rows of originals and of reconstructions in turn."""
        count = min(len(real), columns * lines) // columns * columns or len(real)
        pairs = [part[:count].reshape(-1, min(columns, count), *part.shape[1:]) for part in (real, images)]
        rows = np.stack(pairs, 1).reshape(-1, *real.shape[1:])
        return plots.grid(media.to_uint8(rows), min(columns, count))
