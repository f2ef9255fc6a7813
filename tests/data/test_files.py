"""Files that are not what they seem: whatever reads one says so in a sentence, at once, or reads what it truly holds."""

import dataclasses
import errno
import io
import json
import logging
import os
import pathlib
import pickle
import socket
import struct
import tarfile
import threading
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image, TiffImagePlugin

from mmdiff import files
from mmdiff.data import arrays, bpe, captions, media
from mmdiff.data.image_datasets import ImageDataset, tokenizer
from mmdiff.data.latents import LatentSource
from mmdiff.data.modalities import Features, Images, Labels, Latents
from mmdiff.data.network_cache import TOWERS, read_tokenizer
from mmdiff.data.token_cache import read_meta
from mmdiff.data.token_modalities import ClassMaps, Sequences, Texts, TokenImages
from mmdiff.errors import UserError
from mmdiff.evals.zeroshot import class_names
from mmdiff.projects.dance import aist
from mmdiff.projects.dance.sounds import Motion, TokenAudio, Waveforms

TOKENIZER = bpe.train(["a red square", "a dog"], 8, 300)


def refusal(call, *args):
    """The sentence of a call that is refused: one line, at once (a second or less; what reads on takes minutes)."""
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and time.process_time() - started < 10
    return message


# ------------------------------------------------------------------------------------------------- what is no file, for every reader


READERS = {
    "an image": (Images(8, 8, 1).parse, "x.png"),
    "an array as an image": (Images(8, 8, 1).parse, "x.npy"),
    "latents": (Latents(2, 2, 1).parse, "x.npz"),
    "vectors": (Features(3).parse, "x.npy"),
    "labels": (Labels(3).parse, "x.npy"),
    "a sequence": (Sequences(3, 5).parse, "x.npy"),
    "tokens": (TokenImages(2, 2, 3).parse, "x.npy"),
    "tokens as pixels": (TokenImages(2, 2, 3).parse, "x.png"),
    "a map": (ClassMaps(2, 2, ((0, 0, 0), (9, 9, 9))).parse, "x.bmp"),
    "sentences": (Texts(TOKENIZER).parse, "x.txt"),
    "ids": (Texts(TOKENIZER).parse, "x.npy"),
    "a sound": (Waveforms(10).parse, "x.wav"),
    "samples": (Waveforms(10).parse, "x.npy"),
    "music": (TokenAudio(3, 5).parse, "x.npy"),
    "a dance": (Motion(9, 24).parse, "x.pkl"),
    "a dance in an array": (Motion(9, 24).parse, "x.npy"),
    "a song": (aist.read_wav, "x.wav"),
    "a list of dances": (lambda path: aist.Aist(os.path.dirname(os.path.dirname(path)), "train"), "splits/crossmodal_train.txt"),
    "captions in a list": (
        lambda path: ImageDataset("captioned", "train", os.path.dirname(os.path.dirname(path)), 8), "train/captions.tsv"),
    "a tar file": (lambda path: ImageDataset("captioned", "train", os.path.dirname(os.path.dirname(path)), 8), "train/x.tar"),
    "a loose image": (lambda path: ImageDataset("captioned", "train", os.path.dirname(os.path.dirname(path)), 8), "train/x.png"),
    "an image of a class": (lambda path: ImageDataset("folder", "train", path.partition("/train/")[0], 8), "train/cat/x.jpg"),
    "variants": (
        lambda path: ImageDataset("fgvc_aircraft", "train", path.partition("/fgvc")[0], 8), "fgvc-aircraft-2013b/data/variants.txt"),
    "names of classes": (lambda path: class_names(["a"], pathlib.Path(path).parent), "cars/classes.txt"),
    "a latent cache": (lambda path: LatentSource(path.partition("/train/")[0], "train", {"label": Labels(3)}), "train/meta.json"),
    "a token cache": (lambda path: read_meta(os.path.dirname(path)), "cache.json"),
    "towers": (lambda path: read_tokenizer(os.path.dirname(path), TOWERS), "towers.json"),
    "weights": (arrays.read_arrays, "x.npz"),
}
# A folder may stand in the place of these.
FOLDERS = ("a loose image", "an image of a class", "an image", "an array as an image", "tokens as pixels", "a map", "a tar file")


