"""A photograph as diffusers reconstructs it: by random weights of a small autoencoder, and by Stable Diffusion's real ones, where they are
(see tests/encoders/real_weights.py)."""

import dataclasses

import diffusers
import jax
import numpy as np
import published
import real_weights
import torch
from sklearn.datasets import load_sample_image

from mmdiff.encoders import open_encoder, preprocessing


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


def test_a_photograph_by_a_random_autoencoder(tmp_path):
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
