"""DiT's training step in PyTorch, for `mmdiff bench --peer` and launch/gpu_check.sh: prints {"seconds_per_step": ...}.

    python launch/torch_dit.py --size XL --batch 64 [--steps 5] [--dtype bfloat16] [--compile]

The network of configs/imagenet256/dit_xl2.py (latents 32x32x4, patches of 2, learned variances' eight channels), its MSE of eps, AdamW,
autocast to bfloat16 on a GPU, the fused attention of PyTorch. It needs torch alone.
"""

import argparse
import json
import math
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads
SIDE, CHANNELS, PATCH, CLASSES = 32, 4, 2, 1000


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaln = nn.Linear(width, 6 * width)

    def forward(self, x, c):
        b, n, width = x.shape
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaln(functional.silu(c))[:, None].chunk(6, -1)
        h = self.norms[0](x) * (1 + scale) + shift
        q, k, v = self.qkv(h).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        x = x + gate * self.out(h)
        return x + gate_mlp * self.mlp(self.norms[1](x) * (1 + scale_mlp) + shift_mlp)


class DiT(nn.Module):
    def __init__(self, depth, width, heads):
        super().__init__()
        self.patches = nn.Conv2d(CHANNELS, width, PATCH, PATCH)
        self.position = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, width) * 0.02, requires_grad=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaln, self.out = nn.Linear(width, 2 * width), nn.Linear(width, PATCH * PATCH * 2 * CHANNELS)

    def forward(self, x, t, y):
        angles = t[:, None] * torch.exp(-math.log(10_000) / 128 * torch.arange(128, device=t.device))
        c = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(y)
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.adaln(functional.silu(c))[:, None].chunk(2, -1)
        return self.out(self.norm(x) * (1 + scale) + shift)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="XL")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    half = (args.dtype or ("bfloat16" if cuda else "float32")) == "bfloat16"
    torch.backends.cuda.matmul.allow_tf32 = True
    net = DiT(*SIZES[args.size]).to(device)
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), 1e-4, weight_decay=0.0, fused=cuda)

    def loss(x, t, y, eps):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            out = net(x, t, y)
        return (out[..., : PATCH * PATCH * CHANNELS].float() - eps).square().mean()

    run = torch.compile(loss) if args.compile else loss
    seconds = []
    for step in range(2 + args.steps):
        x = torch.randn(args.batch, CHANNELS, SIDE, SIDE, device=device)
        eps = torch.randn(args.batch, (SIDE // PATCH) ** 2, PATCH * PATCH * CHANNELS, device=device)
        t, y = torch.rand(args.batch, device=device) * 1000, torch.randint(0, CLASSES, (args.batch,), device=device)
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.zero_grad()
        run(x, t, y, eps).backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        if step >= 2:
            seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds_per_step": statistics.median(seconds), "torch": torch.__version__,
                      "parameters": sum(p.numel() for p in net.parameters())}))  # fmt: skip


if __name__ == "__main__":
    main()
