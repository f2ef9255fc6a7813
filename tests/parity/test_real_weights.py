"""Stable Diffusion's autoencoder and DiT-XL/2 with their real weights, where they are (see tests/encoders/real_weights.py): the original's
photograph and the original's sample. The same comparisons run with random weights of smaller networks, for they need no files."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import published
import real_weights
import torch
from originals import dit as originals
from sklearn.datasets import load_sample_image

from mmdiff import config as configs
from mmdiff import sampling
from mmdiff.convert import layouts
from mmdiff.convert.kinds import KINDS
from mmdiff.convert.weight_files import open_weights
from mmdiff.encoders import open_encoder, preprocessing
from mmdiff.processes import Joint

STEPS, CHAIN, GUIDANCE, CLASS = 10, 1000, 4.0, 207


def reconstructions(folder, size):
    """PSNR in decibels of a photograph [size, size, 3] as we and as diffusers reconstruct it by the autoencoder of a folder; difference."""
    image = dataclasses.replace(preprocessing.AUTOENCODER, size=size)(load_sample_image("china.jpg"))[None]
    encoder = open_encoder("autoencoder_kl", folder)
    ours = np.asarray(jax.jit(encoder.net.apply)({"params": encoder.params}, image))
    original = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    with torch.no_grad():
        latents = original.encode(torch.from_numpy(image.transpose(0, 3, 1, 2))).latent_dist.mode()
        theirs = original.decode(latents).sample.numpy().transpose(0, 2, 3, 1)

    def psnr(found):
        found, image8 = (np.clip(127.5 * x + 127.5, 0, 255).round() for x in (found, image))
        return 10 * np.log10(255**2 / np.square(found - image8).mean())

    return psnr(ours), psnr(theirs), np.abs(ours - theirs).max() / max(1, np.abs(theirs).max())


def our_sample(path, noise, overrides):
    """DDIM's sample of a class, guided, from noise [1, h, w, 4], by the shipped config and published weights."""
    values, module = configs.load("imagenet256/dit_xl2", [("model.dtype", "float32"), *overrides])
    experiment = configs.build(values, module)
    abstract = jax.eval_shape(experiment.init, jax.random.key(0))
    params = layouts.load(KINDS["dit"].layout, experiment.net, abstract["params"], open_weights(path), str(path))
    parts = experiment.process.parts
    process = Joint(parts | {"image": dataclasses.replace(parts["image"], eta=0.0)})
    guided = sampling.guided(experiment.apply, GUIDANCE, ("label",), process, {"image": 3})
    shape = {"image": noise.shape[1:], "label": ()}

    @jax.jit
    def sample(params, noise):
        keys, grid = jax.random.split(jax.random.key(0), 1), sampling.spaced_grid(STEPS, CHAIN)
        return sampling.sample(
            process, guided, params, keys, grid, shape, given={"label": jnp.array([CLASS])}, start={"image": noise})["image"]

    return np.asarray(sample({"params": params}, noise))


def original_sample(path, noise, **sizes):
    """The same by the original's modules: 10 of the 1,000 steps, guidance on the first three channels."""
    model = originals.DiT(**sizes)
    model.load_state_dict(torch.load(path, weights_only=True))
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, CHAIN))
    steps = [round(i * (CHAIN - 1) / (STEPS - 1)) for i in reversed(range(STEPS))]
    x, labels = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), torch.tensor([CLASS, 1000])
    for step, later in zip(steps, [*steps[1:], None]):
        with torch.no_grad():
            with_label, without = model(torch.cat([x, x]), torch.full((2,), float(step)), labels).chunk(2)
        eps = with_label[:, :4].clone()
        eps[:, :3] = without[:, :3] + GUIDANCE * (with_label[:, :3] - without[:, :3])
        x0 = (x - (1 - alphas[step]) ** 0.5 * eps) / alphas[step] ** 0.5
        after = 1.0 if later is None else alphas[later]
        x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
    return x.numpy().transpose(0, 2, 3, 1)


def test_a_photograph_by_a_random_autoencoder(tmp_path):
    torch.manual_seed(0)
    levels = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 2, "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    published.torch_model(diffusers.AutoencoderKL(**levels, **blocks)).save_pretrained(tmp_path)
    ours, theirs, difference = reconstructions(tmp_path, 64)
    print(ours, theirs, difference)
    assert abs(ours - theirs) < 0.01 and difference < 2e-5


def test_a_photograph_by_the_real_autoencoder():
    ours, theirs, difference = reconstructions(real_weights.find("sd-vae"), 256)
    print(ours, theirs, difference)
    assert theirs > 20 and abs(ours - theirs) < 0.01 and difference < 2e-4


def test_a_sample_by_a_random_dit(tmp_path):
    sizes = {"input_size": 8, "hidden_size": 384, "depth": 12, "num_heads": 6}
    model = originals.DiT(**sizes)
    positions = model.pos_embed.clone()
    published.torch_model(model).pos_embed.data = positions
    torch.save(model.state_dict(), tmp_path / "DiT-S-2.pt")
    noise = published.normal("noise", (1, 8, 8, 4))
    found = our_sample(tmp_path / "DiT-S-2.pt", noise, [("model.size", "S"), ("model.image", "8")])
    expected = original_sample(tmp_path / "DiT-S-2.pt", noise, **sizes)
    print(np.abs(found - expected).max(), np.abs(expected).max())
    published.assert_close(found, expected, 1e-4)


def test_the_first_sample_by_the_real_dit():
    path = real_weights.find("DiT-XL-2-256x256.pt")
    noise = published.normal("noise", (1, 32, 32, 4))
    found, expected = our_sample(path, noise, []), original_sample(path, noise)
    print(np.abs(found - expected).max(), np.abs(expected).max())
    published.assert_close(found, expected, 1e-3)
