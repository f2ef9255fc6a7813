"""CLIP's scores of images for their captions, by a published CLIP in a folder or file, images some at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np

from mmdiff import hosts
from mmdiff.data.named_encoders import ImageVectors, TextStates
from mmdiff.data.stored_images import threads
from mmdiff.errors import UserError
from mmdiff.evals.caption_scores import clip_score

PREFIX = "A photo depicts "  # of Hessel et al. 2021, before each caption


def clip_metrics(images: Iterable[np.ndarray], captions: Sequence[str], path: str | os.PathLike) -> tuple[dict[str, float], dict[str, str]]:
    """CLIPScore as published, and the cosine in percent that tables of text-to-image models have -> (metrics, their definitions).

    Args:
      images: uint8 [k, H, W, 3], some at a time, of any sizes; of several processes each gives those of its part (`hosts.part`).
      captions: one for each image of all; of a long one the first 77 tokens count.
      path: of a CLIP with both towers and its tokenizer.

    Raises:
      UserError: other counts of images and captions; what `open_encoder` and the tokenizer refuse.
    """
    text = TextStates({"kind": "clip_text", "path": str(path)}, "captions", "states", "vectors")
    image = ImageVectors({"kind": "clip_vision", "path": str(path)}, 0, "images", "vectors")
    image.size = image.opened.net.projection_dim or image.opened.net.hidden_size
    empty = np.zeros((0, image.size), np.float32)  # of a process without images
    parts = [image.encode(np.stack(list(threads().map(image.opened.preprocessing, part))))["vectors"] for part in images]
    pictures = hosts.joined(np.concatenate([empty, *parts]))
    count = len(pictures)
    if count != len(captions):
        raise UserError(f"there are {len(captions):,} captions and {count:,} images: give one caption for each, in their order.")
    mine = [captions[i] for i in hosts.part(count)]
    plain, prefixed = (
        hosts.joined(text.encode([before + caption for caption in mine])["vectors"] if mine else empty) for before in ("", PREFIX))
    of = f"the CLIP in {os.path.basename(os.path.normpath(path))}; {count:,} samples"
    return (
        {"CLIPScore": clip_score(pictures, prefixed), "CLIP_cosine": clip_score(pictures, plain, 100.0)},
        {
            "CLIPScore": f"2.5 max(cos, 0), captions begin with {PREFIX!r}; {of}",
            "CLIP_cosine": f"100 max(cos, 0) of an image and its caption; {of}"})  # fmt: skip
