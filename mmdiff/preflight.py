"""Whether a command would start on machines that are not here: `mmdiff COMMAND --check N ARGUMENTS`, before they are paid for.

The config is built and, for training, its state is laid out, from shapes alone, on a mesh of N simulated devices. Nothing is trained,
read of data or written. Paths on disks that are not here, such as /mnt/runs, cannot be checked, and are said to be elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pathlib
from typing import Any

from mmdiff import config as configs
from mmdiff import console, runs
from mmdiff.errors import UserError
from mmdiff.training import distributed

PATHS = ("samples", "reference", "weights", "captions", "clip")  # arguments of `eval --samples` that are read


def check(args: argparse.Namespace) -> None:
    """Prints what would start. Raises UserError as the command itself would, if it can be known here."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator that is here is left alone; jax reads it when it is imported
    import jax

    if args.check:
        with contextlib.suppress(RuntimeError):  # jax has started, as in a notebook
            jax.config.update("jax_num_cpu_devices", args.check)
    for name in PATHS:
        _is_here(f"--{name}", getattr(args, name, None) or "")
    if getattr(args, "samples", None):
        console.out(f"{args.command} would start")
        return
    config, module = configs.load(args.config, args.overrides)
    elsewhere = [value for key, value in configs.flatten(config).items() if _is_path(key, value) and not _is_here(f"--config.{key}", value)]
    try:
        with configs.blaming(config, module, args.overrides):
            experiment = configs.build(config, module)
            size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(experiment.init, jax.random.key(0))))
            _CHECKS.get(args.command, lambda *given: None)(args, config, module, experiment)
    except UserError as error:
        there = next((path for path in elsewhere if path in str(error)), None)
        if there is None:
            raise
        console.out(f"{args.command}: {there} is not on this machine, so only the values of the config are checked")
        return
    console.out(f"{args.command} would start{f' on {args.check} devices' if args.check else ''}: {size:,} parameters")


def _train(args: argparse.Namespace, config: Any, module: Any, experiment: Any) -> None:
    import jax

    from mmdiff.training import loop, sharding

    distributed.check_one_writer(args.workdir, args.distributed or args.coordinator is not None)
    loop.check(experiment, config)
    if not args.check:
        return
    mesh = sharding.make_mesh(dict(config.train.mesh), jax.devices()[: args.check])
    sharding.check_batch(config.train.global_batch, mesh, config.train.microbatches)
    sharding.abstract_state(experiment.init, experiment.optimizer, mesh, experiment.rules, experiment.loss)


def _sample(args: argparse.Namespace, config: Any, module: Any, experiment: Any) -> None:
    from mmdiff import sample_sets

    if os.path.isdir(args.workdir):
        run = runs.open_run(args.config, args.workdir, args.overrides, step=args.step)
    else:
        workdir, overrides = pathlib.Path(args.workdir), tuple(args.overrides)
        run = runs.Run(args.config, config, experiment, workdir, module, overrides, args.step, experiment.modalities, workdir)
    run.settings(args.steps, args.guidance, args.seed)
    given = dict(text.partition("=")[::2] for text in args.given)
    known = {name: value for name, value in given.items() if _is_here(f"--given {name}=", value)}
    if args.classes:
        known |= sample_sets.classes(run, args.classes, 1, 0, {*given, *args.absent})
    run.parse(None if args.number is None else 1, {name: value for name, value in known.items() if "/" not in str(value)}, args.absent)
    if args.format:
        sample_sets.shown(run, {*given, *known}, args.absent)


def _eval(args: argparse.Namespace, config: Any, module: Any, experiment: Any) -> None:
    if os.path.isdir(args.workdir):
        experiment = runs.open_run(args.config, args.workdir, args.overrides, step=args.step).experiment
    runs.check_measured(args.config, experiment)


def _cache(args: argparse.Namespace, config: Any, module: Any, experiment: Any) -> None:
    distributed.check_encodes_alone(args.workdir, args.distributed or args.coordinator is not None)
    if args.workdir is None and getattr(experiment.cache, "encoders", None) is None:
        raise UserError(f"{args.config} names no published encoders: give --workdir DIR, the run of a tokenizer or of towers.")
    for encoder in getattr(experiment.cache, "encoders", None) or ():
        if not encoder.path:
            encoder.opened  # noqa: B018 - says which key names it


_CHECKS = {"train": _train, "sample": _sample, "eval": _eval, "cache": _cache}


def _is_path(key: str, value: Any) -> bool:
    """Whether a value of a config is a path that is read."""
    from mmdiff.training.run_metadata import FOLDERS

    return isinstance(value, str) and bool(value) and (key == "train.start" or key in FOLDERS and not key.endswith(".kind")) and (
        os.sep in value or value.startswith("~"))


def _is_here(what: str, value: str) -> bool:
    """Whether there is a file or folder of that path; false if its disk is not here. Raises UserError if the disk is, without it."""
    path = os.path.expanduser(value)
    if "://" in path:
        return False
    if os.sep not in path or os.path.exists(path):
        return True
    disk = os.sep.join(path.split(os.sep)[:3])  # /mnt/runs
    if os.path.isabs(path) and not os.path.exists(disk):
        return False
    raise UserError(f"{what} names {value}, which is not there: correct the path, or create it first.")
