"""Image processors of transformers, torchvision and torch-fidelity; ADM's crop after its paper's code."""

import numpy as np
from PIL import Image

SIZES = ((37, 53), (61, 20), (20, 21), (16, 16), (8, 9), (5, 7))


def _image(height, width):
    return (np.random.RandomState(height).random_sample((height, width, 3)) * 256).astype(np.uint8)


def _processors(size, shortest):
    """transformers' image processors by name."""
    from transformers import BitImageProcessor, CLIPImageProcessor, SiglipImageProcessor

    imagenet = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    return {
        "CLIP": CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size),
        "SIGLIP": SiglipImageProcessor(size={"height": size, "width": size}, resample=3),
        "DINOV2": BitImageProcessor(size={"shortest_edge": shortest}, crop_size=size, resample=3, **imagenet),
    }


def _originals(size, shortest):
    """name -> function of an image uint8 [H, W, 3] that gives float [size, size, 3]."""
    import torch
    import torchvision.transforms as T
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as tf1

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    open_clip = T.Compose([T.Resize(size, T.InterpolationMode.BICUBIC), T.CenterCrop(size), T.ToTensor(), T.Normalize(mean, std)])

    def inception(image):
        channels = torch.from_numpy(image.copy()).float().permute(2, 0, 1)[None]
        return ((tf1(channels, size=(size, size), align_corners=False) - 128) / 128)[0].permute(1, 2, 0).numpy()

    def processed(processor):
        return lambda image: np.asarray(processor(Image.fromarray(image)).pixel_values[0]).transpose(1, 2, 0)

    return {
        **{name: processed(processor) for name, processor in _processors(size, shortest).items()},
        "INCEPTION": inception,
        "OPEN_CLIP": lambda image: open_clip(Image.fromarray(image)).permute(1, 2, 0).numpy(),
        "AUTOENCODER": lambda image: _adm(Image.fromarray(image), size) / np.float32(127.5) - 1,
    }  # fmt: skip


def _adm(image, size):
    """The crop of ADM's training data, as its code describes it."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    pixels = np.array(image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].astype(np.float32)


def preprocessing():
    originals = _originals(8, 10)
    return {f"{name}_{height}x{width}": original(_image(height, width)) for name, original in originals.items() for height, width in SIZES}
