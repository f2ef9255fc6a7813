"""Prompts for FID and the CLIP score of text to image: one caption of each of so many images of a set, a caption on every line.

    python -m mmdiff.data.prompts coco_captions coco prompts.txt 30000

Images and captions are chosen by fixed random numbers, so that every model is given the same; by default all images are. The split is
the one that is reported: "test" of Karpathy's sets, else "val", of COCO the 40,504 images of val2014, of which FID-30k takes 30,000. That
is for models of coco_captions: of the images of val2014 coco_karpathy has 30,504 in its training split.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from mmdiff import console, files
from mmdiff.data.image_datasets import records_of, test_split
from mmdiff.errors import UserError


def prompts(name: str, folder: str | os.PathLike, number: int = 0, split: str = "") -> list[str]:
    """One caption each of `number` images of a split, all of the reported one by default, in the order of a random permutation.

    Raises:
      UserError: no such set, fewer images, images without captions.
    """
    split = split or test_split(name)
    records = records_of(name, split, folder)
    if not 0 <= number <= len(records) or not records.captions:
        has = f"{len(records):,} images" if records.captions else "no captions"
        raise UserError(f"the split {split} of {name} in {folder} has {has}, and {number or len(records):,} prompts are asked for.")
    rng = np.random.default_rng(0)
    rows, shares = rng.permutation(len(records)), rng.random(len(records))
    said = [record["captions"] for record in records.get(rows[: number or None].tolist())]
    return [" ".join(captions[int(share * len(captions))].split()) for captions, share in zip(said, shares)]


def main(name: str, folder: str, target: str, number: str = "0") -> int:
    """Writes the file; -> how many there are. Raises UserError as `prompts`, for no number, and for a file that cannot be written."""
    if not number.isdecimal():
        raise UserError(f"the number of prompts is {number!r}: write a whole number, or leave it out for all images.")
    found = prompts(name, folder, int(number))
    try:
        files.write_whole(files.target(target), "".join(f"{prompt}\n" for prompt in found))
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}): name a file in a folder that is there.") from error
    return len(found)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        console.say("usage: python -m mmdiff.data.prompts SET FOLDER FILE.txt [NUMBER]")
        sys.exit(2)
    try:
        console.out(f"{sys.argv[3]}: {main(*sys.argv[1:]):,} prompts")
    except UserError as error:
        console.say(f"mmdiff: error: {error}")
        sys.exit(2)
