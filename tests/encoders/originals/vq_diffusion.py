"""The transformers of VQ-Diffusion and CDCD as they are published, in PyTorch: of a text's features, and of a label."""

import math

import numpy as np
import published
import torch
from torch import nn

SMALL = dict(classes=12, grid=4, positions=6, width=32, heads=4, depth=2, times=10)
IDS = published.token_ids("vq tokens", (3, 16), 13)
PLACES, CLASSES = np.array([0, 4, 9]), np.array([0, 5, 6])  # steps counted from 0; class 6, the number of classes, is none of them


class _Norm(nn.Module):
    def __init__(self, width, rows):
        super().__init__()
        self.emb, self.linear = nn.Embedding(rows, width), nn.Linear(width, 2 * width)

    def forward(self, x, row):
        # An index beyond the table stands for none of its rows: the mean of all.
        table = torch.cat([self.emb.weight, self.emb.weight.mean(0, keepdim=True)])
        scale, shift = self.linear(nn.functional.silu(table[row]))[:, None].chunk(2, -1)
        return nn.functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class _Attention(nn.Module):
    def __init__(self, width, heads, context):
        super().__init__()
        self.heads, self.query, self.proj = heads, nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(context, width), nn.Linear(context, width)

    def forward(self, x, context):
        q, k, v = (of.view(len(x), of.shape[1], self.heads, -1).transpose(1, 2)
                   for of in (self.query(x), self.key(context), self.value(context)))  # fmt: skip
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def _gelu2(x):
    return x * torch.sigmoid(1.702 * x)


class _Convolutions(nn.Module):
    def __init__(self, width, hidden, grid):
        super().__init__()
        self.grid, self.conv1 = grid, nn.Conv2d(width, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x):
        h = x.mT.unflatten(2, (self.grid, self.grid))
        return self.conv2(_gelu2(self.conv1(h))).flatten(2).mT


class _MLP(nn.Sequential):
    def __init__(self, width, hidden):
        super().__init__(nn.Linear(width, hidden), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x):
        return self[2](_gelu2(self[0](x)))


class _Block(nn.Module):
    def __init__(self, width, heads, grid, times, context, labels, conv):
        super().__init__()
        self.ln1 = _Norm(width, times)
        if context:
            self.attn1, self.ln1_1, self.attn2 = _Attention(width, heads, width), _Norm(width, times), _Attention(width, heads, context)
        else:
            self.attn = _Attention(width, heads, width)
        self.ln2 = _Norm(width, labels) if labels else nn.LayerNorm(width)
        self.mlp = _Convolutions(width, 2 * width, grid) if conv else _MLP(width, 2 * width)

    def forward(self, x, time, context, label):
        h = self.ln1(x, time)
        x = x + (self.attn(h, h) if context is None else self.attn1(h, h))
        if context is not None:
            x = x + self.attn2(self.ln1_1(x, time), context)
        return x + self.mlp(self.ln2(x) if label is None else self.ln2(x, label))


class _Content(nn.Module):
    def __init__(self, states, positions, width):
        super().__init__()
        self.emb, self.width_emb = nn.Embedding(states, width), nn.Embedding(positions, width)
        self.height_emb = nn.Embedding(positions, width)

    def forward(self, ids):
        places = (self.height_emb.weight[:, None] + self.width_emb.weight).flatten(0, 1)
        return self.emb(ids) + places[: ids.shape[1]]


class Transformer(nn.Module):
    """`forward(ids [B, L], time [B], context [B, M, C] or None, label [B] or None)` -> logits [B, L, K]."""

    def __init__(self, classes, grid, positions, width, heads, depth, times, context=0, labels=0, conv=False):
        super().__init__()
        self.content_emb = _Content(classes + 1, positions, width)
        self.blocks = nn.ModuleList(_Block(width, heads, grid, times, context, labels, conv) for _ in range(depth))
        self.to_logits = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, ids, time, context=None, label=None):
        x = self.content_emb(ids)
        for block in self.blocks:
            x = block(x, time, context, label)
        return self.to_logits(x)


def _answer(**options):
    model = published.torch_model(Transformer(**SMALL, **options)).double()
    context = torch.from_numpy(published.normal("vq context", (3, 7, 24))).double() if "context" in options else None
    label = torch.tensor(CLASSES) if "labels" in options else None
    with torch.no_grad():
        logits = model(torch.tensor(IDS).long(), torch.tensor(PLACES), context, label)
    shapes = {key: " ".join(map(str, tensor.shape)) for key, tensor in model.state_dict().items()}
    return {"keys": list(shapes), "shapes": list(shapes.values()), "logits": logits}


def vq_diffusion_text():
    """Cross-attention to features of a text, and ordinary feed-forward layers (ITHQ)."""
    return _answer(context=24)


def vq_diffusion_class():
    """A label, convolutions, and a table of positions that is wider than the grid (ImageNet)."""
    return _answer(labels=6, conv=True)
