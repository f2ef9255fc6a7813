"""The command line: `python -m mmdiff train | sample | eval | cache | bench | aot`.

Nothing here imports jax before it is needed, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import errno
import functools
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence

from mmdiff import __version__, checks, console, former_names, suggest
from mmdiff import config as configs
from mmdiff.errors import UserError
from mmdiff.keys import check_seed
from mmdiff.training import distributed

OVERRIDE = "--config."
LARGEST_BATCH = 256  # samples drawn by one call of the network
IN_USE = ("sample", "eval", "seed", "data.dir", "data.towers")  # the keys and sections of a config that sample and eval may set

ABOUT = f"""\
mmdiff {__version__}: multi-modal diffusion in JAX and Flax.

A run is a config file (values plus a constructor) and a folder, its workdir.
Every value of the config can be replaced on the command line, as in
--config.train.steps=100."""

TRAIN = """\
Trains, and writes config.json, checkpoints, metrics.jsonl and TensorBoard
events to the workdir. The same command continues a run that was stopped (by
Ctrl-C, SIGTERM, SIGUSR1 or a crash) as if it had not been; a finished run
returns at once."""

EVAL = """\
Runs every evaluator of the config on the averaged (EMA) weights of the last
checkpoint, prints the metrics, and writes report.json (all metrics) and
report.html (metrics and figures) to the workdir. The values of the config are
the run's own; config.sample, config.eval, config.seed and the folders of the
data can be set.

