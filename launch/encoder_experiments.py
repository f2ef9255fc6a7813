"""How fast are the published autoencoders against diffusers, on this machine's CPU?

    python launch/encoder_experiments.py [--config sd-vae] [--size 256] [--batch 8] [--rounds 5] [--out DIR]

Needs the environment of launch/parity.sh. Both encode and decode the same images with the same random weights, in turns; printed are
medians over the rounds, of the time and of the processors' time (which other programs on the machine change less), and of the ratios. What
encoding costs at least on TPUs: python -m mmdiff aot --of encode.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import jax
import numpy as np

from mmdiff.encoders import AutoencoderKL
from mmdiff.encoders.autoencoder_kl import CONFIGS


def speed(args):
    """-> {"encode" and "decode": {"jax_seconds", "torch_seconds", "ratio", ...}}"""
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests" / "encoders"))
    import published

    published.prepare_torchvision()
    import diffusers
    import torch

    torch.set_grad_enabled(False)
    net = AutoencoderKL.from_config(CONFIGS[args.config])
    model = published.torch_model(diffusers.AutoencoderKL.from_config(net.config()))
    params = jax.device_put(published.params(net))
    stream = np.random.default_rng(1)
    images = stream.uniform(-1, 1, (args.batch, args.size, args.size, 3)).astype(np.float32)
    latents = stream.standard_normal((args.batch, *(args.size // net.downsampling,) * 2, net.latent_channels), np.float32)
    methods = {"encode": images, "decode": latents}
    found = {}
    for method, x in methods.items():
        function = jax.jit(lambda params, x: net.apply({"params": params}, x, method=method)).lower(params, x).compile()  # noqa: B023
        theirs = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
        calls = {
            "jax": lambda: np.asarray(function(params, x)),  # noqa: B023
            "torch": lambda: getattr(model, method)(theirs)[0],  # noqa: B023
        }
        times = {name: ([], []) for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                began = time.perf_counter(), time.process_time()
                out = call()
                for kept, clock, before in zip(times[name], (time.perf_counter, time.process_time), began):
                    kept.append(clock() - before)
                del out
        ratios = [[ours / other for ours, other in zip(*of)] for of in zip(times["jax"], times["torch"])]
        clocks = ("", "processor_")
        found[method] = {
            f"{name}_{clock}seconds": statistics.median(of) for name in calls for clock, of in zip(clocks, times[name])
        } | {f"{clock}ratio": statistics.median(of) for clock, of in zip(clocks, ratios)} | {"ratios": ratios[0]}  # fmt: skip
        print(method, found[method], flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="sd-vae")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=None, metavar="DIR", help="write what is found to DIR/encoder_speed.json")
    args = parser.parse_args()
    found = speed(args)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "encoder_speed.json").write_text(json.dumps({**vars(args), "out": str(args.out), "found": found}, indent=1))
