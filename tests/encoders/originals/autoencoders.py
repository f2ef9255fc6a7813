"""Golden files of the convolutional autoencoders: diffusers', and the original implementations of taming's VQGAN and of LlamaGen."""

import contextlib
import io

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from published import normal, torch_model
from torch.nn import functional

LEVELS = dict(
    block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2, norm_num_groups=4, sample_size=32)  # fmt: skip


def _with_weights(net):
    """A network in evaluation mode with the weights that belong to its keys."""
    return torch_model(net).requires_grad_(False)


def _images(name, *shape):
    return torch.tensor(normal(name, shape))


def _arrays(**found):
    """Images and latents [B, H, W, C], as JAX has them."""
    return {name: (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).contiguous().numpy() for name, x in found.items()}


def _kl(name, shape, tiling=False, **options):
    net = _with_weights(AutoencoderKL(**{**LEVELS, **options}))
    if tiling:
        net.enable_tiling()
    moments = net.encode(_images(name, *shape)).latent_dist
    return _arrays(moments=moments.parameters, images=net.decode(moments.mean).sample)


def kl4():
    return _kl("kl4", (2, 3, 40, 24))


def kl16():
    return _kl("kl16", (1, 3, 44, 27), latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)


def kl4tiled():
    levels = dict(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return _kl("kl4tiled", (1, 3, 44, 30), tiling=True, **levels, layers_per_block=1, sample_size=16)


def taesd():
    net = _with_weights(AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4))
    latents = net.encode(_images("taesd", 1, 3, 44, 27)).latents
    return _arrays(latents=latents, images=net.decode(latents).sample)


def vq():
    net = _with_weights(VQModel(num_vq_embeddings=64, latent_channels=4, **LEVELS))
    latents = net.encode(_images("vq", 2, 3, 40, 24)).latents
    codes = net.quantize(latents)[2][2].reshape(latents.shape[0], *latents.shape[2:])
    return _arrays(latents=latents, codes=codes, images=net.decode(latents).sample)


def kl_float64():
    net = _with_weights(AutoencoderKL(**LEVELS)).double()
    moments = net.encode(_images("kl_float64", 1, 3, 17, 24).double()).latent_dist
    return _arrays(moments=moments.parameters, images=net.decode(moments.mean).sample)


def vq_float64():
    net = _with_weights(VQModel(num_vq_embeddings=64, latent_channels=4, **LEVELS)).double()
    latents = net.encode(_images("vq_float64", 1, 3, 17, 24).double()).latents
    codes = net.quantize(latents)[2][2].reshape(latents.shape[0], *latents.shape[2:])
    return _arrays(latents=latents, codes=codes, images=net.decode(latents).sample)


OPTIONS = dict(ch=32, out_ch=3, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=[16], in_channels=3, resolution=256)


def _taming(z_channels, double_z, codes=0):
    """The modules of taming's VQGAN and of latent diffusion's autoencoder, which are the same."""
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import VectorQuantizer

    net = torch.nn.Module()
    with contextlib.redirect_stdout(io.StringIO()):
        net.encoder = Encoder(**OPTIONS, z_channels=z_channels, double_z=double_z)
        net.decoder = Decoder(**OPTIONS, z_channels=z_channels)
    channels = z_channels * (1 + double_z)
    net.quant_conv = torch.nn.Conv2d(channels, channels, 1)
    net.post_quant_conv = torch.nn.Conv2d(z_channels, z_channels, 1)
    if codes:
        net.quantize = VectorQuantizer(codes, z_channels, beta=0.25)
    return _with_weights(net)


def taming():
    net = _taming(32, False, codes=64)
    latents = net.quant_conv(net.encoder(_images("taming", 2, 3, 32, 48)))
    vectors, _, (_, _, codes) = net.quantize(latents)
    images = net.decoder(net.post_quant_conv(vectors))
    return _arrays(latents=latents, codes=codes.reshape(latents.shape[0], *latents.shape[2:]), images=images)


