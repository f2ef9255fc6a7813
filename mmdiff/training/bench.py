"""Training speed on this machine: `measure(experiment, config)`, of the core alone: no data, no checkpoints, no TensorBoard."""

from __future__ import annotations

import collections
import json
import math
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmdiff import console
from mmdiff.data import loader
from mmdiff.data.sources import RandomSource
from mmdiff.errors import UserError
from mmdiff.experiment import Experiment
from mmdiff.keys import key_of
from mmdiff.training import perf, sharding
from mmdiff.training.step import IN_FLIGHT, Step, checked, step_of

TERA = 1e12


def measure(experiment: Experiment, config: Any, *, steps: int = 5, rounds: int = 5, peer: str = "") -> dict[str, Any]:
    """Times the compiled step of `train` on random examples, with the same input pipeline.

    In every round the peer (if any), training, value_and_grad with the optimizer, value_and_grad alone and large matrix products take
    turns, because a machine's speed drifts. Each runs once untimed and then `steps` times, with at most IN_FLIGHT calls queued, as in
    `train`. Reported are medians over the rounds, also of ratios.

    Args:
      experiment: what to train; its data is not opened.
      config: as for `train`; used are seed and train.{global_batch,microbatches,ema,mesh,prefetch}.
      steps: timed calls of each program in a round.
      rounds: how many rounds.
      peer: a command that prints, as its last line of JSON, {"seconds_per_step": ...}.

    Returns plain values (`json.dumps` takes them), times in seconds, sizes in bytes, and None for what is unknown here:
      "device", "chips", "jax", "dtype" (of the network's products), "parameters", "global_batch", "microbatches", "steps", "rounds".
      "step_seconds": the median; "step_seconds_quartiles": the first and the third; "step_seconds_rounds": of each round.
      "images_per_second", "images_per_second_per_chip".
      "model_flops": of a step (`perf.model_flops`); "model_flops_per_second_per_chip".
      "peak_measured": FLOP/s of a chip in products of large matrices of that dtype, the best round; "peak_datasheet": in bfloat16
        (`perf.CHIPS`); "mfu_measured", "mfu_datasheet": the share of each that the model's FLOPs reach.
      "value_and_grad_seconds": of the bare gradient of the whole batch; "value_and_grad_optimizer_seconds": and of the update;
        "overhead": of a training step over the latter, as a fraction of it; "overhead_value_and_grad": over the former.
      "input_wait": the fraction of the time in which the host waits for the next batch.
      "lowering_seconds", "compile_seconds".
      "memory": bytes, {"compiled": per chip, of the compiled step (`perf.compiled_memory`), "peak": of a device, in use at most,
        "resident": of the whole process, at most}.
      "peer": {"command", "seconds_per_step": the median, "all": of each round, "ratio": our median step over it}, or None.

    Raises:
      UserError: the config or the mesh does not fit, or the peer fails.
    """
    if peer:
        _words(peer)  # before anything is compiled
        if jax.process_count() > 1:
            raise UserError("every process would start the peer: give --peer to a run of one process.")
    train = config.train
    mesh = sharding.make_mesh(dict(train.mesh))
    sharding.check_batch(train.global_batch, mesh, train.microbatches)
    part, parts = sharding.process_shard(mesh, train.global_batch)
    batches = loader.batches(RandomSource(experiment.modalities), config.seed, train.global_batch, 0, part, parts)
    batch = sharding.shard_batch(next(batches), mesh)
    # What the step does m times, the bare programs do once.
    rows = {name: array[: len(array) // train.microbatches] for name, array in next(batches).items()}
    rows = sharding.shard_batch(rows, mesh)

    widths = tuple(train.get("ema_widths", ()))
    abstract = sharding.abstract_state(experiment.init, experiment.optimizer, mesh, experiment.rules, experiment.loss, widths)
    sharding.check_memory(abstract, batch, mesh)
    began = time.perf_counter()
    lowered = sharding.lower_step(step_of(experiment, train), abstract, batch, mesh)
    lowering_seconds = time.perf_counter() - began
    _say("compiling")
    began = time.perf_counter()
    program = sharding.compile_lowered(lowered, mesh)
    compile_seconds = time.perf_counter() - began
    key = key_of(config.seed)
    state = sharding.init_sharded_state(experiment.init, experiment.optimizer, key, mesh, experiment.rules, experiment.loss, widths)
    waited = 0.0

    def stepping():
        nonlocal state, waited
        began = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - began
        state, metrics = program(state, batch)
        return metrics["loss"]

    def running(program, batch):
        def call():
            nonlocal state
            state, metrics = program(state, batch)
            return metrics["loss"]

        return call

    seconds: dict[str, list[float]] = collections.defaultdict(list)  # of a call, by program and round
    waits, peers = [], []

    # Batches are read, checked and placed in a thread, as in `train`.
    placed = (sharding.shard_batch(checked(experiment, batch), mesh) for batch in batches)
    with loader.prefetch(placed, train.prefetch) as stream:
        jax.block_until_ready(stepping())
        memory = _memory(program)
        _say(f"compiled in {compile_seconds:.1f} s; one step as part of training, and the parts alone")
        bare = {
            name: running(sharding.compile_lowered(sharding.lower_step(step, abstract, rows, mesh), mesh), rows)
            for name, step in (("optimizer", _update(experiment)), ("gradient", _gradient(experiment)))
        }
        dtype = perf.main_type(experiment.loss, abstract.params, rows, abstract.key)
        products = _products(dtype)
        for number in range(rounds):
            if peer:
                peers.append(ask(peer))
            for _ in range(train.prefetch):
                next(stream)  # drops the batches that were prepared while something else ran
            jax.block_until_ready(stepping())
            waited = 0.0
            seconds["step"].append(_time(stepping, steps))
            waits.append(waited / steps / seconds["step"][-1])
            for name, call in [*bare.items(), ("products", products)]:
                jax.block_until_ready(call())
                seconds[name].append(_time(call, steps))
            peer_seconds = f", the peer {peers[-1]:.4g} s" if peer else ""
            _say(f"round {number + 1} of {rounds}: a step takes {seconds['step'][-1]:.4g} s{peer_seconds}")

    each = {name: np.array(values) for name, values in seconds.items()}
    gradient = train.microbatches * each["gradient"]
    updated = gradient - each["gradient"] + each["optimizer"]
    step_seconds = float(np.median(each["step"]))
    model_flops = perf.model_flops(experiment.loss, abstract.params, batch, abstract.key)
    rate = model_flops / step_seconds / mesh.size
    chip = perf.chip(jax.devices()[0].device_kind)
    peaks = {"measured": products.flops / float(each["products"].min()), "datasheet": chip.flops if chip else None}
    return {
        "device": jax.devices()[0].device_kind,
        "chips": mesh.size,
        "jax": jax.__version__,
        "dtype": dtype.name,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params)),
        "global_batch": train.global_batch,
        "microbatches": train.microbatches,
        "steps": steps,
        "rounds": rounds,
        "step_seconds": step_seconds,
        "step_seconds_quartiles": np.percentile(each["step"], [25, 75]).tolist(),
        "step_seconds_rounds": seconds["step"],
        "images_per_second": train.global_batch / step_seconds,
        "images_per_second_per_chip": train.global_batch / step_seconds / mesh.size,
        "model_flops": model_flops,
        "model_flops_per_second_per_chip": rate,
        **{f"peak_{name}": peak for name, peak in peaks.items()},
        **{f"mfu_{name}": peak and rate / peak for name, peak in peaks.items()},
        "value_and_grad_seconds": float(np.median(gradient)),
        "value_and_grad_optimizer_seconds": float(np.median(updated)),
        "overhead": float(np.median(each["step"] / updated)) - 1,
        "overhead_value_and_grad": float(np.median(each["step"] / gradient)) - 1,
        "input_wait": float(np.median(waits)),
        "lowering_seconds": lowering_seconds,
        "compile_seconds": compile_seconds,
        "memory": memory,
        "peer": _compared(peer, peers, step_seconds) if peer else None,
    }


