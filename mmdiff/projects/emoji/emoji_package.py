"""The tar file of `emoji`, made of the npm package that has the pictures.

    npm pack emoji-datasource-google@16.0.0
    python -m mmdiff.projects.emoji.emoji_package emoji-datasource-google-16.0.0.tgz emoji64.tar

The package lists every emoji in emoji.json, with its variants in skin tones, and has a picture of each in img/google/64.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from mmdiff import console, files
from mmdiff.errors import UserError
from mmdiff.projects.emoji.emoji import TONES

IMAGES = "package/img/google/64/"
TONE_OF = dict(zip(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"), TONES))  # by the code point of the modifier
NO_PACKAGE = "is not the npm package emoji-datasource-google"


def members(listed: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name of a picture, what its .json says) of all emoji in an emoji.json, a variant after what it is one of.

    >>> variant = {"image": "270b-1f3fb.png", "has_img_google": True}
    >>> hand = {"name": "RAISED HAND", "image": "270b.png", "has_img_google": True, "short_names": ["hand"], "category": "People & Body",
    ...         "subcategory": "hand-fingers-open", "skin_variations": {"1F3FB": variant}}
    >>> [(image, found["name"], found["tones"]) for image, found in members([hand])]
    [('270b.png', 'raised hand', []), ('270b-1f3fb.png', 'raised hand', ['light skin tone'])]
    """
    for emoji in listed:
        name = (emoji["name"] or emoji["short_names"][0]).lower()
        found = {"name": name, **{key: emoji[key] for key in ("short_names", "category", "subcategory")}}
        for key, each in {"": emoji, **emoji.get("skin_variations", {})}.items():
            if each["has_img_google"]:
                yield each["image"], {**found, "tones": [f"{TONE_OF[code]} skin tone" for code in key.split("-") if code]}


def convert(package: str, target: str) -> int:
    """Writes the tar file, and returns the number of pictures.

    Raises:
      UserError: a package that is missing, damaged or another one; a target that cannot be written.
    """
    source = files.expand(package)
    try:
        with files.open_regular(source) as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar if member.isreg() and (
                member.name.startswith(IMAGES) or member.name == "package/emoji.json")}
        pairs = [(image, content[IMAGES + image], found) for image, found in members(json.loads(content["package/emoji.json"]))]
    except (tarfile.TarError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{source} {NO_PACKAGE} ({type(error).__name__}: {error}): npm pack emoji-datasource-google@16.0.0") from error
    try:
        with files.whole(files.target(target)) as draft, tarfile.open(draft, "w") as tar:
            for image, picture, found in pairs:
                for name, each in ((image, picture), (f"{image.removesuffix('.png')}.json", json.dumps(found).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(each)
                    tar.addfile(member, io.BytesIO(each))
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}): name a file in a folder that is there.") from error
    return len(pairs)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        console.say("usage: python -m mmdiff.projects.emoji.emoji_package PACKAGE.tgz emoji64.tar")
        sys.exit(2)
    try:
        console.out(f"{sys.argv[2]}: {convert(*sys.argv[1:])} pictures")
    except UserError as error:
        console.say(f"mmdiff: error: {error}")
        sys.exit(2)
