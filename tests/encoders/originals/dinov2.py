"""DINOv2 as transformers has it; facebookresearch's resampling of positions, with PyTorch's interpolation."""

import published
import torch
import transformers


def _dino(**changes):
    return published.torch_model(transformers.Dinov2Model(transformers.Dinov2Config(**published.SMALL["dino"] | changes)))


def _dinoreg(**changes):
    config = transformers.Dinov2WithRegistersConfig(**published.SMALL["dinoreg"] | changes)
    return published.torch_model(transformers.Dinov2WithRegistersModel(config))


def _tokens(model, name):
    """The last states of all tokens: at the size of training, and at another one."""
    with torch.no_grad():
        return {
            f"{height}x{width}": model(torch.from_numpy(published.normal(name, (2, 3, height, width)))).last_hidden_state.numpy()
            for height, width in ((32, 32), (48, 40))}  # fmt: skip


def dino():
    return _tokens(_dino(), "dino")


def dinoreg():
    return _tokens(_dinoreg(), "dinoreg")


def dino_positions():
    """A table of 7 x 7 positions for grids that are larger and smaller."""
    table = torch.from_numpy(published.normal("dino_positions", (7, 7, 4))).permute(2, 0, 1)[None]
    found = {}
    for height, width in ((9, 8), (4, 5), (7, 3)):
        for name, options in {
            "bicubic": {"size": (height, width)}, "antialiased": {"size": (height, width), "antialias": True},
            "bicubic_offset": {"scale_factor": ((height + 0.1) / 7, (width + 0.1) / 7)},
        }.items():  # fmt: skip
            resampled = torch.nn.functional.interpolate(table, mode="bicubic", align_corners=False, **options)
            found[f"{name} {height}x{width}"] = resampled[0].permute(1, 2, 0).numpy()
    return found
