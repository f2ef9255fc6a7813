"""Improved MeanFlow's network as its PyTorch branch has it: the names of the modules, what they compute, and nothing of training."""

import math

import numpy as np
import published
import torch
from torch import nn

WEIGHT, INTERVAL = 7.5, (0.4, 0.65)  # of guidance
TIMES, ENDS, LABELS = (1.0, 0.7, 0.4), (0.0, 0.7, 0.1), (0, 3, 10)


class _Linear(nn.Module):
    def __init__(self, *sizes, bias=False):
        super().__init__()
        self._flax_linear = nn.Linear(*sizes, bias=bias)

    def forward(self, x):
        return self._flax_linear(x)


class _RMS(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class _Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.q_norm, self.k_norm = heads, _RMS(width // heads), _RMS(width // heads)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (_Linear(width, width) for _ in range(4))

    def forward(self, x, turns):
        def by_head(y):
            return y.unflatten(-1, (self.heads, -1))

        def turned(y):  # neighbouring features are a complex number
            return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turns[:, None]).flatten(-2)

        q, k, v = turned(self.q_norm(by_head(self.q_proj(x)))), turned(self.k_norm(by_head(self.k_proj(x)))), by_head(self.v_proj(x))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class _SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w1, self.w3, self.w2 = _Linear(width, hidden), _Linear(width, hidden), _Linear(hidden, width)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class _Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = _RMS(width), _Attention(width, heads), _RMS(width), _SwiGLU(width, int(width * 8 / 3))
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x, turns):
        x = x + self.attn(self.norm1(x), turns) * self.attn_scale
        return x + self.mlp(self.norm2(x)) * self.mlp_scale


class _Scalar(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(_Linear(256, width, bias=True), nn.SiLU(), _Linear(width, width, bias=True))

    def forward(self, t):
        rates = torch.exp(torch.arange(128, dtype=t.dtype) * (-math.log(10000) / 128))
        angles = t[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class _Table(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.embedding_table = nn.Module()
        self.embedding_table._flax_embedding = nn.Embedding(rows, width)


class _Patches(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)


class _Last(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.norm, self.linear = _RMS(width), _Linear(width, size, bias=True)

    def forward(self, x):
        return self.linear(self.norm(x))


class Net(nn.Module):
    def __init__(self, side=32, patch=2, channels=4, width=1024, depth=48, heads=16, classes=1000, head_depth=8):
        super().__init__()
        self.patch, self.width, self.heads, self.x_embedder = patch, width, heads, _Patches(channels, width, patch)
        for name in ("h", "omega", "cfg_t_start", "cfg_t_end"):
            self.add_module(f"{name}_embedder", _Scalar(width))
        self.y_embedder = _Table(classes + 1, width)
        for name, count in (("time", 4), ("class", 8), ("omega", 4), ("t_min", 2), ("t_max", 2)):
            self.register_parameter(f"{name}_tokens", nn.Parameter(torch.zeros(count, width)))
        self.shared_blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth - head_depth))
        self.u_heads, self.v_heads = (nn.ModuleList(_Block(width, heads) for _ in range(head_depth)) for _ in range(2))
        self.u_final_layer, self.v_final_layer = (_Last(width, patch**2 * channels) for _ in range(2))

    def forward(self, x, h, w, t_min, t_max, y):
        image = self.x_embedder.proj(x)
        side, image = image.shape[-1], image.flatten(2).mT
        conditions = (
            (self.class_tokens, self.y_embedder.embedding_table._flax_embedding(y)), (self.omega_tokens, self.omega_embedder(1 - 1 / w)),
            (self.t_min_tokens, self.cfg_t_start_embedder(t_min)), (self.t_max_tokens, self.cfg_t_end_embedder(t_max)),
            (self.time_tokens, self.h_embedder(h)))
        tokens = torch.cat([*(learned + embedded[:, None] for learned, embedded in conditions), image], 1)
        rates = 10000.0 ** -(torch.arange(0, self.width // self.heads, 2, dtype=x.dtype) / (self.width // self.heads))
        angles = torch.arange(tokens.shape[1], dtype=x.dtype)[:, None] * rates
        turns = torch.polar(torch.ones_like(angles), angles)
        for block in self.shared_blocks:
            tokens = block(tokens, turns)
        found = []
        for blocks, last in (self.u_heads, self.u_final_layer), (self.v_heads, self.v_final_layer):
            out = tokens
            for block in blocks:
                out = block(out, turns)
            out = last(out[:, -image.shape[1] :]).view(len(x), side, side, self.patch, self.patch, -1).permute(0, 5, 1, 3, 2, 4)
            found.append(out.reshape(len(x), -1, side * self.patch, side * self.patch))
        return found


def imf():
    """Average velocities and velocities, in double precision."""
    whole = nn.Module()
    whole.net = Net(8, 2, 4, 32, 3, 4, 10, 1)
    published.torch_model(whole).double()
    x, t, end = torch.from_numpy(published.normal("z", (3, 4, 8, 8))).double(), *(torch.tensor(t).double() for t in (TIMES, ENDS))
    with torch.no_grad():
        u, v = whole.net(x, t - end, *(torch.full_like(t, value) for value in (WEIGHT, *INTERVAL)), torch.tensor(LABELS))
    shapes = {key: " ".join(map(str, tensor.shape)) for key, tensor in whole.state_dict().items()}
    return {"keys": list(shapes), "shapes": list(shapes.values()), "average": np.asarray(u), "velocity": np.asarray(v)}
