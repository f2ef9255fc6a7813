"""DiffDis' alignment task, which denoises a text's vector given an image; and retrieval of pairs by it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.evals import retrieval
from mmdiff.evals.captioned_images import CaptionedImages
from mmdiff.evals.evaluator import Clock, EvalResult, example_keys, in_batches
from mmdiff.nets.dual import DualStream, image_kv_cache, with_image_cache
from mmdiff.processes import Gaussian, Given, Joint


@dataclasses.dataclass(frozen=True)
class Aligner:
    """A `DualStream` read by its second task: images -> unit vectors of their texts, denoised from noise.

    Attributes:
      net: the network. Without `two_way` an image is encoded once, and each further step costs one token.
      query: the vector's process.
      size: of the vector. shape: of an image.
    """

    net: DualStream
    query: Gaussian
    size: int
    shape: tuple[int, ...]

    def __call__(
        self, params, key, images: np.ndarray | None, *, count: int = 0, steps: int = 10, seeds: int = 1, guidance: float = 1.0,
        batch: int = 250, cached: bool | None = None,
    ) -> np.ndarray:
        """Vectors [n, size] of images [n, ...], or of `count` absent ones (None)."""
        given = {} if images is None else {"image": images}
        function = self.function(steps, seeds, guidance, not self.net.two_way if cached is None else cached)
        return in_batches(function, params, example_keys(key, count if images is None else len(images)), given, batch)

    @functools.cache  # the same function for the same options, so that jax compiles it once
    def function(self, steps: int, seeds: int = 1, guidance: float = 1.0, cached: bool = False):
        """`(params, keys, given) -> vectors`, to be jitted; `cached` encodes the images once."""
        options = dict(steps=steps, seeds=seeds)

        def with_cache(params, keys, given):
            images = given.get("image", jnp.zeros((len(keys), *self.shape)))
            hidden = jnp.ones(len(keys))
            plain = with_image_cache(self.net, image_kv_cache(self.net, params, images, None if given else hidden))
            network = plain
            if given and guidance != 1:
                unconditional = with_image_cache(self.net, image_kv_cache(self.net, params, images, hidden))

                def network(params, x, t):
                    return jax.tree.map(lambda u, c: u + guidance * (c - u), unconditional(params, x, t), plain(params, x, t))

            return retrieval.align(Joint(query=self.query), network, params, keys, {}, {"query": (self.size,)}, **options)

        def without_cache(params, keys, given):
            apply = functools.partial(self.net.apply, tasks=("align",))
            shape = {"image": self.shape, "query": (self.size,)}
            process, scale = Joint(image=Given(0.0), query=self.query), guidance if given else 1.0
            return retrieval.align(process, apply, params, keys, given, shape, guidance=scale, drop=("image",), **options)

        return with_cache if cached else without_cache


STEPS_AND_SEEDS = {"1": (1, 1), "2": (2, 1), "5": (5, 1), "10": (10, 1), "50": (50, 1), "1_of_4": (1, 4), "1_of_8": (1, 8)}  # steps, seeds


@dataclasses.dataclass(frozen=True)
class PairRetrieval:
    """Recall@K both ways of images and their texts' vectors, "image" and "query" of the evaluation data; of captioned images all captions.

    Attributes:
      aligner: the alignment task. count: images, each compared with all texts. batch: examples of a network call.
    """

    aligner: Aligner
    count: int = 1000
    batch: int = 250

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        data, clock = CaptionedImages.of(experiment.test_data(), self.count), Clock()
        clock.start("alignment", f"denoising the texts' vectors of {data}")
        texts = np.asarray(data.texts["query"], np.float64)
        texts = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
        vectors = self.aligner(params, key, data.images["image"], steps=10, batch=self.batch)
        clock.stop()
        own = np.split(texts, len(data))
        relevant = np.stack([(of_image @ texts.T > 1 - 1e-6).any(0) for of_image in own])  # all that equal one of an image's
        metrics = retrieval.recalls(retrieval.scores(vectors, texts), relevant)
        definitions = {name: f"10 steps from noise; {data}; equal texts are right, too" for name in metrics}
        return EvalResult(metrics, definitions, {}, {"candidates": len(texts), "evaluation_seconds": clock.seconds})
