"""Images as published networks take them: resized, cropped, with the range, mean and standard deviation of their training, as data.

    uint8 RGB [H, W, 3] of any size -> resize and centre crop -> (x / divisor - mean) / std, float32 [size, size, 3]

Resizing is Pillow's, which is what the networks were trained with: 8 bits between its two passes, and a kernel that widens as images shrink
("antialias"). The exception is Inception, whose graph resizes by TensorFlow 1's bilinear interpolation (`resize_tf1`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdiff.errors import UserError

KERNELS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers, which published files have
RESIZE = ("shortest", "square", "central", "adm", "exact")
LONGEST = 200  # times the shorter side: a wider image would be resized to gigabytes before it is cropped


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What becomes of an image before a network sees it.

    Attributes:
      size: height and width of the result.
      resize: "shortest": the shorter side becomes `shortest`, then the centre is cropped. "square": both sides become `size`, whatever the
        image's proportions. "central": the central square, resized. "adm": halved by box filters while the shorter side is at least
        2 size, then resized and cropped (ADM, DiT, SiT and LightningDiT train this way). "exact": the image has its size already.
      kernel: one of Pillow's, or "tf1", TensorFlow 1's bilinear interpolation (with "square" only).
      shortest: the shorter side before the crop; 0 for `size`.
      crop: where a crop of n rows begins: "floor" (n - size) // 2 as in transformers, "round" round((n - size) / 2) as in torchvision.
      divisor, mean, std: numbers, or one for each channel: (x / divisor - mean) / std.

    >>> image = np.full((4, 6, 3), 255, np.uint8)
    >>> SIGLIP(image).shape, float(SIGLIP(image).max())
    ((224, 224, 3), 1.0)

    Raises:
      UserError: fields that are none of these.
    """

    size: int
    resize: str = "shortest"
    kernel: str = "bicubic"
    shortest: int = 0
    crop: str = "floor"
    divisor: float = 255.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0

    def __post_init__(self):
        for name, allowed in dict(resize=RESIZE, kernel=(*KERNELS, "tf1"), crop=("floor", "round")).items():
            if getattr(self, name) not in allowed:
                raise UserError(f"preprocessing: {name}={getattr(self, name)!r} must be one of {', '.join(allowed)}.")
        if self.kernel == "tf1" and self.resize != "square":
            raise UserError(f"preprocessing: kernel='tf1' interpolates whole images: give resize='square', not {self.resize!r}.")
        if self.size < 1 or self.shortest and self.shortest < self.size:
            raise UserError(f"preprocessing: a crop of {self.size} does not fit into images with a shorter side of {self.shortest}.")
        for name in ("divisor", "mean", "std"):
            value = np.asarray(getattr(self, name), np.float64)
            if value.shape not in ((), (3,)) or not np.isfinite(value).all() or name != "mean" and not (value > 0).all():
                what = "numbers" if name == "mean" else "numbers above 0"
                raise UserError(f"preprocessing: {name}={getattr(self, name)} must be {what}, one or three.")

    def __call__(self, image: Any) -> np.ndarray:
        """float32 [size, size, 3] of an image uint8 [H, W, 3] or of Pillow's."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: Any) -> np.ndarray:
        """The resized image in values 0..255, uint8 (float32 by "tf1"): what a cache or a metric of images stores."""
        from PIL import Image

        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise UserError(f"preprocessing takes images uint8 [H, W, 3], not {image.dtype} {list(image.shape)}.")
            image = Image.fromarray(image)
        image = image.convert("RGB")
        return resize_tf1(np.asarray(image), self.size) if self.kernel == "tf1" else np.asarray(self.resized(image))

    def normalize(self, pixels: Any) -> Any:
        """(x / divisor - mean) / std of values 0..255 [..., 3], NumPy's or jax's: float32."""
        divisor, mean, std = (np.asarray(value, np.float32) for value in (self.divisor, self.mean, self.std))
        return (pixels.astype(np.float32) / divisor - mean) / std

    def resized(self, image: Any) -> Any:
        """A Pillow image of any mode, resized and cropped by one of Pillow's kernels."""
        size, (width, height) = self.size, image.size
        if self.resize == "exact":
            if (width, height) != (size, size):
                raise UserError(f"an image has {height} x {width} pixels where {size} x {size} are taken as they are: resize it before.")
            return image
        kernel, side = KERNELS.index(self.kernel), min(width, height)
        if self.resize == "square":
            return image.resize((size, size), kernel)
        if self.resize == "central":
            left, top = (width - side) // 2, (height - side) // 2
            return image.resize((size, size), kernel, (left, top, left + side, top + side))
        if max(width, height) > LONGEST * min(width, height):
            raise UserError(f"an image of {height} x {width} pixels is too narrow to crop a square of it.")
        if self.resize == "adm":
            while min(image.size) >= 2 * size:
                image = image.resize((image.width // 2, image.height // 2), KERNELS.index("box"))
            scale = size / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), kernel)
        else:
            short = self.shortest or size
            longer = int(short * max(width, height) / side)
            image = image.resize((short, longer) if width <= height else (longer, short), kernel)
        spare = (image.width - size, image.height - size)
        left, top = (n // 2 if self.crop == "floor" else round(n / 2) for n in spare)
        return image.crop((left, top, left + size, top + size))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """That of a published preprocessor_config.json (transformers' CLIP, SigLIP, BiT and ViT image processors).

        >>> Preprocessing.from_config({"size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3, "image_mean": [0.5] * 3}).shortest
        256

        Raises:
          UserError: sizes that are not square, or values of another kind than these processors have.
        """
        try:
            given, crop = config.get("size", 224), config.get("crop_size", 224)
            given = {"shortest_edge": given} if isinstance(given, int) and config.get("do_center_crop", True) else given
            given = {"height": given, "width": given} if isinstance(given, int) else given
            crop = crop if isinstance(crop, Mapping) else {"height": crop, "width": crop}
            shortest = given.get("shortest_edge", 0) if config.get("do_resize", True) else 0
            sides = crop if shortest else given
            if sides["height"] != sides["width"]:
                raise UserError(f"preprocessor_config.json: {sides['height']} x {sides['width']} images, only square ones are supported.")
            size = int(sides["height"])
            resize = "exact" if not config.get("do_resize", True) else "shortest" if shortest else "square"
            normalized = config.get("do_normalize", True)
            mean, std = (tuple(map(float, config[f"image_{name}"])) if normalized and f"image_{name}" in config else default
                         for name, default in (("mean", 0.0), ("std", 1.0)))  # fmt: skip
            divisor = round(1 / config.get("rescale_factor", 1 / 255), 6) if config.get("do_rescale", True) else 1.0
            kernel = dict(enumerate(KERNELS))[config.get("resample", 3)]
            return cls(size, resize, kernel, 0 if shortest == size else shortest, "floor", divisor, mean, std)
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise UserError(f"preprocessor_config.json is of no known kind ({type(error).__name__}: {error}).") from error

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> Preprocessing:
        """That of an open_clip_config.json, whose crop is torchvision's.

        Raises:
          UserError: another one than open_clip writes.
        """
        try:
            stated = dict(CLIP_STATISTICS) | config.get("preprocess_cfg", {})
            resize = {"shortest": "shortest", "squash": "square"}[stated.get("resize_mode", "shortest")]
            size = config["model_cfg"]["vision_cfg"].get("image_size", 224)
            mean, std = (tuple(map(float, stated[name])) for name in ("mean", "std"))
            return cls(size, resize, stated.get("interpolation", "bicubic"), crop="round", mean=mean, std=std)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"open_clip_config.json states no preprocessing that is known ({type(error).__name__}: {error}).") from error


