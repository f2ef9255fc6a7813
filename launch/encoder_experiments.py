"""How fast are the published autoencoders? Against diffusers on this machine's CPU, and at best on TPUs that are not there.

    python launch/encoder_experiments.py speed [--config sd-vae] [--size 256] [--batch 8] [--rounds 5] [--out DIR]
    python launch/encoder_experiments.py aot   [--config sd-vae] [--size 256] [--batch 64] [--topology v5e:1x1 v6e:1x1] [--out DIR]

`speed` needs the environment of launch/parity.sh. Both encode and decode the same images with the same random weights, in turns; printed
are medians over the rounds, of the time and of the processors' time (which other programs on the machine change less), and of the ratios.

`aot` needs the TPU compiler (pip install 'mmdiff[tpu-aot]'). It compiles one step of a latent cache, images uint8 -> moments, for the
chips, with `batch` images on each, and prints memory, the least time of the step and the images per second that it allows. float32 products
at the highest precision, as latents are stored by, are six passes of bfloat16.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.encoders import AutoencoderKL
from mmdiff.encoders.autoencoder_kl import CONFIGS
from mmdiff.encoders.preprocessing import AUTOENCODER
from mmdiff.encoders.published_configs import abstract_params

PASSES = {"bfloat16": 1, "float32": 6}


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


def aot(args):
    """-> {"TOPOLOGY dtype": {...}}"""
    from jax.sharding import NamedSharding, PartitionSpec

    from mmdiff.training import hlo, perf, sharding
    from mmdiff.training.aot import describe

    found = {}
    for topology in args.topology:
        chip, devices = describe(topology)
        mesh = sharding.make_mesh({}, devices)
        for dtype, passes in PASSES.items():
            net = AutoencoderKL.from_config(CONFIGS[args.config]).clone(dtype=jnp.dtype(dtype))
            everywhere = NamedSharding(mesh, PartitionSpec())
            params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), abstract_params(net))  # noqa: B023
            split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            images = jax.ShapeDtypeStruct((args.batch * mesh.size, args.size, args.size, 3), jnp.uint8, sharding=split)

            def step(params, images):
                with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):  # noqa: B023
                    return net.apply({"params": params}, AUTOENCODER.normalize(images), method="encode")  # noqa: B023

            compiled = jax.jit(step, out_shardings=split).lower(params, images).compile()
            flops = perf.flops(step, params, images)
            memory = perf.compiled_memory(compiled)
            line = perf.roofline(chip, mesh.size, flops, passes * flops, hlo.Program(compiled.as_text()).traffic())
            found[f"{topology} {dtype}"] = {
                "batch_per_chip": args.batch, "flops_per_image": flops // images.shape[0], "memory": memory,
                "fits": memory["total"] <= chip.memory, "step_seconds": line.step_seconds, "limit": line.limit,
                "images_per_second_per_chip": args.batch / line.step_seconds,
            }  # fmt: skip
            print(topology, dtype, found[f"{topology} {dtype}"], flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "aot"))
    parser.add_argument("--config", choices=CONFIGS, default="sd-vae")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=None, help="images at a time, with aot on each chip (default: 8, with aot 64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--topology", nargs="+", default=["v5e:1x1", "v6e:1x1"])
    parser.add_argument("--out", type=pathlib.Path, default=None, metavar="DIR", help="write what is found to DIR/encoder_WHAT.json")
    args = parser.parse_args()
    args.batch = args.batch or {"speed": 8, "aot": 64}[args.what]
    found = {"speed": speed, "aot": aot}[args.what](args)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"encoder_{args.what}.json").write_text(json.dumps({**vars(args), "out": str(args.out), "found": found}, indent=1))
