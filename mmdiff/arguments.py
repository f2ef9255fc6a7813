"""The arguments of the command line: what the commands are called, take and say in their help, and one sentence for each mistake."""

from __future__ import annotations

import argparse
import functools
import math
import shutil
from collections.abc import Sequence

from mmdiff import __version__, checks, help_texts, suggest
from mmdiff.errors import UserError
from mmdiff.keys import check_seed

OVERRIDE = "--config."

ABOUT = f"""\
mmdiff {__version__}: multi-modal diffusion in JAX and Flax.

A run is a config (values plus a constructor) and a folder, its workdir.
Every value of the config can be replaced on the command line, as in
--config.train.steps=100."""


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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """`command` and its options; `overrides`, pairs of a key of the config and the text of its value. Raises UserError at mistakes."""
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
    if args.command == "eval":
        _check_eval(args, commands["eval"])
    return args


def _check_eval(args: argparse.Namespace, parser: _Parser) -> None:
    """Raises UserError unless a run is measured, or samples, with the options of that alone."""
    of_run = {"--config": args.config, "--workdir": args.workdir}
    of_samples = {
        "--reference": args.reference, "--write-statistics": args.write_statistics, "--network": args.network, "--weights": args.weights,
        "--size": args.size, "--paired": args.paired, "--captions": args.captions, "--clip": args.clip, "--json": args.json}
    if args.samples is None:
        if missing := [flag for flag, value in of_run.items() if value is None]:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
        wrong, of = of_samples, "--samples"
    else:
        of_run |= {"--step": args.step, "--split validation": args.split != "test", "--reuse": args.reuse, "--zeroshot": args.zeroshot}
        of_run |= {"--zeroshot-dir": args.zeroshot_dir, "--zeroshot-images": args.zeroshot_images, "--prompts": args.prompts}
        wrong, of = of_run | {f"{OVERRIDE}KEY=VALUE": args.overrides}, "a run, not with --samples"
        if (args.reference is None) == (args.write_statistics is None):
            parser.error("--samples are measured against --reference, or stored by --write-statistics: give one of both")
        if (args.captions is None) != (args.clip is None):
            parser.error("--captions FILE and --clip DIR go together: give both or none")
        for flag, value in (("--paired", args.paired), ("--captions", args.captions), ("--json", args.json)):
            if args.write_statistics is not None and value:
                parser.error(f"{flag} goes with --reference, not with --write-statistics: leave it out")
    if given := [flag for flag, value in wrong.items() if value not in (None, False, [])]:
        parser.error(f"{given[0]} goes with {of}: leave it out" if args.samples else f"{given[0]} goes with {of}: give both")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """-> (the parser, those of the commands)."""
    style = {"formatter_class": _format, "allow_abbrev": False}
    parser = _Parser(prog="mmdiff", description=ABOUT, epilog=_examples(*help_texts.EXAMPLES), **style)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="train | sample | eval | configs | cache | convert | bench | aot")

    def add(name, summary, about):
        sub = commands.add_parser(name, help=summary, description=about, epilog=_examples(name), **style)
        sub.set_defaults(command=name)
        return sub

    def command(name, summary, about, workdir=True, required=True, config_required=True):
        sub = add(name, summary, about)
        about_config = "a shipped config (mmdiff configs) or a file"
        sub.add_argument("--config", type=_path, required=config_required, metavar="NAME|FILE", help=about_config)
        if workdir:
            sub.add_argument("--workdir", type=_path, required=required, metavar="DIR", help="the folder of the run")
        # Only shown: `parse` takes the overrides out before parsing.
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
        option("--check", type=_devices, nargs="?", const=0, metavar="N", help="only say whether it would start (on N devices)")

    sub = command("train", "train, or continue a run", help_texts.TRAIN)
    about_profile = "trace N steps, after the first ten, or the steps FIRST to LAST, into DIR/profile"
    sub.add_argument("--profile", type=_steps, metavar="N|FIRST:LAST", help=about_profile)
    of_processes(sub)
    sub = command("sample", "sample from a trained model", help_texts.SAMPLE)
    option = sub.add_argument
    option("--number", type=_count, metavar="N", help="how many samples (default: what a given file holds, or 16)")
    option("--given", action="append", default=[], metavar="NAME=VALUE", help="hold a modality at a value; repeatable")
    option("--absent", action="append", default=[], metavar="NAME", help="leave a modality out; repeatable")
    option("--steps", type=_calls, metavar="N", help="sampling steps (default: config.sample.steps)")
    option("--guidance", type=_guidance, metavar="W", help="guidance weight (default: config.sample.guidance)")
    option("--seed", type=_seed, metavar="S", help="seed of the samples (default: config.seed)")
    of_checkpoint(sub)
    option("--out", type=_path, metavar="DIR", help="where the samples are written (default: WORKDIR/samples)")
    option("--classes", choices=("balanced", "random"), help="sample i is of a class of its own: all equally often, or by chance")
    option("--format", choices=("npz", "png"), help="write a set of images: ADM's samples.npz, or numbered files")
    option("--batch", type=_count, metavar="B", help="of --format: samples that a device computes at once (default: 64)")
    of_processes(sub)
    about = "measure a trained model and write the report, or any samples"
    sub = command("eval", about, help_texts.EVAL, required=False, config_required=False)
    of_checkpoint(sub)
    sub.add_argument("--split", choices=("test", "validation"), default="test", help="what to measure on (default: test)")
    sub.add_argument("--reuse", action="store_true", help="print the report of this checkpoint and config if there is one")
    sub.add_argument("--zeroshot", metavar="NAMES|DIR", help="classify images by prompts, too: all, cifar10,food101 or a folder of classes")
    sub.add_argument("--zeroshot-dir", type=_path, metavar="DIR", help="where these data sets are (default: where TFDS keeps them)")
    sub.add_argument("--zeroshot-images", type=_count, metavar="N", help="images of each set (default: all)")
    sub.add_argument("--prompts", type=_path, metavar="FILE", help="a prompt on every line, 'a photo of a {}.' (default: the sets' own)")
    option = sub.add_argument
    option("--samples", type=_path, metavar="FILE|DIR", help="measure these images: .npz, .npy or a folder; of the rest:")
    option("--reference", type=_path, metavar="FILE|DIR", help="compare with these images or stored statistics")
    option("--network", choices=("inception", "efficientnet_lite0", "dinov2"), help="whose features (default: efficientnet_lite0)")
    option("--weights", type=_path, metavar="PATH", help="its weights (default, of efficientnet_lite0: the installed ones)")
    option("--size", type=_count, metavar="N", help="crop the images of folders to N x N, as ADM does")
    option("--paired", action="store_true", help="sample i reconstructs image i of the reference: PSNR, SSIM and rFID")
    option("--captions", type=_path, metavar="FILE", help="a line for each sample: CLIPScore, by the CLIP of")
    option("--clip", type=_path, metavar="DIR", help="this folder, as transformers or open_clip write it")
    option("--json", type=_path, metavar="FILE", help="write the metrics and what they depend on to a file, too")
    option("--write-statistics", type=_path, metavar="FILE.npz", help="store the statistics of --samples, which become a reference")
    of_processes(sub)
    sub = add("configs", "list the shipped configs, or copy one", help_texts.CONFIGS)
    sub.add_argument("name", nargs="?", type=_path, metavar="NAME", help="one of them")
    sub.add_argument("--to", type=_path, metavar="FILE.py", help="write a copy of it here, to start from")
    sub = command("cache", "encode a data set with a tokenizer or with published networks", help_texts.CACHE, required=False)
    option = sub.add_argument
    option("--out", type=_path, required=True, metavar="DIR", help="the folder of the cache")
    option("--split", action="append", default=[], metavar="NAME", help="encode this split only; repeatable")
    of_checkpoint(sub)
    of_processes(sub)
    sub = command("convert", "take published weights in, or write them out", help_texts.CONVERT)
    option = sub.add_argument
    option("--from", type=_path, dest="source", metavar="FILE|FOLDER", help="published weights: .safetensors, .pt, or diffusers' folder")
    option("--as", dest="kind", metavar="KIND", help=(
        "what they are: dit, diffusers-dit, sit, repa, lightningdit, jit, imf, vq-diffusion, unidiffuser, mmdiff"))
    option("--within", metavar="NAME", help="the dictionary of a checkpoint that is meant (default: its average, ema, if it has one)")
    option("--to", choices=("published", "diffusers", "mmdiff"), help="the layout to write")
    option("--out", type=_path, metavar="DIR", help="where it is written: a new folder")
    option("--vae", type=_path, metavar="DIR", help="for --to diffusers: the autoencoder's folder, which the pipeline gets a copy of")
    of_checkpoint(sub)
    sub = command("bench", "measure how fast training is here", help_texts.BENCH, workdir=False)
    option = sub.add_argument
    option("--steps", type=_count, default=5, metavar="N", help="timed steps in a round (default: 5)")
    option("--rounds", type=_count, default=5, metavar="N", help="rounds in which the programs take turns (default: 5)")
    option("--peer", default="", metavar="COMMAND", help="another program to compare with, in quotes")
    option("--json", type=_path, metavar="FILE", help="write the metrics to a file, too")
    of_processes(sub)
    sub = command("aot", "what training, sampling or encoding needs of TPUs that are not here", help_texts.AOT, workdir=False)
    option = sub.add_argument
    option("--topology", required=True, metavar="KIND:SHAPE", help="the TPUs: v4:2x2x2, v5e:4x4, v5p:2x2x1, v6e:16x16, ...")
    option("--of", choices=("train", "sample", "encode"), default="train", help="which program is meant (default: train)")
    option("--number", type=_many, metavar="N", help="of sample and encode: hours of so many images (default: 50,000)")
    option("--batch", type=_count, metavar="B", help="of sample: samples that a chip computes at once (default: 64)")
    option("--search", type=_count, nargs="?", const=12, metavar="N", help="look for the fastest training, in N compilations (default: 12)")
    option("--slices", type=_count, default=1, metavar="N", help="so many of them, joined by the data-centre network (default: 1)")
    option("--json", type=_path, metavar="FILE", help="write the report to a file, too")
    return parser, dict(commands.choices)


def _format(prog: str) -> argparse.HelpFormatter:
    width = min(100, shutil.get_terminal_size().columns)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=width)


def _examples(*commands: str) -> str:
    return "examples:\n" + "\n".join(f"  mmdiff {line}" for name in commands for line in help_texts.EXAMPLES[name])


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


def _many(text: str) -> int:
    return _integer(text, checks.Range(1, 10**12))


_devices = functools.partial(_integer, allowed=checks.Range(0, 65_536))


def _calls(text: str) -> int:
    return _integer(text, checks.NETWORK_CALLS)


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"it must be the step of a checkpoint or best, not {text!r}")
    return text if text == "best" else _integer(text, checks.Range(0, math.inf))


def _steps(text: str) -> tuple[int | None, int]:
    first, colon, last = text.partition(":")
    steps = checks.Range(1, checks.STEPS)
    if not colon:
        return None, _integer(first, steps)
    found = _integer(first, steps), _integer(last, steps)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"it must begin before it ends, not {text!r}")
    return found


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