def make(kind, path):
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a circle":
        path.symlink_to(path.name)
    elif kind == "a socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's whole path may have some hundred characters
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(kind)


NO_FILES = ("a named pipe", "a folder", "a circle", "a socket", "a device")
PAIRS = [(reader, kind) for reader in READERS for kind in NO_FILES if kind != "a folder" or reader not in FOLDERS]


@pytest.mark.parametrize("reader, kind", PAIRS)
def test_what_is_no_file(reader, kind, tmp_path):
    read, name = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in ("wav", "motions", "fgvc-aircraft-2013b/data"):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
    (tmp_path / "fgvc-aircraft-2013b/data/images_variant_trainval.txt").write_text("")
    make(kind, path)
    said = refusal(read, str(path))
    assert path.name in said and (kind in said or "there is no token cache in" in said or "there are no towers" in said), said


def test_what_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text("a dog")

    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        assert "may not be read (permission denied)" in refusal(Texts(TOKENIZER).parse, str(path))
        assert "may not be read (permission denied): ask its owner" in refusal(Waveforms(9).parse, str(path))
    (tmp_path / "data/train/cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("scandir", "stat"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            assert "may not be read" in refusal(ImageDataset, "folder", "train", "data", 8)


@pytest.mark.parametrize("name", [
    "gs://bucket/x", "a\nb", "a\udcffb", "x" * 5000, "a\0b", "~nobody_of_that_name/x", "none", "/etc/passwd/x"])  # fmt: skip
def test_names_of_no_file(name):
    for read in (Images(8, 8).parse, Waveforms(9).parse, Latents(2, 2, 1).parse, Texts(TOKENIZER).parse):
        for ending in (".png", ".npy", ".txt"):
            refusal(read, name + ending)


# ---------------------------------------------------------------------------------------------------------------------- images


def stored(array, kind, **options):
    stream = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


GREY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
DEEP = GREY.astype(np.uint16) * 257
RGBA = np.dstack([np.full((4, 6, 3), [200, 10, 90], np.uint8), np.where(GREY < 100, 0, 255).astype(np.uint8)])
ON_WHITE = np.where(RGBA[..., 3:] == 0, 255, RGBA[..., :3])
SIGNED = TiffImagePlugin.ImageFileDirectory_v2()
SIGNED[339] = 2
BITS_64 = (struct.pack("<HHIH", 258, 3, 1, 32), struct.pack("<HHIH", 258, 3, 1, 64))  # an entry of a TIFF file, before and after


def big_endian(array):
    return array.astype(">u2")


SEEN = {  # file, what is seen
    "grey": (stored(GREY, "PNG"), GREY),
    "16 bits, PNG": (stored(DEEP, "PNG"), GREY),
    "16 bits, TIFF": (stored(DEEP, "TIFF"), GREY),
    "16 bits, PGM": (b"P5 6 4 65535\n" + big_endian(DEEP).tobytes(), GREY),
    "32 bits, TIFF": (stored((GREY.astype(np.int64) * (2**31 - 1) // 255).astype(np.int32), "TIFF"), GREY),
    "floats, TIFF": (stored(GREY.astype(np.float32) / 255, "TIFF"), GREY),
    "signed 8 bits, TIFF": (stored(np.rint(GREY / 255 * 127).astype(np.uint8), "TIFF", tiffinfo=SIGNED), GREY),
    "one bit": (stored(Image.fromarray(GREY > 100), "PNG"), np.where(GREY > 100, 255, 0)),
    "a palette": (stored(Image.fromarray(ON_WHITE).quantize(4), "PNG"), ON_WHITE),
    "a palette, GIF": (stored(Image.fromarray(ON_WHITE).quantize(4), "GIF"), ON_WHITE),
    "transparent": (stored(RGBA, "PNG"), ON_WHITE),
    "transparent, WebP": (stored(RGBA, "WEBP", lossless=True), ON_WHITE),
    "transparent, TIFF": (stored(RGBA, "TIFF"), ON_WHITE),
    "transparent grey": (stored(Image.fromarray(RGBA[..., [0, 3]], "LA"), "PNG"), np.where(RGBA[..., 3:] == 0, 255, 200).repeat(3, -1)),
    "a transparent colour": (stored(ON_WHITE, "PNG", transparency=(200, 10, 90)), np.full((4, 6, 3), 255)),
    "a transparent palette": (stored(Image.fromarray(RGBA).quantize(4), "PNG"), ON_WHITE),
    "transparent, 16 bits": (stored(DEEP, "PNG", transparency=int(DEEP[1, 1])), np.where(GREY == GREY[1, 1], 255, GREY)),
    "half transparent": (stored(np.full((4, 6, 4), [0, 0, 0, 51], np.uint8), "PNG"), np.full((4, 6, 3), 204)),
    "16 bits, white is zero": (stored(255 * 257 - DEEP, "TIFF", tiffinfo={262: 0}), GREY),
    "CMYK": (stored(Image.fromarray(ON_WHITE).convert("CMYK"), "TIFF"), ON_WHITE),
}


def test_deep_and_transparent_pixels_are_exact():
    ramp = np.arange(256)
    deep = media.read_image(stored((257 * ramp).astype(np.uint16).reshape(16, 16), "PNG"))
    np.testing.assert_array_equal(np.asarray(deep).reshape(-1), ramp)
    seen = media.read_image(stored(np.array([[[255, 0, 0, 0], [0, 255, 0, 128]]], np.uint8), "PNG"))
    np.testing.assert_array_equal(np.asarray(seen), [[[255, 255, 255], [127, 255, 127]]])


@pytest.mark.parametrize("name", SEEN)
def test_pictures_of_every_kind(name, tmp_path):
    content, right = SEEN[name]
    found = np.asarray(media.read_image(content))
    np.testing.assert_allclose(found if found.ndim == right.ndim else found[..., None].repeat(3, -1), right, atol=1)
    (tmp_path / "x.png").write_bytes(content)  # by a modality, and in a data set
    colour = right if right.ndim == 3 else right[..., None].repeat(3, -1)
    np.testing.assert_allclose(Images(4, 6, 3).parse(str(tmp_path / "x.png"))[0], colour / 127.5 - 1, atol=0.01)


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_upright(orientation, tmp_path):
    right = np.dstack([np.kron(GREY, np.ones((8, 8), np.uint8))] * 3)
    turn = {2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, 1),
            7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, -1)}.get(orientation, lambda x: x)  # fmt: skip
    for kind, options in (("JPEG", {"quality": 100}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = stored(np.ascontiguousarray(turn(right)), kind, exif=exif(orientation), **options)
        np.testing.assert_allclose(np.asarray(media.read_image(content)).astype(int), right, atol=4)
    folder(tmp_path, {"train/a/0.jpg": stored(np.ascontiguousarray(turn(right)), "JPEG", quality=100, exif=exif(orientation))})
    found = ImageDataset("folder", "train", tmp_path, 32).take(np.array([0]))["image"]
    np.testing.assert_allclose(found[0], right[:, 8:40] / 127.5 - 1, atol=0.05)


def test_damage_beside_the_pixels_does_no_harm():
    content = bytearray(stored(GREY, "JPEG", exif=exif(3)))
    at = content.index(b"Exif\0\0") + 6
    content[at : at + 8] = b"\xff" * 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert media.read_image(bytes(content)).size == (6, 4)


REFUSED = {
    "floats beyond 1": (stored(GREY.astype(np.float32), "TIFF"), "holds floats from 0 to 230: an image's floats must be in [0, 1]"),
    "floats below 0": (stored(GREY.astype(np.float32) / 255 - 1, "TIFF"), "holds floats from -1"),
    "floats that are none": (stored(np.full((4, 6), np.nan, np.float32), "TIFF"), "holds floats from nan"),
    "negative numbers of 8 bits": (stored(GREY, "TIFF", tiffinfo=SIGNED), "holds negative numbers (-1"),
    "64-bit floats": (stored(GREY.astype(np.float32), "TIFF").replace(*BITS_64), "it is a TIFF file of values that are not read"),
    "the beginning of a PNG": (stored(GREY, "PNG")[:12], "it begins as a PNG file and continues as none"),
    "negative numbers": (stored(GREY.astype(np.int32) - 9, "TIFF"), "holds negative numbers (-9)"),
    "cut short": (stored(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8), "PNG")[:2000], "it is damaged, copy it again"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "it is none of .png, .jpg"),
    "empty": (b"", "it is empty"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "it is none of .png"),  # Pillow would start a program
}


@pytest.mark.parametrize("name", REFUSED)
def test_pictures_that_are_refused(name, tmp_path):
    content, said = REFUSED[name]
    (tmp_path / "train/cat").mkdir(parents=True)
    path = tmp_path / "train/cat/x.png"
    path.write_bytes(content)
    for read in (Images(4, 6).parse, lambda _: ImageDataset("folder", "train", tmp_path, 8).take(np.array([0]))):
        message = refusal(read, str(path))
        assert str(path) in message and said in message, message


def test_a_sound_picture_that_is_too_large():
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 14_000, 14_000, 1, 0, 0, 0, 0)
    said = refusal(media.read_image, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "big.png")
    assert "big.png has more pixels than are read (Image size (196000000 pixels) exceeds limit of 178956970 pixels): shrink it" in said


# ------------------------------------------------------------------------------------------------------------------------ folders


def folder(path, content):
    for name, each in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(each)
    return path


PNG = stored(GREY, "PNG")
CLASSES = {"train/cat/0.png": PNG, "train/dog/1.png": PNG, "val/dog/2.png": PNG}


def labels(path, split="train"):
    source = ImageDataset("folder", split, path, 4)
    return source.names, source.take(np.arange(len(source)))["label"].tolist()


def test_hidden_and_system_files_are_left_out(tmp_path):
    before = labels(folder(tmp_path, CLASSES))
    assert before == (("cat", "dog"), [0, 1])
    for name in ("train/.ipynb_checkpoints/0.png", "train/__MACOSX/cat/._0.png", "train/._a.png", "train/Thumbs.db", "train/.DS_Store",
                 "train/cat/._0.png", "train/cat/Thumbs.db", "train/cat/.ipynb_checkpoints/0-checkpoint.png", "train/@eaDir/0.png",
                 "train/desktop.ini", "train/lost+found/x.png", "train/$RECYCLE.BIN/x.png", "train/notes.txt",
                 "train/cat/notes.txt"):  # fmt: skip
        folder(tmp_path, {name: PNG})
    assert labels(tmp_path) == before and labels(tmp_path, "val")[1] == [1]


def test_folders_in_folders_are_read(tmp_path):
    folder(tmp_path, CLASSES | {"train/cat/sub/0.png": PNG, "train/cat/sub/deep/er/0.JPG": stored(GREY, "JPEG")})
    (tmp_path / "elsewhere").mkdir()
    folder(tmp_path, {"elsewhere/a.png": PNG})
    (tmp_path / "train/cow").symlink_to(tmp_path / "elsewhere")
    assert labels(tmp_path) == (("cat", "cow", "dog"), [0, 0, 0, 1, 2])
    assert len(Images(4, 6).parse(str(tmp_path / "train/cat"))) == 3


@pytest.mark.parametrize("made, said", [
    (lambda path: (path / "train/empty").mkdir(), "the class 'empty' has no images"),
    (lambda path: (path / "val/cat").mkdir(), "the class 'cat' has no images"),
    (lambda path: folder(path, {"train/cow/notes.txt": b"moo"}), "the class 'cow' has no images"),
    (lambda path: folder(path, {"train/2.png": PNG}), "train/2.png is in no folder of a class"),
    (lambda path: folder(path, {"train/cat/0.heic": PNG}), "0.heic is a kind of image that is not read"),
    (lambda path: folder(path, {"train/cat/0.jfif": PNG}), "0.jfif is a kind of image that is not read"),
    (lambda path: folder(path, {"train/\u00e9/0.png": PNG, "train/e\u0301/0.png": PNG}), "two classes that read"),
    (lambda path: folder(path, {"train/2.avif": PNG}), "2.avif is a kind of image that is not read"),
    (lambda path: (path / "train/cow").symlink_to(path / "unmounted"), "train/cow is a symbolic link to what is not there"),
    (lambda path: (path / "train/cat/9.png").symlink_to(path / "gone.png"), "cat/9.png is a symbolic link to what is not there"),
    (lambda path: (path / "train/cat/up").symlink_to(path / "train/cat"), "cat/up is a link to a folder that it lies in"),
    (lambda path: (path / "train/circle").symlink_to(path / "train/circle"), "train/circle is a circle of symbolic links"),
])  # fmt: skip
def test_folders_that_would_shift_or_lose_something(made, said, tmp_path):
    made(folder(tmp_path, CLASSES))
    assert said in refusal(lambda: [ImageDataset("folder", split, tmp_path, 8) for split in ("train", "val")])


def test_damaged_pictures_may_be_left_out(tmp_path, caplog):
    path = folder(tmp_path, {f"train/{'ab'[i % 2]}/{i:02d}.png": stored(np.full((4, 4), i, np.uint8), "PNG") for i in range(20)})
    (path / "train/a/04.png").write_bytes(PNG[:40])
    (path / "train/b/19.png").write_bytes(b"")
    order = [f"{i:02d}" for i in (*range(0, 20, 2), *range(1, 20, 2))]
    with pytest.raises(UserError, match=r"04.png cannot be read as an image .*config.data.damaged"):
        ImageDataset("folder", "train", path, 4).take(np.arange(20))
    source = ImageDataset("folder", "train", path, 4, damaged=0.1)
    with caplog.at_level(logging.WARNING):
        found, again = (source.take(np.arange(20)) for _ in range(2))
    said = sorted(record.getMessage() for record in caplog.records)  # by two threads
    assert [message.count(name) for message, name in zip(said, ("a/04.png", "b/19.png"), strict=True)] == [1, 1]
    assert "2 of at most 2 damaged images, of 20 in all" in caplog.text
    # The next one that is sound, with its own label, and always the same.
    values, right = np.rint((found["image"][:, 0, 0, 0] + 1) * 127.5), [int(name) for name in order]
    right[2], right[19] = 6, 0
    np.testing.assert_array_equal(values, right)
    np.testing.assert_array_equal(found["label"], [i % 2 for i in right])
    np.testing.assert_array_equal(found["image"], again["image"])
    with pytest.raises(UserError, match=r"2 of 20 images are damaged, more than config.data.damaged=0.05 allows.*(04|19).png"):
        ImageDataset("folder", "train", path, 4, damaged=0.05).take(np.arange(20))
    for share in (-0.1, 1, float("nan")):
        assert "config.data.damaged is the share" in refusal(lambda share=share: ImageDataset("folder", "train", path, 4, damaged=share))


# --------------------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("content, right", [
    (b"a red\r\nsquare\n", ["a red", "square"]),
    (b"\xef\xbb\xbfa red\n", ["a red"]),
    ("a\u2028b\n\x85c\x0bd\x0ce\u2029\x1c\x1df\rg\n".encode(), ["a\u2028b", "\x85c\x0bd\x0ce\u2029\x1c\x1df\rg"]),
    (b"no end", ["no end"]), (b"", []), (b"\n\n", ["", ""]), (b"\xef\xbb\xbf", []), ("é 漢 😀\n".encode(), ["é 漢 😀"]),
])  # fmt: skip
def test_lines(content, right, tmp_path):
    (tmp_path / "x.txt").write_bytes(content)
    assert files.read_lines(tmp_path / "x.txt") == right


