"""How fast are the published autoencoders against diffusers, on this machine's CPU, and how much of it is a cache's?

    python launch/encoder_experiments.py [--config sd-vae] [--size 256] [--batch 8] [--rounds 5] [--out DIR]
    python launch/encoder_experiments.py --images 100 [--config taesd] [--size 64] [--rounds 5] [--out DIR]

The first needs the environment of launch/parity.sh. Both encode and decode the same images with the same random weights, in turns;
printed are medians over the rounds, of the time and of the processors' time (which other programs on the machine change less), and of the
ratios. What
encoding costs at least on TPUs: python -m mmdiff aot --of encode.

The second writes JPEGs of 500 x 375 pixels and encodes them, each with its mirror image, in turns: by the encoder alone, of images that
are in memory, and by what `mmdiff cache` does, from the files to the shards. Printed are the images that each makes in a second, and the
share of the encoder's speed, and of the processors' time, that the cache has.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

from mmdiff.encoders import AutoencoderKL
from mmdiff.encoders.autoencoder_kl import CONFIGS
from mmdiff.encoders.autoencoder_tiny import CONFIGS as TINY
from mmdiff.encoders.autoencoder_tiny import AutoencoderTiny


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


def cache(args):
    """-> {"encoder" and "cache": images a second, "share" and "processor_share": medians over the rounds}"""
    from ml_collections import ConfigDict
    from PIL import Image

    from mmdiff import encoded_caches
    from mmdiff.convert import state_dicts
    from mmdiff.convert.weight_writer import write_weights
    from mmdiff.data.encoded import EncodedCache
    from mmdiff.data.modalities import Labels, Latents
    from mmdiff.data.named_autoencoders import Autoencoder

    kind = "autoencoder_tiny" if args.config in TINY else "autoencoder_kl"
    net = (AutoencoderTiny.from_config(TINY[args.config]) if args.config in TINY else AutoencoderKL.from_config(CONFIGS[args.config]))
    with tempfile.TemporaryDirectory() as name:
        folder, stream = pathlib.Path(name), np.random.default_rng(0)
        params = jax.jit(net.init)(jax.random.key(0), *net.example_inputs())["params"]
        write_weights(folder / "weights", state_dicts.state_dict(params), net.config())
        for i in range(args.images):
            path = folder / f"images/train/{i % 10}/{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(stream.integers(0, 256, (47, 63, 3), np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        autoencoder = Autoencoder({"kind": kind, "path": str(folder / "weights")}, args.size // net.downsampling)
        modalities = {"image": Latents(autoencoder.side, autoencoder.side, net.latent_channels), "label": Labels(10)}
        data = ConfigDict({"set": "folder", "images": str(folder / "images"), "dir": ""})
        cached = EncodedCache(data, modalities, [autoencoder])
        source = cached.source("train")
        parts = [source.read(first, min(first + source.batch, len(source))) for first in range(0, len(source), source.batch)]
        calls = {
            "encoder": lambda number: [source.encode(part) for part in parts],
            "cache": lambda number: encoded_caches.write(cached, folder / f"cache{number}", ["train"]),
        }
        times = {name: ([], []) for name in calls}
        for number in range(args.rounds + 1):
            for name, call in calls.items():
                began = time.perf_counter(), time.process_time()
                call(number)
                for kept, clock, before in zip(times[name], (time.perf_counter, time.process_time), began):
                    kept.append(clock() - before)
    rest = {name: [of[1:] for of in both] for name, both in times.items()}  # without the first, which compiles
    found = {name: args.images / statistics.median(both[0]) for name, both in rest.items()} | {
        f"{clock}share": statistics.median(alone / whole for alone, whole in zip(rest["encoder"][i], rest["cache"][i]))
        for i, clock in enumerate(("", "processor_"))}  # fmt: skip
    print(found, flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=(*CONFIGS, *TINY), default="sd-vae")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--images", type=int, default=0, help="how many a cache is made of")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=None, metavar="DIR", help="write what is found to a file in DIR")
    args = parser.parse_args()
    found = cache(args) if args.images else speed(args)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"encoder_{'cache' if args.images else 'speed'}.json"
        path.write_text(json.dumps({**vars(args), "out": str(args.out), "found": found}, indent=1))