def vavae():
    net = _taming(4, True)
    moments = net.quant_conv(net.encoder(_images("vavae", 1, 3, 48, 32)))
    return _arrays(moments=moments, images=net.decoder(net.post_quant_conv(moments.chunk(2, dim=1)[0])))


class _LlamaGen(torch.nn.Module):
    """LlamaGen's tokenizer: taming's residual blocks and attention in lists of its own, normalised codes."""

    def __init__(self, channels=32, factors=(1, 1, 2, 2, 4), latent=32, width=4, codes=64):
        from taming.modules.diffusionmodules import model as taming

        super().__init__()
        sizes = [channels * factor for factor in factors]

        def residual(before, after):
            return taming.ResnetBlock(in_channels=before, out_channels=after, dropout=0.0, temb_channels=0)

        def levels(sizes, before, blocks, name, resample):
            found = torch.nn.ModuleList()
            for i, size in enumerate(sizes):
                level = torch.nn.Module()
                level.res = torch.nn.ModuleList([residual(before if j == 0 else size, size) for j in range(blocks)])
                level.attn = torch.nn.ModuleList([taming.AttnBlock(size) for _ in range(blocks if size == max(sizes) else 0)])
                if i < len(sizes) - 1:
                    setattr(level, name, resample(size, True))
                found.append(level)
                before = size
            return found

        def coder(first, last, ends, sizes, before, *options):
            net = torch.nn.Module()
            net.conv_in, net.conv_out = torch.nn.Conv2d(first, before, 3, padding=1), torch.nn.Conv2d(ends, last, 3, padding=1)
            net.conv_blocks = levels(sizes, before, *options)
            widest = max(sizes)
            net.mid = torch.nn.ModuleList([residual(widest, widest), taming.AttnBlock(widest), residual(widest, widest)])
            net.norm_out = taming.Normalize(ends)
            return net

        self.encoder = coder(3, latent, sizes[-1], sizes, sizes[0], 2, "downsample", taming.Downsample)
        self.decoder = coder(latent, 3, sizes[0], sizes[::-1], sizes[-1], 3, "upsample", taming.Upsample)
        self.quantize = torch.nn.Module()
        self.quantize.embedding = torch.nn.Embedding(codes, width)
        self.quantize.register_buffer("codebook_used", torch.zeros(65536))
        self.quant_conv, self.post_quant_conv = torch.nn.Conv2d(latent, width, 1), torch.nn.Conv2d(width, latent, 1)

    @staticmethod
    def _levels(net, x):
        for level in net.conv_blocks:
            for j, block in enumerate(level.res):
                x = block(x, None)
                x = level.attn[j](x) if len(level.attn) else x
            for name in ("downsample", "upsample"):
                x = getattr(level, name)(x) if hasattr(level, name) else x
        return x

    @staticmethod
    def _middle(net, x):
        return net.mid[2](net.mid[1](net.mid[0](x, None)), None)

    def latents(self, images):
        x = self._middle(self.encoder, self._levels(self.encoder, self.encoder.conv_in(images)))
        return self.quant_conv(self.encoder.conv_out(functional.silu(self.encoder.norm_out(x))))

    def codes(self, latents):
        h = functional.normalize(latents.permute(0, 2, 3, 1), dim=-1)
        codes = functional.normalize(self.quantize.embedding.weight, dim=-1)
        distances = h.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * h @ codes.T
        return distances.argmin(-1)

    def decode(self, codes):
        vectors = functional.normalize(self.quantize.embedding.weight, dim=-1)[codes].permute(0, 3, 1, 2)
        x = self._levels(self.decoder, self._middle(self.decoder, self.decoder.conv_in(self.post_quant_conv(vectors))))
        return self.decoder.conv_out(functional.silu(self.decoder.norm_out(x)))


def llamagen():
    net = _with_weights(_LlamaGen())
    latents = net.latents(_images("llamagen", 1, 3, 48, 32))
    codes = net.codes(latents)
    return _arrays(latents=latents, codes=codes, images=net.decode(codes))