Whatever you choose by its metrics, choose with --split validation, which writes
report-validation.json and .html and leaves the test data alone: what is
reported of the test data then was not chosen on them."""

CACHE = """\
Encodes every split of a tokenizer's data once, with the averaged (EMA) weights
of the last checkpoint, and writes the tokens, the other arrays of the data and
the weights, which decode tokens, to a folder. Of towers (CLIP's kind) it writes
the weights. The folder is whole or absent; if the same cache is there, nothing
is done. Configs that train on tokens, or on texts' vectors, name the folder."""

AOT = """\
Compiles the training step for TPUs that are not here, and prints what it needs
of each chip: memory by kind, and whether it fits; FLOPs, what it sends and
moves, and the least time of a step that these allow. If it does not fit, tries
what needs less and prints the flags of the first that does. Nothing is run.
Needs pip install 'mmdiff[tpu-aot]'."""

BENCH = """\
Times training on this machine, on random examples: seconds per step, images per
second and chip, the share of the chip's speed that is used (MFU), what a step
takes beyond the bare gradient and update, the wait for data, compile time and
memory. The program is the one that train runs, and is fed in the same way.

With --peer it takes turns with another program, and prints the ratio. That
program must print a last line of JSON with its "seconds_per_step"; on a GPU the
memory must suffice for both.

Needs no data, and of Python packages only jax, flax, optax, chex, numpy,
ml_collections and what the config imports."""

SAMPLE = """\
Draws samples with the averaged (EMA) weights of the last checkpoint, and writes
samples.png and samples.npz, and of sounds a wav file each.

Each modality is drawn, unless it is given (--given NAME=VALUE holds its value)
or absent (--absent NAME: it says nothing about the others). So one model draws
both, images of a label, the label of an image, and images alone. Sample i
depends on the seed and on i only, not on --number. The values of the config are
the run's own; config.sample, config.eval, config.seed and the folders of the
data can be set."""

USE = "--config configs/digits_joint.py --workdir runs/digits_joint"
TOKENIZER = "--config configs/cdcd/scenes_tokenizer.py --workdir runs/scenes_tokenizer"
EXAMPLES = {
    "train": [f"train {USE}", f"train {USE} --config.train.steps=100"],
    "aot": [
        "aot --config configs/imagenet256/dit_xl2.py --topology v5e:4x4 --config.train.mesh.fsdp=16",
        "aot --config configs/imagenet256/dit_xl2.py --topology v5p:2x2x4 --slices 2 --json report.json",
    ],
    "bench": [
        "bench --config configs/imagenet256/dit_xl2.py --config.model.size=S --config.train.global_batch=8",
        "bench --config configs/imagenet256/dit_xl2.py --json bench.json --peer 'python their_step.py --batch 256'",
    ],
    "eval": [f"eval {USE}", f"eval {USE} --split validation --config.sample.guidance=1.3"],
    "cache": [f"cache {TOKENIZER} --out runs/scenes_tokens", f"cache {TOKENIZER} --out runs/scenes_tokens --split train"],
    "sample": [
        f"sample {USE} --number 64",
        f"sample {USE} --given label=7 --guidance 1.5",
        f"sample {USE} --given image=seven.png",
        f"sample {USE} --absent label --seed 1",
    ],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for a mistake of the user, 130 for Ctrl-C, 141 for a closed pipe.

    A training that a signal stopped raises SystemExit with 128 + the signal.
    """
    console.open_standard_files()
    # TensorFlow only writes events here: its notes at start-up would be all that is seen of it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a caption or a path that the terminal cannot show
    try:
        args = _arguments(sys.argv[1:] if argv is None else argv)
        args.run(args)
    except (OSError, RuntimeError, ValueError) as error:
        text = str(error) if isinstance(error, UserError) else _of_the_system(error)
        if not text:
            raise
        console.say(f"mmdiff: error: {' '.join(text.split())}")
        return 2
    except KeyboardInterrupt:
        console.say("mmdiff: interrupted")
        return 130
    if (reason := console.failure()) == "pipe":
        return 128 + signal.SIGPIPE  # as of any program whose reader has seen enough; the work is done
    if reason:
        console.say(f"mmdiff: error: stdout cannot be written ({reason}), only the files are: see to it and run the same command again.")
        return 2
    return 0


# ---- Arguments ----


def _of_the_system(error: BaseException) -> str:
    """What the operating system or jax said, if that is about a path or a setting of the user; else nothing."""
    if isinstance(error, (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)) and error.filename:
        return f"{error.filename} cannot be used ({error.strerror}): check the path and who may read and write it."
    if re.search(r"for (environment|config) '?JAX_\w+'?$", str(error)):
        return f"jax does not take an environment variable: {error}: correct it, or leave it out."
    if str(error).startswith("Unable to initialize backend") or "Unknown backend" in str(error):
        platforms = f" (JAX_PLATFORMS={os.environ['JAX_PLATFORMS']})" if os.environ.get("JAX_PLATFORMS") else ""
        return f"jax cannot start{platforms}: {str(error).partition(chr(10))[0].rstrip('.')}; correct JAX_PLATFORMS or the drivers."
    return ""


class _Parser(argparse.ArgumentParser):
    """Its mistakes are UserErrors, and say what was meant. `flags` has the names of its options: name -> whether it may be repeated."""

    def __init__(self, *args, **kwargs):
        self.flags: dict[str, bool] = {}
        super().__init__(*args, **kwargs)

    def add_argument(self, *names, **kwargs):
        self.flags.update({name: kwargs.get("action") == "append" for name in names if name.startswith("-")})
        return super().add_argument(*names, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help).")

    def check_flags(self, argv: Sequence[str]) -> None:
        """Raises UserError at flags that do not exist or are set twice, of which argparse takes the last."""
        seen = set()
        for arg in argv:
            flag = arg.partition("=")[0]
            if arg == "--" or not arg.startswith("--"):
                continue
            if flag not in self.flags:
                key = flag.removeprefix("--")
                near = f"{OVERRIDE}{key}=VALUE" if "." in key else suggest.word(flag, self.flags)
                meant = f", did you mean {near}?" if near else ""
                raise UserError(f"unrecognized arguments: {checks.short(arg)[1:-1]}{meant} (see {self.prog} --help).")
            if flag in seen and not self.flags[flag]:
                raise UserError(f"{flag} is set twice: keep one (see {self.prog} --help).")
            seen.add(flag)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    # Overrides are taken out first: their names are the config's, not known here.
    overrides = [arg.removeprefix(OVERRIDE).partition("=") for arg in argv if arg.startswith(OVERRIDE)]
    for key, equals, _ in overrides:
        if not equals:
            raise UserError(f"{OVERRIDE}{key} has no value: write {OVERRIDE}{key}=VALUE, without a space.")
    plain = [arg for arg in argv if not arg.startswith(OVERRIDE)]
    parser, commands = _parser()
    if plain and not plain[0].startswith("-"):
        if plain[0] not in commands:
            near = suggest.word(plain[0], commands)
            meant = f"did you mean {near!r}?" if near else "it is none of the commands."
            raise UserError(f"invalid choice: {checks.short(plain[0])} (choose from {', '.join(commands)}): {meant}")
        commands[plain[0]].check_flags(plain[1:])
    args, rest = parser.parse_known_args(plain)
    if rest:
        setting = next((arg for arg in rest if "=" in arg), None)
        hint = f"write {OVERRIDE}{setting.removeprefix('config.')} to set a value of the config" if setting else "quote what holds spaces"
        raise UserError(f"unrecognized arguments: {checks.short(' '.join(rest))[1:-1]}: {hint} (see {commands[plain[0]].prog} --help).")
    args.overrides = [(key, text) for key, _, text in overrides]
    return args


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """-> (the parser, those of the commands)."""
    style = {"formatter_class": _format, "allow_abbrev": False}
    parser = _Parser(prog="mmdiff", description=ABOUT, epilog=_examples(*EXAMPLES), **style)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="train | sample | eval | cache | bench | aot")

    def command(name, run, summary, about, workdir=True):
        sub = commands.add_parser(name, help=summary, description=about, epilog=_examples(name), **style)
        sub.set_defaults(run=run)
        sub.add_argument("--config", type=_path, required=True, metavar="FILE", help="the config file: configs/digits_joint.py")
        if workdir:
            sub.add_argument("--workdir", type=_path, required=True, metavar="DIR", help="the folder of the run")
        # Only shown: _arguments takes the overrides out before parsing.
        sub.add_argument(f"{OVERRIDE}KEY=VALUE", action="store_true", help="replace a value of the config; repeatable")
        return sub

    def of_checkpoint(sub):
        sub.add_argument("--step", type=_step, metavar="N|best", help="which checkpoint (default: the last); best: by config.train.best")

    def of_processes(sub):
        option = sub.add_argument
        option("--distributed", action="store_true", help="join the other processes of the run (TPU slice, Slurm, Open MPI, Kubernetes)")
        option("--coordinator", metavar="HOST:PORT", help="where the launcher is unknown: the address of process 0,")
        option("--processes", metavar="N", help="how many processes there are,")
        option("--process", metavar="I", help="and which one this is, from 0")

    sub = command("train", _train, "train, or continue a run", TRAIN)
    of_processes(sub)
    sub = command("bench", _bench, "measure how fast training is here", BENCH, workdir=False)
    option = sub.add_argument
    option("--steps", type=_count, default=5, metavar="N", help="timed steps in a round (default: 5)")
    option("--rounds", type=_count, default=5, metavar="N", help="rounds in which the programs take turns (default: 5)")
    option("--peer", default="", metavar="COMMAND", help="another program to compare with, in quotes")
    option("--json", type=_path, metavar="FILE", help="write the metrics to a file, too")
    of_processes(sub)
    sub = command("aot", _aot, "what a training step needs of TPUs that are not here", AOT, workdir=False)
    option = sub.add_argument
    option("--topology", required=True, metavar="KIND:SHAPE", help="the TPUs: v4:2x2x2, v5e:4x4, v5p:2x2x1, v6e:16x16, ...")
    option("--slices", type=_count, default=1, metavar="N", help="so many of them, joined by the data-centre network (default: 1)")
    option("--json", type=_path, metavar="FILE", help="write the report to a file, too")
    sub = command("sample", _sample, "draw samples from a trained model", SAMPLE)
    option = sub.add_argument
    option("--number", type=_count, metavar="N", help="samples to draw (default: what a given file holds, or 16)")
    option("--given", action="append", default=[], metavar="NAME=VALUE", help="hold a modality at a value; repeatable")
    option("--absent", action="append", default=[], metavar="NAME", help="leave a modality out; repeatable")
    option("--steps", type=_calls, metavar="N", help="sampling steps (default: config.sample.steps)")
    option("--guidance", type=_guidance, metavar="W", help="guidance weight (default: config.sample.guidance)")
    option("--seed", type=_seed, metavar="S", help="seed of the samples (default: config.seed)")
    of_checkpoint(sub)
    option("--out", type=_path, metavar="DIR", help="where the samples are written (default: WORKDIR/samples)")
    sub = command("eval", _eval, "measure a trained model and write the report", EVAL)
    of_checkpoint(sub)
    sub.add_argument("--split", choices=("test", "validation"), default="test", help="what to measure on (default: test)")
    sub.add_argument("--reuse", action="store_true", help="print the report of this checkpoint and config if there is one")
    sub.add_argument("--zeroshot", metavar="NAMES", help="classify images of published sets by prompts, too: all, or cifar10,food101")
    sub.add_argument("--zeroshot-dir", type=_path, metavar="DIR", help="where these data sets are (default: where TFDS keeps them)")
    sub = command("cache", _cache, "encode a data set with a trained tokenizer", CACHE)
    option = sub.add_argument
    option("--out", type=_path, required=True, metavar="DIR", help="the folder of the cache")
    option("--split", action="append", default=[], metavar="NAME", help="encode this split only; repeatable")
    of_checkpoint(sub)
    return parser, dict(commands.choices)


def _format(prog: str) -> argparse.HelpFormatter:
    width = min(100, shutil.get_terminal_size().columns)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=width)


def _examples(*commands: str) -> str:
    return "examples:\n" + "\n".join(f"  python -m mmdiff {line}" for name in commands for line in EXAMPLES[name])


def _path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"it must be a path, not {checks.short(text)}")
    return text


def _integer(text: str, allowed: checks.Range) -> int:
    value = int(text) if text.isdecimal() and len(text) < 4000 else -1
    if not allowed.low <= value <= allowed.high:
        bound = f"at most {allowed.high:,}" if value > allowed.high else f"an integer of {allowed.low} or more"
        raise argparse.ArgumentTypeError(f"it must be {bound}, not {checks.short(text)}")
    return value


def _count(text: str) -> int:
    return _integer(text, checks.Range(1, 1_000_000))


def _calls(text: str) -> int:
    return _integer(text, checks.NETWORK_CALLS)


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"it must be the step of a checkpoint or best, not {text!r}")
    return text if text == "best" else _integer(text, checks.Range(0, math.inf))


def _seed(text: str) -> int:
    try:
        seed = int(text) if text.removeprefix("-").isdecimal() and len(text) < 4000 else checks.short(text)[1:-1]
        check_seed(seed, "it")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
    return seed


def _guidance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if wrong := checks.GUIDANCE.wrong(value):
        raise argparse.ArgumentTypeError(f"it must be {wrong}, not {checks.short(text)}")
    return value


# ---- Commands ----


def _train(args: argparse.Namespace) -> None:
    config, module = configs.load(args.config, args.overrides)
    where = distributed.address(args.coordinator, args.processes, args.process)
    _writable("--workdir", args.workdir)
    _start_jax()
    if args.distributed or where:
        distributed.start(**where)
    from mmdiff.training import loop

    with configs.blaming(config, module, args.overrides):
        loop.train(configs.build(config, module), config, args.workdir)


def _bench(args: argparse.Namespace) -> None:
    config, module = configs.load(args.config, args.overrides)
    where = distributed.address(args.coordinator, args.processes, args.process)
    _writable("--json", args.json, folder=False)
    if args.peer:  # on a GPU jax would take three quarters of the memory at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.distributed or where:
        distributed.start(**where)
    import jax

    from mmdiff.training import bench

    _keep_memory()  # as train does
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
    with configs.blaming(config, module, args.overrides):
        found = bench.measure(configs.build(config, module), config, steps=args.steps, rounds=args.rounds, peer=args.peer)
    if jax.process_index() == 0:
        console.out(bench.table(found))
        _write_json(args.json, found)


def _aot(args: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run: leave an accelerator that is here alone; jax reads it when it is imported
    _writable("--json", args.json, folder=False)
    config, module = configs.load(args.config, args.overrides)
    from mmdiff.training import aot

    def load(overrides):
        config, module = configs.load(args.config, [*args.overrides, *overrides.items()])
        return config, configs.build(config, module)

    with configs.blaming(config, module, args.overrides):
        found = aot.report(load, args.topology, args.slices)
    console.out(aot.text(found))
    _write_json(args.json, found)


def _sample(args: argparse.Namespace) -> None:
    if _is_spare():
        return
    config, experiment = _open(args)
    given, number = _given(experiment, args)
    _writable("--out", args.out)
    out = pathlib.Path(args.out or os.path.join(args.workdir, "samples"))
    _writable("the folder of the samples,", out)
    for text in args.given:
        file = pathlib.Path(text.partition("=")[2]).expanduser()
        if file.name.startswith("samples") and file.parent.resolve() == out.resolve():
            raise UserError(f"--given {text} would be overwritten by what is sampled: name another folder with --out.")
    from mmdiff.training import checkpoints

    sampler = config.get("sample", {})
    steps = sampler.get("steps") if args.steps is None else args.steps
    if steps is None:
        raise UserError(f"{args.config} has no config.sample.steps: name --steps.")
    guidance = float(sampler.get("guidance", 1.0) if args.guidance is None else args.guidance)
    absent = tuple(sorted(set(args.absent)))
    params, step = checkpoints.restore_for_inference(experiment, config, args.workdir, step=args.step)
    seed = config.seed if args.seed is None else args.seed
    samples = _draw(experiment, params, given, number, seed, absent, steps=steps, guidance=guidance)
    _make_folder(out)
    console.out(f"{number} samples of step {step} (seed {seed}, {steps} steps, guidance {guidance:g})")
    for path in _write_samples(experiment, samples, out):
        console.out(path)


def _eval(args: argparse.Namespace) -> None:
    if _is_spare():
        return
    args.overrides += _zeroshot(args)
    config, experiment = _open(args)
    if not experiment.evaluators:
        raise UserError(f"{args.config} measures nothing as it is set: see its head, or give its Experiment evaluators.")
    _writable("--workdir", args.workdir)
    from mmdiff.evals import report
    from mmdiff.training import checkpoints

    if args.split == "validation":
        experiment = experiment.on_validation()
    params, step = checkpoints.restore_for_inference(experiment, config, args.workdir, step=args.step)
    json_path, html_path = report.paths(args.workdir, args.split)
    if not (args.reuse and _is_report_of(json_path, config, step) and html_path.exists()):
        key = _key(config.seed, "eval")
        results = [evaluate(experiment, params, config, key, step) for evaluate in experiment.evaluators]
        meta = checkpoints.read_meta(args.workdir, step)  # of the checkpoint itself: run.json is only written when a run ends
        cost = {**checkpoints.cost(meta), "steps": step} if meta else None
        json_path, html_path = report.write(args.workdir, experiment, config, results, step, cost)
    written = json.loads(json_path.read_text())
    console.out(_table({name: value for name, value in written.items() if isinstance(value, (int, float))}))
    console.out(json_path)
    console.out(html_path)


def _zeroshot(args: argparse.Namespace) -> list[tuple[str, str]]:
    """What --zeroshot and --zeroshot-dir set in the config."""
    given = {name: value for name in ("zeroshot", "zeroshot_dir") if (value := getattr(args, name)) is not None}
    if not given:
        return []
    if not given.get("zeroshot", "").strip():
        raise UserError("--zeroshot-dir is where --zeroshot looks: say which data sets, --zeroshot all or --zeroshot cifar10,food101.")
    if args.split != "test":
        raise UserError("--zeroshot measures published test sets, on which nothing is to be chosen: leave --split validation out.")
    if "zeroshot" not in configs.load(args.config, args.overrides)[0].get("eval", {}):
        raise UserError(
            f"{args.config} has no vectors of images and texts to classify by: --zeroshot is for configs/diffdis/sd_scale.py, scenes.py, "
            "scenes_towers.py and what sets config.eval.zeroshot.")
    return [(f"eval.{name}", value) for name, value in given.items()]


def _cache(args: argparse.Namespace) -> None:
    if _is_spare():
        return
    config, experiment = _open(args)
    if experiment.cache is None:
        raise UserError(
            f"{args.config} trains no tokenizer and no towers, so there is nothing to cache: see configs/cdcd/scenes_tokenizer.py.")
    _writable("--out", args.out)
    from mmdiff.training import checkpoints

    params, step = checkpoints.restore_for_inference(experiment, config, args.workdir, step=args.step)
    made_by = {"config": json.loads(configs.to_json(config)), "step": step}
    written = experiment.cache.write(args.out, params, made_by, args.split)
    console.out(f"{'' if written else 'nothing to do: '}{args.out} holds {experiment.cache.holds(args.out, step)}")


# ---- Parts ----


def _start_jax() -> None:
    """Sets what has to be set before the first computation."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "mmdiff", "jax"))
    _keep_memory()


def _keep_memory() -> None:
    """Tells glibc to keep freed memory: a step on a CPU takes the same gigabytes each time, and fresh pages cost up to a fifth of it."""
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        mmap_max, trim_threshold = -4, -1  # the numbers of <malloc.h>
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def _is_spare() -> bool:
    """Whether a launcher has started this process beside another: one draws samples and evaluates."""
    name, rank = distributed.rank()
    if rank:
        console.say(f"mmdiff: nothing to do in process {rank} ({name}): process 0 alone does this.")
    return rank > 0


def _open(args: argparse.Namespace):
    """-> (config, experiment) of a run that exists: its stored values, on which the overrides are put."""
    config, module = configs.load(args.config, args.overrides)
    if "://" not in args.workdir and not os.path.isdir(args.workdir):
        command = f"mmdiff train --config {args.config} --workdir {args.workdir}"
        raise UserError(f"there is no run in {args.workdir}: train it first, with {command}.")
    from mmdiff.training import run_metadata

    asked = {key: configs.flatten(config)[key] for key, _ in args.overrides}
    stored = former_names.keys(configs.flatten(run_metadata.read_config(args.workdir)), configs.flatten(config))
    for key, (old, new) in configs.difference({key: stored.get(key) for key in asked} if stored else asked, asked).items():
        if not any(key == name or key.startswith(f"{name}.") for name in IN_USE):
            free = ", ".join(f"config.{name}" for name in IN_USE)
            raise UserError(f"config.{key} is {old!r} in the run in {args.workdir}, not {new!r}: only {free} can be set here.")
    for key, value in stored.items():
        old = configs.flatten(config).get(key)
        if (key == "seed" or key.startswith("sample.")) and old is not None and not configs.is_like(value, old):
            there = f"{args.workdir}/config.json"
            raise UserError(f"config.{key} is {checks.short(value)} in {there}, where {old!r} was possible: restore that file.")
    configs.put(config, stored)
    configs.put(config, asked)
    _start_jax()
    with configs.blaming(config, module, args.overrides):
        experiment = configs.build(config, module)
        if args.run is _eval:
            run_metadata.check_classes(args.workdir, experiment)
        return config, run_metadata.with_class_names(experiment, args.workdir)


def _key(seed: int, use: str):
    """The random key of a command; neither training nor the other command has it."""
    import jax
    import numpy as np

    from mmdiff.keys import key_of

    return jax.random.fold_in(key_of(seed, "the seed"), np.uint32(zlib.crc32(use.encode())))


def _given(experiment, args: argparse.Namespace):
    """-> ({name: [number, ...]}, number). One value is repeated; several (7,7,3 or a file) set the number."""
    import numpy as np

    pairs = [text.partition("=") for text in args.given]
    names = [name for name, _, _ in pairs]
    for flag, name in [("--given", name) for name in names] + [("--absent", name) for name in args.absent]:
        if name not in experiment.shape:
            near = suggest.word(name, experiment.shape)
            meant = f", did you mean {near!r}?" if near else "."
            raise UserError(f"{flag} names an unknown modality {checks.short(name)}: this model has {', '.join(experiment.shape)}{meant}")
    for name, _, value in pairs:
        if not value.strip():
            raise UserError(f"--given {name} has no value: write --given {name}=VALUE, or leave it out by --absent {name}.")
        if names.count(name) > 1 or name in args.absent:
            raise UserError(f"the modality {name} is set twice: use one --given or one --absent for it.")
    if set(experiment.shape) <= {*names, *args.absent}:
        raise UserError("no modality is left to draw: leave out one --given or --absent.")
    parsed = {name: experiment.modalities[name].parse(value) for name, _, value in pairs}
    counts = {name: len(array) for name, array in parsed.items() if len(array) > 1}
    number = args.number or max(counts.values(), default=16)
    for name, count in counts.items():
        if count != number:
            raise UserError(f"--given {name} holds {count} examples, not {number}: leave --number out or use {count}.")
    return {name: np.broadcast_to(array, (number, *array.shape[1:])) for name, array in parsed.items()}, number


def _draw(experiment, params, given, number: int, seed: int, absent: tuple[str, ...], **options) -> dict:
    """Draws `number` samples in equal batches; the modalities that are absent are left out of the answer."""
    from mmdiff.evals.evaluator import example_keys, in_batches

    keys = example_keys(_key(seed, "sample"), number)
    draw = functools.partial(experiment.sample, absent=absent, **options)
    size = -(-number // -(-number // LARGEST_BATCH))
    samples = in_batches(draw, params, keys, given, size)
    return {name: array for name, array in samples.items() if name not in absent}


def _write_samples(experiment, samples: Mapping, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes samples.npz, a grid of images, captioned with the modalities that are text, and files of sounds; prints that text.

    All hold the same: pixels that are possible in the data, so that --given reads them back.
    """
    import numpy as np

    from mmdiff.evals.plots import grid

    samples = {name: getattr(experiment.modalities[name], "quantize", np.asarray)(array) for name, array in samples.items()}
    shown = {name: experiment.modalities[name].show(array) for name, array in samples.items()}
    texts = {name: value for name, value in shown.items() if not isinstance(value, np.ndarray)}
    grids = {name: value for name, value in shown.items() if isinstance(value, np.ndarray)}
    for name, values in texts.items():
        console.out(f"{name}: {' '.join(map(str, values))}")
    captions = [" ".join(map(str, row)) for row in zip(*texts.values())]
    paths = [out / "samples.npz"]
    try:
        np.savez(paths[0], **samples)
        for name, images in grids.items():
            paths.append(out / ("samples.png" if len(grids) == 1 else f"samples_{name}.png"))
            grid(images, math.isqrt(len(images) - 1) + 1, captions or None).save(paths[-1])
        for name, array in samples.items():
            if hasattr(experiment.modalities[name], "write"):
                paths += experiment.modalities[name].write(array, out)
    except OSError as error:
        raise UserError(f"cannot write {paths[-1]}: {error.strerror or error}.") from error
    return paths


def _is_report_of(path: pathlib.Path, config, step: int) -> bool:
    from mmdiff.data import files

    try:
        report = files.read_json(path)
    except UserError:
        return False
    return isinstance(report, Mapping) and report.get("step") == step and report.get("config") == json.loads(configs.to_json(config))


def _table(metrics: Mapping[str, object]) -> str:
    """Names and values in two columns, fractions with four decimals."""
    width = max(map(len, metrics), default=0)
    texts = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in metrics.items()}
    return "\n".join(f"{name:<{width}}  {text}" for name, text in texts.items())


def _write_json(path: str | None, found: Mapping[str, object]) -> None:
    if path:
        try:
            pathlib.Path(path).write_text(json.dumps(configs.plain(found), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}.") from error


def _writable(flag: str, path: str | os.PathLike | None, folder: bool = True) -> None:
    """Raises UserError, before any work, unless a folder (or a file) `path` can be written. Makes nothing."""
    if path is None:
        return
    remedy = "choose a folder that you can write to" if folder else "choose another file"
    if "://" in str(path):
        raise UserError(f"{flag} {path} is not a path: mount the bucket (gcsfuse, s3fs) and name a {'folder' if folder else 'file'} in it.")
    try:
        shown, path = checks.short(str(path))[1:-1], pathlib.Path(path).absolute()
        if os.path.lexists(path) and not path.exists():
            raise UserError(f"cannot write to {shown} (a link that leads nowhere): {remedy}.")
        if path.exists() and path.is_dir() != folder:
            raise UserError(f"cannot write to {shown} ({'not a directory' if folder else 'a directory'}): {remedy}.")
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        if there == path and not folder:
            with path.open("ab"):
                return
        if not folder and there != path.parent:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if any(len(os.fsencode(part)) > 255 for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {shown} ({error.strerror}): {remedy}.") from error


def _make_folder(path: str | os.PathLike) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): choose a folder that you can write to.") from error


if __name__ == "__main__":
    sys.exit(main())
