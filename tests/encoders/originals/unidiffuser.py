"""UniDiffuser's network as diffusers has it."""

import diffusers
import numpy as np
import published
import torch

from mmdiff.convert import unidiffuser as layout

STEPS = {"image": (1000, 250, 0), "text": (37, 1000, 400)}


def _model(net):
    """diffusers' model of a network's sizes."""
    config = layout.diffusers_config(net, {})
    return published.torch_model(diffusers.UniDiffuserModel(**{key: value for key, value in config.items() if key[0] != "_"}))


def _answers(model, net, data_type=1):
    """What it makes of the inputs that belong to the modalities' names, at STEPS: in the order in which it returns them."""
    image, vision, text = net.image, net.vision, net.text
    shapes = {"image": (3, image.channels, image.height, image.width), "vision": (3, 1, vision.size), "text": (3, text.length, text.size)}
    x = {name: torch.from_numpy(published.normal(name, shape)).to(model.dtype) for name, shape in shapes.items()}
    times = [torch.tensor(STEPS[name]).float() for name in ("image", "text")]
    with torch.no_grad():
        found = model(x["image"], x["vision"], x["text"], *times, torch.tensor([data_type]))
    return dict(zip(shapes, map(np.asarray, found)))


def unidiffuser():
    """Predictions in double precision, but for the features of times; with the second kind of data."""
    from mmdiff import nets

    net = nets.UViT(nets.Patches(8, 8, 4, 2), nets.Vectors(6), nets.Vectors(5, 7), data_types=2, depth=4, width=32, heads=4)
    model = _model(net).double()
    shapes = {key: " ".join(map(str, tensor.shape)) for key, tensor in model.state_dict().items()}
    return {"keys": list(shapes), "shapes": list(shapes.values())} | _answers(model, net)
