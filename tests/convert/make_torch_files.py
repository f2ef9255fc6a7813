"""Writes `torch_files/`: small genuine checkpoints of PyTorch's, and what they hold as `values.npz`.

python tests/convert/make_torch_files.py        (in the environment of launch/parity.sh: it needs torch)
"""

import argparse
import collections
import pathlib

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent / "torch_files"
PLAIN = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def tensors():
    """One tensor of each type, and views as networks have them."""
    table = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7
    found = {name: (torch.arange(6).reshape(2, 3) % 5).to(getattr(torch, name)) for name in PLAIN}
    return found | {
        "scalar": torch.tensor(4.6052), "empty": torch.zeros(0, 3), "transposed": table.T, "rows": table[1:, ::2], "tied.a": table,
        "tied.b": table, "parameter": torch.nn.Parameter(table + 1), "expanded": torch.arange(4)[None].expand(1, 4)}  # fmt: skip


def main():
    HERE.mkdir(exist_ok=True)
    every = tensors()
    float8 = {name: torch.linspace(-2, 2, 6).to(getattr(torch, name)) for name in ("float8_e4m3fn", "float8_e5m2")}
    torch.save(every | float8, HERE / "zip.pt")
    torch.save(every, HERE / "older.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict(), HERE / "state_dict.bin")
    weights = collections.OrderedDict(weight=every["float32"], bias=every["scalar"][None])
    training = {
        "model": weights, "ema": collections.OrderedDict(weight=every["float32"] + 1, bias=every["scalar"][None] + 1),
        "opt": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": every["float32"]}}, "param_groups": [{"lr": 1e-4, "betas": (0, 1)}]},
        "args": argparse.Namespace(model="DiT-S/2", image_size=256, path=pathlib.PurePosixPath("/data"))}  # fmt: skip
    torch.save(training, HERE / "training.pt")
    lightning = {
        "epoch": 3, "global_step": 7, "state_dict": weights, "callbacks": {torch.nn.ReLU: {"best": np.float64(1.5)}}, "loops": {1, 2},
        "hyper_parameters": {"array": np.arange(3), "module": torch.nn.Linear(2, 2), "kind": np.dtype("float32")}}  # fmt: skip
    torch.save(lightning, HERE / "lightning.ckpt")
    torch.save(torch.nn.Linear(2, 3), HERE / "module.pt")
    torch.save({"weight": every["float32"], "extra": torch.nn.ReLU()}, HERE / "class_among_weights.pt")
    torch.save({"weight": torch.eye(3).to_sparse()}, HERE / "sparse.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), HERE / "torchscript.pt")
    bits = {2: torch.int16, 1: torch.uint8}
    plain = {
        name: tensor.view(bits[tensor.element_size()]) if name.startswith(("bf", "float8")) else tensor
        for name, tensor in (every | float8).items()
    }
    np.savez_compressed(HERE / "values.npz", **{name: tensor.detach().numpy() for name, tensor in plain.items()})
    for path in sorted(HERE.iterdir()):
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
