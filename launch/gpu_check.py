"""The parts of launch/gpu_check.sh: attention's backends against the reference on this device, and DiT-XL/2's training step with each.

Each part is a process of its own with a limit of time, so that one that fails, hangs or lacks memory leaves the others their turn.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
PEER = ROOT / "launch" / "torch_dit.py"

# Batch, queries, keys, heads, their width, keys that are masked: DiT-XL/2's, other widths, odd lengths, conditions.
SHAPES = [(8, 256, 256, 16, 72, False), (4, 1024, 1024, 16, 64, False), (2, 1024, 1024, 16, 12, False), (8, 257, 257, 16, 72, False),
          (4, 256, 77, 16, 64, True), (4, 1100, 1100, 8, 128, True)]  # fmt: skip
BOUND = 1e-2  # of the largest value, in bfloat16


def main():
    parser = argparse.ArgumentParser(description="what launch/gpu_check.sh runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu_check"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=570, help="for everything")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--part", nargs=2, help="only this one; prints its result as JSON")
    args, rest = parser.parse_known_args()
    overrides = [tuple(arg.removeprefix("--config.").split("=", 1)) for arg in rest if arg.startswith("--config.") and "=" in arg]
    if len(overrides) < len(rest):
        parser.error(f"write {' '.join(rest)} as --config.KEY=VALUE")
    if args.part:
        kind, backend = args.part
        print(json.dumps(parity(backend) if kind == "parity" else bench(backend, args, overrides)))
        return
    end = time.monotonic() + args.seconds
    backends = ["cudnn", "reference"] + ["tokamax"] * bool(importlib.util.find_spec("tokamax"))
    parts = [("parity", backend) for backend in ("xla", *backends)] + [("bench", backend) for backend in backends]
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    for n, part in enumerate(parts):
        left = end - time.monotonic()
        found.append({"part": part, **ask(part, sys.argv[1:], left - 20 * (len(parts) - n - 1))})
        (args.out / "check.json").write_text(json.dumps(found, indent=1))
        (args.out / "check.txt").write_text(table(found) + "\n")
        print(f"{' '.join(part)}: {time.monotonic() - end + args.seconds:.0f} s", flush=True)
    print(table(found))
    rows = [row for each in found if each["part"][0] == "parity" for row in each.get("found", ())]
    if wrong := sum("errors" in row and not row["agrees"] for row in rows):
        sys.exit(f"{wrong} of {len(rows)} comparisons differ from the reference by more than {BOUND:g}.")


def ask(part, arguments, seconds):
    """What a process with these arguments says of a part; {"error": ...} if it fails or takes longer."""
    if seconds < 10:
        return {"error": "no time was left"}
    command = [sys.executable, __file__, *arguments, "--part", *part]
    env = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}  # the last line is the error's
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds:.0f} s"}
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return {"error": lines[-1] if lines else f"status {done.returncode}"} if done.returncode else {"found": json.loads(lines[-1])}


# ---- The parts ----


def parity(backend, shapes=SHAPES):
    """Largest errors in bfloat16 of the output and of gradients, over the largest value of the reference in float32; and its time."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mmdiff.nets.attention import attention

    def both(backend, mask):
        def run(q, k, v, g):
            out, pull = jax.vjp(lambda *qkv: attention(*qkv, mask, backend), q, k, v)
            return out, *pull(g)

        return jax.jit(run)

    rows = []
    for b, n, m, heads, size, masked in shapes:
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [jax.random.normal(key, (b, length, heads, size), jnp.bfloat16) for key, length in zip(keys, (n, m, m, n))]
        mask = jnp.arange(m)[None, None, None] < jnp.linspace(m // 2, m, b).astype(int)[:, None, None, None] if masked else None
        row = {"shape": [b, n, m, heads, size], "masked": masked}
        try:
            program = both(backend, mask)
            found = program(*arrays)
            with jax.default_matmul_precision("highest"):
                expected = both("reference", mask)(*(x.astype(jnp.float32) for x in arrays))
            row["errors"] = [float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(found, expected)]
            row["agrees"] = bool(np.max(row["errors"]) < BOUND)  # not of NaN
            began = time.perf_counter()
            for _ in range(10):
                found = program(*arrays)
            jax.block_until_ready(found)
            row["milliseconds"] = (time.perf_counter() - began) * 100
        except Exception as error:  # a refusal is a result, too
            row["refused"] = str(error).strip().splitlines()[0]
        rows.append(row)
    return rows


def bench(backend, args, overrides):
    """`mmdiff bench` of DiT-XL/2 with this attention, with cuDNN's in turn with PyTorch where that is installed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants some of the memory
    from mmdiff import config as configs
    from mmdiff.training import bench

    path = str(ROOT / "configs" / "imagenet256" / "dit_xl2.py")
    config, module = configs.load(path, [("train.global_batch", str(args.batch)), *overrides])
    with config.unlocked():
        config.model.backend = backend
    peer = ""
    if backend == "cudnn" and importlib.util.find_spec("torch"):
        words = [sys.executable, str(PEER), "--batch", str(config.train.global_batch), "--size", config.model.size]
        peer = shlex.join([*words, "--steps", str(args.steps)])
    return bench.measure(module.build(config), config, steps=args.steps, rounds=args.rounds, peer=peer)


# ---- As text ----


def table(found):
    lines = [f"{'attention':<11}{'B, N, M, H, D':<26}{'errors of output, dq, dk, dv':<42}{'ms':>8}"]
    for each in found:
        if each["part"][0] == "parity":
            for row in each.get("found", ()):
                shape = ", ".join(map(str, row["shape"])) + (" masked" if row["masked"] else "")
                errors = " ".join(f"{error:.1e}" for error in row.get("errors", ())) + ("" if row.get("agrees") else "  DIFFERS")
                text = f"refused: {row['refused']}" if "refused" in row else f"{errors:<42}{row['milliseconds']:>8.3g}"
                lines.append(f"{each['part'][1]:<11}{shape:<26}{text}")
    lines += [
        "",
        f"{'DiT-XL/2':<11}{'s a step':>10}{'images/s':>10}{'MFU':>8}{'of measured':>13}{'memory':>10}{'compiled in':>13}{'peer':>20}",
    ]
    for each in found:
        if each["part"][0] == "bench" and "found" in each:
            one = each["found"]
            share = [f"{one[name]:.1%}" if one[name] else "?" for name in ("mfu_datasheet", "mfu_measured")]
            peer = f"{one['peer']['seconds_per_step']:.4g} s, x {one['peer']['ratio']:.3f}" if one["peer"] else ""
            memory = f"{one['memory']['compiled'] / 1e9:.3g} GB"
            lines.append(
                f"{each['part'][1]:<11}{one['step_seconds']:>10.4g}{one['images_per_second']:>10.4g}{share[0]:>8}{share[1]:>13}{memory:>10}"
                f"{one['compile_seconds']:>11.0f} s{peer:>20}"
            )
    lines += [f"{' '.join(each['part'])}: {each['error']}" for each in found if "error" in each]
    devices = [f"{each['found']['chips']} x {each['found']['device']}, jax {each['found']['jax']}" for each in found
               if each["part"][0] == "bench" and "found" in each]  # fmt: skip
    return "\n".join([*devices[:1], *lines])


if __name__ == "__main__":
    main()
