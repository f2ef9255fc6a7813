"""DiT, SiT, LightningDiT and JiT as they are published, in PyTorch: the names of modules, what they compute, and nothing of training."""

import math

import numpy as np
import published
import torch
from torch import nn

from mmdiff.nets.embed import sincos_2d

STEPS, TIMES, LABELS = (0, 250, 999), (0.0, 0.3, 1.0), (0, 3, 10)


class _Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, count, width = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.mT) / math.sqrt(width // self.heads)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, width))


class _MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def _norm(x, shift, scale):
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class _Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.mlp = _Attention(width, heads), _MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_a[:, None] * self.attn(_norm(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(_norm(x, shift_m, scale_m))


class _Times(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        rates = torch.exp(torch.arange(128, dtype=t.dtype) * (-math.log(10000) / 128))
        angles = t[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class _Labels(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)


class _Patches(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)


class _Last(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.linear, self.adaLN_modulation = nn.Linear(width, size), nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class DiT(nn.Module):
    """`forward(x [B, C, H, W], t [B], y [B])`: t counts steps in DiT, and is a time from noise to data in SiT (`sit`)."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, num_classes=1000):
        super().__init__()
        side, self.patch = input_size // patch_size, patch_size
        self.x_embedder, self.t_embedder = _Patches(in_channels, hidden_size, patch_size), _Times(hidden_size)
        self.y_embedder = _Labels(num_classes + 1, hidden_size)
        self.pos_embed = nn.Parameter(torch.from_numpy(sincos_2d(hidden_size, side, side)[None]), requires_grad=False)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = _Last(hidden_size, patch_size**2 * 2 * in_channels)

    def forward(self, x, t, y):
        h = self.x_embedder.proj(x)
        rows, columns = h.shape[-2:]
        h = h.flatten(2).mT + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, 1)
        out = self.final_layer.linear(_norm(h, shift, scale))
        out = out.view(len(x), rows, columns, self.patch, self.patch, -1).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(len(x), -1, rows * self.patch, columns * self.patch)


class _RMS(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


class _Rotary(nn.Module):
    """Pairs of neighbouring features are turned: the first half of a head by the row, the second by the column."""

    def __init__(self, side, size):
        super().__init__()
        rates = 10000.0 ** (-torch.arange(0, size // 2, 2).float() / (size // 2))
        angles = torch.arange(side).float()[:, None] * rates
        rows, columns = angles[:, None].expand(side, side, -1), angles[None].expand(side, side, -1)
        angles = torch.cat([rows, columns], -1).reshape(side * side, -1).repeat_interleave(2, -1)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x):
        even, odd = x[..., ::2], x[..., 1::2]
        return x * self.freqs_cos + torch.stack([-odd, even], -1).flatten(-2) * self.freqs_sin


class _RotaryAttention(_Attention):
    def forward(self, x, rotary):
        batch, count, width = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(rotary(q), rotary(k), v)
        return self.proj(out.transpose(1, 2).reshape(batch, count, width))


class _SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(nn.functional.silu(gate) * value)


class _LightningBlock(_Block):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.attn, self.mlp, self.norm1, self.norm2 = _RotaryAttention(width, heads), _SwiGLU(width), _RMS(width), _RMS(width)

    def forward(self, x, c, rotary):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, rotary)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class LightningDiT(DiT):
    """LightningDiT with the options of its XL/1: RMSNorm, SwiGLU, rotary positions; a time from noise to data."""

    def __init__(self, input_size=16, patch_size=1, in_channels=32, hidden_size=1152, depth=28, num_heads=16, num_classes=1000):
        super().__init__(input_size, patch_size, in_channels, hidden_size, 0, num_heads, num_classes)
        self.feat_rope = _Rotary(input_size // patch_size, hidden_size // num_heads)
        self.blocks = nn.ModuleList(_LightningBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = _Last(hidden_size, patch_size**2 * in_channels)
        self.final_layer.norm_final = _RMS(hidden_size)

    def forward(self, x, t, y):
        h = self.x_embedder.proj(x)
        side = h.shape[-1]
        h, c = h.flatten(2).mT + self.pos_embed, self.t_embedder(t) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            h = block(h, c, self.feat_rope)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        out = self.final_layer.linear(self.final_layer.norm_final(h) * (1 + scale) + shift)
        out = out.view(len(x), side, side, self.patch, self.patch, -1).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(len(x), -1, side * self.patch, side * self.patch)


class _NormedAttention(_Attention):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.q_norm, self.k_norm = _RMS(width // heads), _RMS(width // heads)

    def forward(self, x, rotary):
        batch, count, width = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(rotary(self.q_norm(q)), rotary(self.k_norm(k)), v)
        return self.proj(out.transpose(1, 2).reshape(batch, count, width))


class _Behind(nn.Module):
    """Rotary tables of an image's tokens, which come last: those before them are not turned. JiT's state dict has no tables."""

    def __init__(self, tables):
        super().__init__()
        self.tables = [tables]

    def forward(self, x):
        front, image = x.split([x.shape[2] - len(self.tables[0].freqs_cos), len(self.tables[0].freqs_cos)], 2)
        return torch.cat([front, self.tables[0](image)], 2)


class JiT(nn.Module):
    """JiT: pixels through a bottleneck, tokens of the label from a block on; a time from noise to data."""

    def __init__(self, side=256, patch=16, width=768, depth=12, heads=12, classes=1000, bottleneck=128, tokens=32, start=4):
        super().__init__()
        self.patch, self.start, self.x_embedder = patch, start, nn.Module()
        self.x_embedder.proj1 = nn.Conv2d(3, bottleneck, patch, patch, bias=False)
        self.x_embedder.proj2 = nn.Conv2d(bottleneck, width, 1)
        self.t_embedder, self.y_embedder = _Times(width), _Labels(classes + 1, width)
        grid = side // patch
        self.pos_embed = nn.Parameter(torch.from_numpy(sincos_2d(width, grid, grid)[None]), requires_grad=False)
        self.in_context_posemb = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(_LightningBlock(width, heads) for _ in range(depth))
        for block in self.blocks:
            block.attn = _NormedAttention(width, heads)
        self.final_layer = _Last(width, patch**2 * 3)
        self.final_layer.norm_final = _RMS(width)
        self.rotary = _Behind(_Rotary(grid, width // heads))

    def forward(self, x, t, y):
        h = self.x_embedder.proj2(self.x_embedder.proj1(x))
        side, y = h.shape[-1], self.y_embedder.embedding_table(y)
        h, c = h.flatten(2).mT + self.pos_embed, self.t_embedder(t) + y
        for i, block in enumerate(self.blocks):
            if i == self.start:
                h = torch.cat([y[:, None] + self.in_context_posemb, h], 1)
            h = block(h, c, self.rotary)
        h = h[:, self.in_context_posemb.shape[1] :]
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        out = self.final_layer.linear(self.final_layer.norm_final(h) * (1 + scale) + shift)
        out = out.view(len(x), side, side, self.patch, self.patch, -1).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(len(x), -1, side * self.patch, side * self.patch)


def _small(model):
    computed = {key: tensor.clone() for key, tensor in model.state_dict().items() if "pos_embed" in key or "rope" in key}
    published.torch_model(model)
    model.load_state_dict(computed, strict=False)  # as it is built
    return model.double()


def _named(model):
    keys = {key: " ".join(map(str, tensor.shape)) for key, tensor in model.state_dict().items()}
    return {"keys": list(keys), "shapes": list(keys.values())}


def jit():
    """At times from noise to data, in double precision, but for the rotary tables."""
    whole = nn.Module()
    whole.net = JiT(8, 2, 32, 3, 4, 10, 5, 3, 1)
    model, x = _small(whole).net, torch.from_numpy(published.normal("pixels", (3, 3, 8, 8))).double()
    with torch.no_grad():
        answer = model(x, torch.tensor(TIMES, dtype=torch.float64), torch.tensor(LABELS))
    return {**_named(whole), "jit": np.asarray(answer)}


def lightningdit():
    """At SiT's times, in double precision, but for the rotary tables."""
    model, x = _small(LightningDiT(8, 2, 4, 32, 2, 4, 10)), torch.from_numpy(published.normal("z", (3, 4, 8, 8))).double()
    with torch.no_grad():
        answer = model(x, torch.tensor(TIMES, dtype=torch.float64), torch.tensor(LABELS))
    return {**_named(model), "lightningdit": np.asarray(answer)}


def dit():
    """Of DiT at its steps, and of SiT, of which the second half of the channels is thrown away, at its times; in double precision."""
    model, x = _small(DiT(8, 2, 4, 32, 2, 4, 10)), torch.from_numpy(published.normal("z", (3, 4, 8, 8))).double()
    with torch.no_grad():
        times = {"dit": torch.tensor(STEPS).double(), "sit": torch.tensor(TIMES, dtype=torch.float64)}
        answers = {name: model(x, t, torch.tensor(LABELS)) for name, t in times.items()}
    answers["sit"] = answers["sit"].chunk(2, 1)[0]
    return _named(model) | {name: np.asarray(answer) for name, answer in answers.items()}
