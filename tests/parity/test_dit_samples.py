"""What DiT and SiT sample of the same noise, beside the original's modules and plain loops of their samplers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import real_weights
import torch
from originals import dit as original

from mmdiff import config as configs
from mmdiff import sampling
from mmdiff.convert import layouts
from mmdiff.convert.kinds import KINDS
from mmdiff.convert.tensors import Tensor
from mmdiff.convert.weight_files import open_weights
from mmdiff.nets.dit import SIZES
from mmdiff.processes import Joint

LABELS, GUIDANCE, STEPS = np.array([207, 360]), 4.0, 10


def guided(model, x, t, labels):
    """The original's output, guidance on three channels of the four, and of eight the first half."""
    both = torch.cat([torch.tensor(labels), torch.full((len(labels),), 1000)])
    with torch.no_grad():
        out = model(torch.cat([x, x]), torch.full((len(both),), float(t)), both)[:, :4]
    with_label, without = out.chunk(2)
    return torch.cat([without[:, :3] + GUIDANCE * (with_label - without)[:, :3], with_label[:, 3:]], 1)


def ddim(model, x, labels):
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    steps = [round(1000 * t) - 1 for t in sampling.spaced_grid(STEPS, 1000).tolist()]
    for step, after in zip(steps[:-1], steps[1:]):
        eps = guided(model, x, step, labels)
        now, then = kept[step], kept[after] if after >= 0 else torch.ones(())
        clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = (then.sqrt() * clean + (1 - then).sqrt() * eps).float()
    return x


def heun(model, x, labels):
    """From noise at 0 to data at 1; the last step is Euler's, as that of `Process.heun`."""
    for i in range(STEPS):
        t, size = i / STEPS, 1 / STEPS
        velocity = guided(model, x, t, labels)
        if i < STEPS - 1:
            velocity = (velocity + guided(model, x + size * velocity, t + size, labels)) / 2
        x = x + size * velocity
    return x


def samples(kind, options, weights, noise):
    """Ours, by the shipped config; of DiT with the deterministic sampler."""
    values, module = configs.load(f"imagenet256/{kind}_xl2", options)
    experiment = configs.build(values, module)
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))["params"]
    params = {"params": layouts.load(KINDS[kind].layout, experiment.net, shapes, weights, "it")}
    parts = experiment.process.parts
    process = Joint(**{**parts, "image": dataclasses.replace(parts["image"], eta=0.0)})
    apply = sampling.guided(experiment.apply, GUIDANCE, ("label",), process, channels={"image": 3})
    grid = sampling.spaced_grid(STEPS, 1000) if kind == "dit" else sampling.uniform_grid(STEPS)
    start = {"image": jnp.asarray(noise.transpose(0, 2, 3, 1))}
    keys, labels = jax.random.split(jax.random.key(0), len(LABELS)), jnp.asarray(LABELS, jnp.int32)

    @jax.jit
    def run(params, start, labels):
        return sampling.sample(
            process, apply, params, keys, grid, experiment.shape, given={"label": labels}, heun=kind == "sit", start=start)["image"]

    return np.asarray(run(params, start, labels)).transpose(0, 3, 1, 2)


def compare(kind, options, model, weights, tolerance):
    noise = published.normal("noise", (len(LABELS), 4, model.side, model.side))
    expected = {"dit": ddim, "sit": heun}[kind](model, torch.from_numpy(noise), LABELS).numpy()
    published.assert_close(samples(kind, options, weights, noise), expected, tolerance)


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_samples_of_random_weights(kind, monkeypatch):
    monkeypatch.setitem(SIZES, "XS", (2, 32, 4))
    model = original.DiT(8, 2, 4, 32, 2, 4, 1000)
    positions = model.pos_embed.clone()
    published.torch_model(model)
    model.pos_embed.data, model.side = positions, 8
    weights = {key: Tensor.of(tensor.numpy()) for key, tensor in model.state_dict().items()}
    options = [("model.size", "XS"), ("model.image", "8"), ("model.dtype", "float32")]
    compare(kind, options, model, weights, 1e-4)


@pytest.mark.parametrize("kind, name", [("dit", "DiT-XL-2-256x256.pt"), ("sit", "SiT-XL-2-256x256.pt")])
def test_samples_of_the_published_weights(kind, name):
    weights = open_weights(real_weights.find(name))
    model = original.DiT().eval()
    model.load_state_dict({key: torch.from_numpy(tensor.read()) for key, tensor in weights.items()})
    model.side = 32
    compare(kind, [("model.dtype", "float32")], model, weights, 1e-3)