def table(found: Mapping[str, Any]) -> str:
    """The result of `measure` as text."""

    def share(value):
        return "unknown" if value is None else f"{100 * value:.1f} %"

    def peak(name):
        value = found[f"peak_{name}"]
        return "unknown" if value is None else f"{share(found[f'mfu_{name}'])} of {value / TERA:.4g} TFLOP/s"

    low, high = found["step_seconds_quartiles"]
    sizes = {name: "unknown" if size is None else f"{size / perf.GIB:.2f} GiB" for name, size in found["memory"].items()}
    lines = {
        "device": f"{found['chips']} x {found['device']}, products in {found['dtype']}, jax {found['jax']}",
        "network": f"{found['parameters']:,} parameters, global batch {found['global_batch']}",
        "step": f"{found['step_seconds']:.4g} s (quartiles {low:.4g} and {high:.4g}; {found['rounds']} rounds of {found['steps']} steps)",
        "images": f"{found['images_per_second']:.4g} a second, {found['images_per_second_per_chip']:.4g} per chip",
        "compute": f"{found['model_flops_per_second_per_chip'] / TERA:.4g} TFLOP/s of the model per chip",
        "MFU, measured": peak("measured"),
        "MFU, datasheet": peak("datasheet"),
        "overhead": f"{share(found['overhead'])} over value_and_grad and optimizer ({found['value_and_grad_optimizer_seconds']:.4g} s), "
        f"{share(found['overhead_value_and_grad'])} over value_and_grad ({found['value_and_grad_seconds']:.4g} s)",
        "input wait": share(found["input_wait"]),
        "compilation": f"{found['lowering_seconds']:.1f} s of lowering, {found['compile_seconds']:.1f} s of compiling",
        "memory": f"{sizes['compiled']} per chip as compiled, {sizes['peak']} at most in use, {sizes['resident']} of the process",
    }
    if found["peer"]:
        lines["peer"] = f"{found['peer']['seconds_per_step']:.4g} s a step: ours takes {found['peer']['ratio']:.3f} times as long"
    return "\n".join(f"{name:<14}  {text}" for name, text in lines.items())