def resize_tf1(images: Any, size: int) -> Any:
    """Images [..., H, W, C], NumPy's or jax's, by the bilinear interpolation of TensorFlow 1: float32 [..., size, size, C].

    Row o lies at o H / size, without the half-pixel shift of later versions, between the rows floor and floor + 1 (at most the last);
    nothing is smoothed where images shrink.
    """
    images = images.astype(np.float32)

    def between(length):
        at = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = at.astype(np.int32)
        return low, np.minimum(low + 1, length - 1), (at - low.astype(np.float32))[:, None]

    low, high, share = between(images.shape[-2])
    images = images[..., low, :] + (images[..., high, :] - images[..., low, :]) * share
    low, high, share = between(images.shape[-3])
    return images[..., low, :, :] + (images[..., high, :, :] - images[..., low, :, :]) * share[..., None]


CLIP_STATISTICS = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
IMAGENET_STATISTICS = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

CLIP = Preprocessing(224, **CLIP_STATISTICS)
OPEN_CLIP = dataclasses.replace(CLIP, crop="round")
SIGLIP = Preprocessing(224, "square", mean=0.5, std=0.5)
DINOV2 = Preprocessing(224, shortest=256, **IMAGENET_STATISTICS)
EFFICIENTNET_LITE0 = Preprocessing(224, divisor=1.0, mean=127.0, std=128.0)
AUTOENCODER = Preprocessing(256, "adm", divisor=127.5, mean=1.0)  # KL and VQ: x / 127.5 - 1
INCEPTION = Preprocessing(299, "square", "tf1", divisor=1.0, mean=128.0, std=128.0)