def test_names_come_once(tmp_path):
    (tmp_path / "x.txt").write_text(" b\n\na \n")
    assert files.read_names(tmp_path / "x.txt") == ["b", "a"]
    (tmp_path / "x.txt").write_text("b\na\n b\n")
    assert "has 'b' twice, in lines 1 and 3" in refusal(files.read_names, tmp_path / "x.txt")


NO_TEXT = {
    "UTF-16": "a dog\n".encode("utf-16"), "UTF-16 without a mark": "a dog\n".encode("utf-16-le"), "UTF-32": "a dog".encode("utf-32"),
    "Latin-1": "a caf\xe9\n".encode("latin-1"), "a surrogate": b"a \xed\xa0\x80 dog\n", "zeros": b"a\0dog\n",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_utf8(name, tmp_path):
    content = NO_TEXT[name]
    for place in ("train/0.txt", "train/0.json", "train/captions.tsv"):
        path = folder(tmp_path / place.replace("/", "_"), {"train/0.png": PNG, place: content})
        assert "UTF-8" in refusal(ImageDataset, "captioned", "train", path, 8)
    path = folder(tmp_path / "sentences", {"x.txt": content}) / "x.txt"
    assert "UTF-8" in refusal(Texts(TOKENIZER).parse, str(path))
    tar = tmp_path / "tar/train"
    tar.mkdir(parents=True)
    shard(tar / "0.tar", [("0.png", PNG), ("0.txt", content)])
    said = refusal(ImageDataset, "captioned", "train", tmp_path / "tar", 8)
    assert "UTF-8" in said and "0.png in" in said


def test_half_a_character_on_the_command_line():
    assert "half a character ('\\udcff', a lone surrogate)" in refusal(Texts(TOKENIZER).parse, "a \udcff dog")


@pytest.mark.parametrize("caption, right", [
    ("null", "has null for a caption"), ("NaN", "has a number for a caption"), ("7", "has a number"), ("true", "has true or false"),
    ("[]", "has a list without texts"), ('["a dog", null]', "has null"), ('{"en": "a dog"}', "has an object"),
    ('"\\ud800 dog"', "half a character"), ('"a\\u0000dog"', "holds a zero byte"),
    ('" "', "an empty caption"), ('["a", ""]', "an empty caption"), ('[["a dog"]]', "has a list without texts"),
    ('"a dog"', ["a dog"]), ('["a dog", " a red square "]', ["a dog", "a red square"]), ('"a\\u2028dog\\n"', ["a\u2028dog"]),
])  # fmt: skip
def test_captions_in_json(caption, right, tmp_path):
    path = folder(tmp_path, {"train/0.png": PNG, "train/0.json": b'\xef\xbb\xbf{"caption": ' + caption.encode() + b', "url": ""}'})
    tar = tmp_path / "tar/train"
    tar.mkdir(parents=True)
    shard(tar / "0.tar", [("0.png", PNG), ("0.json", (path / "train/0.json").read_bytes())])
    for place in (path, tmp_path / "tar"):
        if isinstance(right, str):
            said = refusal(ImageDataset, "captioned", "train", place, 8)
            assert right in said and "0.png" in said
        else:
            found = ImageDataset("captioned", "train", place, 4, TOKENIZER)
            assert found._records.get([0])[0]["captions"] == right
            assert found.take(np.array([0]))["text"].shape == (1, len(right), 8)


def test_as_many_captions_as_the_picture_with_the_most(tmp_path):
    content = {f"train/{i}.png": PNG for i in range(3)} | {"train/1.json": json.dumps({"caption": ["a dog", "a red square"]}).encode()}
    path = folder(tmp_path, content | {"train/0.txt": b"a dog", "train/2.json": json.dumps({"caption": ["a dog"] * 40}).encode()})
    encoder = tokenizer("captioned", path, 8, 300)
    found = ImageDataset("captioned", "train", path, 4, encoder).take(np.arange(3))["text"]
    assert found.shape == (3, captions.MOST, 8)
    assert encoder.decode(found[1]) == ["a dog", "a red square"] * (captions.MOST // 2)


@pytest.mark.parametrize("content", [
    b"{}", b"[]", b'{"rules": "{}", "length": 8, "seen": []}', b'{"rules": 3, "length": 8, "seen": []}',
    b'{"rules": "", "length": 8, "seen": [1.5]}', b'{"length": 8, "length": 9}', b"[" * 100_000, b"1" * 100_000,
])  # fmt: skip
def test_what_is_no_tokenizer(content, tmp_path):
    (tmp_path / "words.json").write_bytes(content)
    assert "words.json" in refusal(bpe.read, tmp_path / "words.json")


def test_a_tokenizer_comes_back(tmp_path):
    files.write_json(tmp_path / "words.json", dataclasses.asdict(TOKENIZER))
    assert bpe.read(tmp_path / "words.json") == TOKENIZER


# ---------------------------------------------------------------------------------------------------------------------- tar files


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("members, said", [
    ([("0.png", PNG), ("0.txt", b"a"), ("0.png", PNG)], "0.png in .*is the second of its key"),
    ([("0.png", PNG), ("0.txt", b"a"), ("0.jpg", PNG)], "0.jpg in .*is the second of its key there, after 0.png"),
    ([("0.png", PNG), ("0.txt", b"a"), ("./0.txt", b"b")], "./0.txt in .*is the second"),
    ([("0.png", PNG), ("0.txt", b"a"), ("1.png", "0.png"), ("1.txt", b"b")], "1.png in .*is a link"),
    ([("0.png", PNG), ("0.txt", b"a"), ("1.jfif", PNG), ("1.txt", b"b")], "1.jfif in .*is a kind of image that is not read"),
    ([("0.png", PNG), ("0.txt", b" \n")], "0.png in .*has an empty caption"),
])  # fmt: skip
def test_two_of_one_key(members, said, tmp_path):
    (tmp_path / "train").mkdir()
    shard(tmp_path / "train/0.tar", members)
    with pytest.raises(UserError, match=said):
        ImageDataset("captioned", "train", tmp_path, 8)


def test_two_pictures_of_one_name_beside_one_caption(tmp_path):
    path = folder(tmp_path, {"train/0.png": PNG, "train/0.jpg": stored(GREY, "JPEG"), "train/0.txt": b"a dog"})
    assert "0.png has the name of 0.jpg" in refusal(ImageDataset, "captioned", "train", path, 8)


def test_hidden_members_and_tar_files_are_left_out(tmp_path):
    (tmp_path / "train").mkdir()
    shard(tmp_path / "train/0.tar", [("._0.png", PNG), ("__MACOSX/0.png", PNG), ("0.png", PNG), ("0.txt", b"a"), ("._0.txt", b"x")])
    (tmp_path / "train/._0.tar").write_bytes(b"Mac OS X")
    assert len(ImageDataset("captioned", "train", tmp_path, 8)) == 1
    folder(tmp_path, {"train/1.png": PNG})
    assert "holds tar files and 1.png" in refusal(ImageDataset, "captioned", "train", tmp_path, 8)


# ----------------------------------------------------------------------------------------------------------------- sounds, arrays


def test_sounds_that_are_refused(tmp_path):
    audio = np.sin(np.arange(44_100) / 20).astype(np.float32) / 2
    for bad in (np.nan, np.inf, 9.0):
        audio[30_000] = bad
        soundfile.write(tmp_path / "x.wav", audio, 22_050, "FLOAT")
        for read in (Waveforms(1000).parse, aist.read_wav):
            said = refusal(read, str(tmp_path / "x.wav"))
            why = "samples up to 9" if bad == 9 else "1 samples that are not finite, the first at 1.361 s"
            assert "x.wav" in said and why in said
    audio[30_000] = 0
    soundfile.write(tmp_path / "x.wav", audio, 1)
    assert "says that it has 1 samples a second" in refusal(Waveforms(1000).parse, str(tmp_path / "x.wav"))
    soundfile.write(tmp_path / "x.wav", audio, 22_050)
    os.truncate(tmp_path / "x.wav", 30_000)
    assert "is cut short: it has 30,000 of its 88,244 bytes" in refusal(Waveforms(1000).parse, str(tmp_path / "x.wav"))
    soundfile.write(tmp_path / "x.wav", audio[:0], 22_050)
    assert "no samples" in refusal(Waveforms(1000).parse, str(tmp_path / "x.wav"))


def test_silence_stays_silence():
    rng = np.random.default_rng(0)
    for step in (0, 1, 4, 30):
        dither = rng.integers(-step, step + 1, 44_100).astype(np.float32) / 32_768
        np.testing.assert_array_equal(aist._loud(dither), dither[:44_032])
    assert abs(np.abs(aist._loud(dither * 100)).max() - aist.LOUD) < 1e-6


def header(shape, kind="<f4"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def zipped(*entries):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of one name
        for name, content in entries:
            file.writestr(name, content)
    return stream.getvalue()


class Evil:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def doubled(count):
    found = (1.0,)
    for _ in range(count):
        found = (found, found)
    return found


ARRAYS = {
    "terabytes": (header((10**6, 10**6)), "says that it holds 4,000,000,000,000 bytes and has 128"),
    "more than 64 bits": (header((10**12, 10**12)), "says that it holds"),
    "cut short": (npy(np.zeros((9, 9)))[:500], "says that it holds 648 bytes and has 500"),
    "a negative length": (header((-1, 4)) + bytes(64), "says that it holds -16 bytes"),
    "objects": (npy(np.array([Evil(), None], dtype=object)), "it holds Python objects"),
    "objects in an archive": (zipped(("image.npy", npy(np.array([Evil()], dtype=object)))), "it holds Python objects"),
    "a pickle": (pickle.dumps(Evil()), "is not a NumPy file that can be read"),
    "terabytes in an archive": (zipped(("image.npy", header((10**6, 10**6)))), "says that it holds 4,000,000,000,000 bytes"),
    "two entries of one name": (zipped(("image.npy", npy(GREY)), ("image.npy", npy(GREY))), "two entries of one name"),
    "no entry": (zipped(), "has no entry 'image': it holds nothing"),
    "another entry": (zipped(("a.npy", npy(GREY)), ("b.npy", npy(GREY))), "has no entry 'image': it holds a, b"),
    "no array in an archive": (zipped(("image.npy", b"text")), "is not a NumPy file that can be read"),
    "empty": (b"", "is not a NumPy file that can be read"),
    "a nested header": (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"[" * 9000, "is not a NumPy file that can be read"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, said = ARRAYS[name]
    for path in ("x.npy", "x.npz"):
        (tmp_path / path).write_bytes(content)
        message = refusal(arrays.read_array, tmp_path / path, "image")
        assert path in message and said in message, message
        refusal(Images(4, 6).parse, str(tmp_path / path))
        refusal(arrays.read_array, tmp_path / path, "image", True)
    assert not (tmp_path / "executed").exists()


def test_arrays_that_are_read(tmp_path):
    for array in (GREY, np.asfortranarray(GREY), np.float16(3), np.zeros((0, 4)), np.array(["a"]), GREY.astype(">f8"), GREY > 9):
        np.save(tmp_path / "x.npy", array)
        np.savez_compressed(tmp_path / "x.npz", only=array)
        for name in ("x.npy", "x.npz"):
            found = arrays.read_array(tmp_path / name, "image")
            np.testing.assert_array_equal(found, array)
            assert found.dtype == np.asarray(array).dtype


@pytest.mark.parametrize("content", [
    pickle.dumps(Evil()), pickle.dumps({"smpl_poses": Evil()}), pickle.dumps([[]] * 5),
    b"\x80\x04}" + pickle.dumps(doubled(60))[2:-1] + b"K\x01s.",
    pickle.dumps({"smpl_poses": doubled(60)}), pickle.dumps({i: i for i in range(10**5)}), b"", b"\x80\x04", pickle.dumps(np.zeros(3))[:-9],
    b"cos\nmkdir\n(S'executed'\ntR.", b"(dp0\n" * 1000,
])  # fmt: skip
def test_pickles_that_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(content)
    assert "x.pkl" in refusal(aist.read_motion, tmp_path / "x.pkl")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_arrays(protocol, tmp_path):
    content = {"a": GREY, "b": np.float32(3), "c": 2, "d": [1, 2], "e": np.asfortranarray(GREY)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    found = arrays.read_pickled_arrays(tmp_path / "x.pkl")
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": GREY.tolist(), "b": 3, "c": 2, "e": GREY.tolist()}  # fmt: skip


def test_a_file_that_several_write_at_once_is_of_one_of_them_and_whole(tmp_path):
    path, gate, failed = tmp_path / "note.json", threading.Barrier(4), []

    def write(name):
        gate.wait()
        try:
            for _ in range(50):
                files.write_whole(path, name * 10_000)
        except OSError as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=[name]) for name in "abcd"]
    [writer.start() for writer in writers]
    [writer.join() for writer in writers]
    assert not failed and path.read_text() in [name * 10_000 for name in "abcd"] and os.listdir(tmp_path) == ["note.json"]
    with pytest.raises(OSError):
        files.write_whole(tmp_path / "note.json/below", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # a folder is not replaced, and nothing stays behind
        files.write_whole(tmp_path / "folder", "")
    assert sorted(os.listdir(tmp_path)) == ["folder", "note.json"]
