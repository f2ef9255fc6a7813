"""Small networks with random weights in the layouts in which they are published."""

import jax

from mmdiff.convert import state_dicts
from mmdiff.convert.weight_writer import write_weights
from mmdiff.encoders.autoencoder_kl import AutoencoderKL
from mmdiff.encoders.clip import CLIPText
from mmdiff.encoders.clip_tokenizer import read_clip_tokenizer

LEVELS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4}
KL = {"block_out_channels": [4, 4], "latent_channels": 4, "scaling_factor": 0.5, "shift_factor": 0.25, **LEVELS}

DINO = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "mlp_ratio": 1}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    "projection_dim": 12}


def publish(folder, net, seed=0):
    """-> (folder, network, parameters)."""
    params = jax.jit(net.init)(jax.random.key(seed), *net.example_inputs())["params"]
    write_weights(folder, state_dicts.state_dict(params), net.config())
    return folder, net, params


def autoencoder(folder, seed=0):
    """An autoencoder whose latents have half the side of its images: (z - 1/4) / 2."""
    return publish(folder, AutoencoderKL.from_config(KL), seed)


def clip_text(folder, width):
    """A text tower that spells texts byte by byte, with its tokenizer; -> (folder, network, parameters, tokenizer)."""
    bytes_alone = folder.parent / "bytes.txt"
    bytes_alone.write_text("#version: 0.2\n")
    tokenizer = read_clip_tokenizer(bytes_alone)
    net = CLIPText(
        vocab_size=tokenizer.size, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=tokenizer.end, projection_dim=width)
    folder, net, params = publish(folder, net)
    (folder / "tokenizer.json").write_text(tokenizer.rules)
    return folder, net, params, tokenizer