# ---- The reference programs ----


def _gradient(experiment: Experiment) -> Step:
    """value_and_grad alone. The gradients replace the EMA, so that nothing is eliminated and nothing is copied."""

    def step(state, batch):
        (value, _), grads = jax.value_and_grad(experiment.loss, has_aux=True)(state.params, batch, state.key)
        grads = jax.tree.map(lambda grad, like: grad.astype(like.dtype), grads, state.ema)
        return state.replace(ema=grads), {"loss": value}

    return step


def _update(experiment: Experiment) -> Step:
    """value_and_grad and the optimizer."""

    def step(state, batch):
        (value, _), grads = jax.value_and_grad(experiment.loss, has_aux=True)(state.params, batch, state.key)
        takes_value = optax.with_extra_args_support(experiment.optimizer)
        updates, opt = takes_value.update(grads, state.opt, state.params, value=value)
        return state.replace(params=optax.apply_updates(state.params, updates), opt=opt), {"loss": value}

    return step


def _products(dtype: np.dtype) -> Callable[[], jax.Array]:
    """A chain of products of large square matrices on one device; its attribute `flops` says how many operations it is."""
    device = jax.local_devices()[0]
    size, count = (2048, 2) if device.platform == "cpu" else (8192, 16)
    # Random numbers: a chip that multiplies zeros uses less power and clocks higher. The scale keeps their magnitude.
    keys = jax.random.split(jax.random.key(0))
    x, w = (jax.device_put(jax.random.normal(key, (size, size), dtype), device) for key in keys)
    w = w * jnp.asarray(size**-0.5, dtype)

    def chain(x, w):
        x = jax.lax.fori_loop(0, count, lambda _, x: x @ w, x)
        return x, x[0, 0]

    run = jax.jit(chain, donate_argnums=0)

    def call():
        nonlocal x
        x, one = run(x, w)
        return one

    call.flops = 2 * size**3 * count
    return call


# ---- Parts ----


def _time(call: Callable[[], jax.Array], count: int) -> float:
    """The seconds of a call, out of `count` that are queued as `train` queues its steps."""
    began, in_flight = time.perf_counter(), collections.deque()
    for _ in range(count):
        in_flight.append(call())
        if len(in_flight) > IN_FLIGHT:
            jax.block_until_ready(in_flight.popleft())
    jax.block_until_ready(list(in_flight))
    return (time.perf_counter() - began) / count


def _memory(program: jax.stages.Compiled) -> dict[str, float | None]:
    devices = [device.memory_stats() or {} for device in jax.local_devices()]  # None or nothing on a CPU
    peaks = [device["peak_bytes_in_use"] for device in devices if "peak_bytes_in_use" in device]
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"compiled": perf.compiled_memory(program)["total"], "peak": max(peaks, default=None), "resident": resident}


def _say(text: str) -> None:
    if jax.process_index() == 0:
        console.say(text)


# ---- The peer ----


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"the command given to --peer cannot be read ({error}): {command}.") from error
    if not words or shutil.which(words[0]) is None:
        raise UserError(f"the command given to --peer does not begin with a program that is here: {command!r}.")
    return words


def ask(command: str) -> float:
    """Runs the peer; returns its seconds per step.

    Raises:
      UserError: it cannot be run, fails, or does not say.
    """
    done = subprocess.run(_words(command), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"the peer failed with status {done.returncode} ({last}): fix the command given to --peer.")
    for line in reversed(done.stdout.splitlines()):
        try:
            return float(json.loads(line)["seconds_per_step"])
        except (ValueError, TypeError, KeyError):
            continue
    raise UserError('the peer printed no line of JSON with "seconds_per_step": fix the command given to --peer.')


def _compared(command: str, seconds: list[float], ours: float) -> dict[str, Any]:
    median = float(np.median(seconds))
    return {"command": command, "seconds_per_step": median, "all": seconds, "ratio": ours / median}
