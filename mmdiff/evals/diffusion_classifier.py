"""Zero-shot classification by a generator: the class whose prompt explains the image best (Li et al. 2023), for models without vectors.

    python -m mmdiff eval --config joint/emoji_tokens --workdir runs/emoji --zeroshot cifar10 --zeroshot-images 50 --prompts FILE

`mmdiff eval --zeroshot` does this for every config of images and texts that does not hand vectors to `zeroshot.asked`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.data.encoded_modalities import EncodedLatents, EncodedTexts, EncodedTokens
from mmdiff.data.modalities import Images
from mmdiff.data.token_modalities import Texts
from mmdiff.errors import UserError
from mmdiff.evals.accuracy import denoising_losses
from mmdiff.evals.evaluator import in_batches
from mmdiff.evals.zeroshot import ZeroShot, selected
from mmdiff.guidance import at_one_time

CANDIDATES = 32  # examples of a network call


@dataclasses.dataclass(frozen=True)
class DiffusionClassifier(ZeroShot):
    """`ZeroShot` by denoising losses: the class is that whose first prompt gives the image the least, draws * classes calls an image.

    Attributes:
      encode_image: pixels [n, size, size, 3] -> the image as the model has it. encode_text: `(params, texts) ->` the texts.
      losses: `((params, texts [k, ...]), keys [n], images) -> [n, k]`.
    """

    losses: Callable | None = None
    by: ClassVar[str] = "the denoising losses given a prompt"
    most_prompts: ClassVar[int | None] = 1

    def _classes(self, params: Any, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        return self.encode_text(params, [template.replace("{}", name) for template in templates for name in names])

    def _scores(self, params: Any, keys: jax.Array, images: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        given, count = self.encode_image(images), len(candidates)
        part = min(count, CANDIDATES)
        found = []
        for start in range(0, count, part):
            rows = np.minimum(np.arange(start, start + part), count - 1)  # always as many, so that one program serves all
            found.append(in_batches(self.losses, (params, candidates[rows]), keys, given, max(1, CANDIDATES // part)))
        return -np.concatenate(found, 1)[:, :count]


def asked(experiment: Any, options: Any, draws: int = 16) -> DiffusionClassifier:
    """The evaluator of a joint model of an image and a text.

    Args:
      experiment: whose process has both.
      options: zeroshot, zeroshot_dir, zeroshot_prompts and zeroshot_images, as in `zeroshot.asked`.
      draws: noisy copies of an image, the same for all classes.

    Raises:
      UserError: no image of which pixels are encoded, or one that shares its time, or no text; what `zeroshot.asked` refuses.
    """
    there = {name: experiment.modalities[name] for name in experiment.shape if name in experiment.modalities}
    images = {name: _pixels(each) for name, each in there.items() if isinstance(each, (Images, EncodedLatents, EncodedTokens))}
    texts = {name: _words(each) for name, each in there.items() if isinstance(each, (Texts, EncodedTexts))}
    if len(images) != 1 or not texts:
        raise UserError(
            "this model has no vectors of images and texts to classify by (config.eval.zeroshot, as of diffdis/scenes), nor an image and a "
            f"text: it has {', '.join(there)}; classify with another one.")
    (image, (size, encode_image)), (text, encode_text) = *images.items(), next(iter(texts.items()))
    if names := [name for name in at_one_time(image, experiment.sampler.get("shared", ())) if name != image]:
        raise UserError(
            f"this model's {image} has one time with {', '.join(names)}, thus its loss given a prompt needs both, and the sets have the "
            "images alone: classify with another one.")

    def losses(params, keys, given):
        params, candidates = params
        each = jnp.broadcast_to(candidates, (len(keys), *candidates.shape))
        return denoising_losses(experiment.process, experiment.apply, params, keys, {image: given}, text, each, experiment.shape, draws)

    return DiffusionClassifier(
        encode_image, lambda params, names: encode_text(names), size=size, losses=losses, **selected(options))


def _pixels(modality: Any) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """The side of the images that a modality is made of, and how."""
    if isinstance(modality, Images):
        if modality.height != modality.width:
            raise UserError(f"{modality.name}: the images of the sets are square, and these are {modality.height} x {modality.width}.")
        grey = modality.channels == 1
        return modality.height, lambda pixels: modality.quantize(pixels.mean(-1, keepdims=True) if grey else pixels)
    if isinstance(modality, EncodedLatents):
        return modality.encoder.pixels, modality.encoder.latents
    return modality.encoder.pixels, lambda pixels: modality.encoder.encode(pixels)[modality.encoder.modalities[0]]


def _words(modality: Any) -> Callable[[Sequence[str]], np.ndarray]:
    """How sentences become values of a modality."""
    if isinstance(modality, Texts):
        return lambda texts: np.concatenate([modality.parse(text) for text in texts])  # refuses what no training text has
    return lambda texts: modality.check(modality.encoder.encode(texts)[modality.name])
