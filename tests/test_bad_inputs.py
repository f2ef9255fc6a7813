"""Bad inputs of every kind, over all commands: one sentence that names the culprit, status 2, nothing written, and at once.

A row is a command line, the words that its sentence must hold, and what makes its files. `READERS` is a config of every modality and
reader, `TINY` one that is trained.
"""

import itertools
import json
import os
import pathlib
import pickle
import shlex
import shutil
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from mmdiff.__main__ import main

HERE = pathlib.Path(__file__).parent
TINY, READERS = str(HERE / "tiny.py"), str(HERE / "readers.py")
CONFIGS = HERE.parent / "configs"
SECONDS = 10.0  # of processor time, for an answer

ROWS = []  # (name, argv, words, function of a folder that makes files)


def row(argv, *words, files=None, name=None):
    ROWS.append((name or f"{len(ROWS)}: {argv if isinstance(argv, str) else ' '.join(argv)}"[:90], argv, words, files))


# ---- Flags ----

for argv, *words in (
    ("", "required: train | sample | eval"),
    ("trian", "invalid choice: 'trian'", "did you mean 'train'"),
    ("Sample", "did you mean 'sample'"),
    ("evaluate", "invalid choice", "did you mean 'eval'"),
    ("xyz", "choose from train"),
    ("--verison", "unrecognized arguments|required"),
    ("train", "required: --config, --workdir"),
    ("train --config TINY", "required: --workdir"),
    ("train --workdir x", "required: --config"),
    ("sample --config TINY", "required: --workdir"),
    ("eval --workdir x", "required: --config"),
    ("cache --config TINY --workdir x", "required: --out"),
    ("aot --config TINY", "required: --topology"),
    ("bench", "required: --config"),
    ("train --work-dir x --config TINY", "--work-dir", "did you mean --workdir"),
    ("train --workdir x --conf TINY", "--conf", "did you mean --config"),
    ("train --workdir x --config TINY --lr 3", "--lr", "mmdiff train --help"),
    ("train --workdir x --config TINY --train.steps=3", "--train.steps=3", "--config.train.steps=VALUE"),
    ("train --workdir x --config TINY train.steps=3", "train.steps=3", "write --config.train.steps=3"),
    ("train --workdir x --config TINY extra words", "unrecognized arguments: extra words"),
    ("train --workdir x --config TINY --step=5", "unrecognized arguments: --step=5"),
    ("train --workdir x --workdir y --config TINY", "--workdir is set twice"),
    ("sample --workdir x --seed 1 --seed 2 --config TINY", "--seed is set twice"),
    ("train --workdir '' --config TINY", "--workdir", "a path, not ''"),
    ("train --workdir '  ' --config TINY", "--workdir", "a path"),
    ("train --workdir x --config ''", "--config", "a path, not ''"),
    ("train --workdir x --config", "--config", "expected one argument"),
    ("train --workdir x --config TINY --config.train.steps 5", "--config.train.steps has no value", "without a space"),
    ("train --workdir x --config TINY --config.=5", "there is no config key ''"),
    ("sample --workdir x --config TINY --number 0", "--number", "an integer of 1 or more, not '0'"),
    ("sample --workdir x --config TINY --number -3", "--number", "1 or more, not '-3'"),
    ("sample --workdir x --config TINY --number 1.5", "--number", "an integer"),
    ("sample --workdir x --config TINY --number 1000000000000", "--number", "at most 1,000,000"),
    ("sample --workdir x --config TINY --number " + "9" * 5000, "--number", "an integer"),
    ("sample --workdir x --config TINY --steps many", "--steps", "an integer of 1 or more"),
    ("sample --workdir x --config TINY --steps 0", "--steps", "1 or more"),
    ("sample --workdir x --config TINY --steps 1000000000", "--steps", "at most 100,000"),
    ("sample --workdir x --config TINY --guidance inf", "--guidance", "a finite number, not 'inf'"),
    ("sample --workdir x --config TINY --guidance nan", "--guidance", "a finite number"),
    ("sample --workdir x --config TINY --guidance much", "--guidance", "a finite number, not 'much'"),
    ("sample --workdir x --config TINY --guidance 1e39", "--guidance", "at most 10,000"),
    ("sample --workdir x --config TINY --guidance=-1e5", "--guidance", "-10,000 or more"),
    ("sample --workdir x --config TINY --seed -1", "--seed", "from 0 to 2**64 - 1, not -1"),
    ("sample --workdir x --config TINY --seed 18446744073709551616", "--seed", "2**64 - 1"),
    ("sample --workdir x --config TINY --seed one", "--seed", "an integer"),
    ("sample --workdir x --config TINY --seed 1.0", "--seed", "an integer"),
    ("sample --workdir x --config TINY --step last", "--step", "the step of a checkpoint or best, not 'last'"),
    ("sample --workdir x --config TINY --seed " + "9" * 5000, "--seed", "an integer from 0 to"),
    ("eval --workdir x --config TINY --step " + "9" * 5000, "--step", "an integer of 0 or more"),
    ("eval --workdir x --config TINY --step -1", "--step", "the step of a checkpoint"),
    ("eval --workdir x --config TINY --distribute", "unrecognized arguments: --distribute"),
    ("bench --config TINY --steps 0", "--steps", "1 or more"),
    ("bench --config TINY --rounds -1", "--rounds", "1 or more"),
    ("bench --config TINY --steps 10000000", "--steps", "at most 1,000,000"),
    ("bench --config TINY --workdir x", "--workdir", "mmdiff bench --help"),
    ("bench --config TINY --peer no_such_program", "--peer", "no_such_program"),
    ("bench --config TINY --peer \"'open\"", "--peer", "cannot be read"),
    ("aot --config TINY --topology v5e:3x3", "v5e:3x3", "v5e:1x1, 2x2"),
    ("aot --config TINY --topology h100:8", "h100:8", "KIND:SHAPE"),
    ("aot --config TINY --topology ''", "topology ''"),
    ("aot --config TINY --topology v5e:4x4 --slices 0", "--slices", "1 or more"),
    ("train --config TINY --workdir x --coordinator a:1 --processes 2", "--process is missing"),
    ("train --config TINY --workdir x --processes 2", "--coordinator and --process"),
    ("train --config TINY --workdir x --coordinator a --processes 2 --process 0", "HOST:PORT", "not 'a'"),
    ("train --config TINY --workdir x --coordinator a:0 --processes 2 --process 0", "--coordinator", "a port of 1 to 65535", "'a:0'"),
    ("train --config TINY --workdir x --coordinator a:70000 --processes 2 --process 0", "a port of 1 to 65535"),
    ("train --config TINY --workdir x --coordinator a:-1 --processes 2 --process 0", "a port of 1 to 65535"),
    ("train --config TINY --workdir x --coordinator :80 --processes 2 --process 0", "HOST:PORT"),
    ("train --config TINY --workdir x --coordinator 'a b:80' --processes 2 --process 0", "HOST:PORT"),
    ("bench --config TINY --coordinator http://a:80 --processes 2 --process 0", "HOST:PORT"),
    ("train --config TINY --workdir x --coordinator a:80 --processes 0 --process 0", "--processes", "1 or more"),
    ("train --config TINY --workdir x --coordinator a:80 --processes 2 --process 2", "it must be 0 to 1"),
    ("train --config TINY --workdir x --coordinator a:80 --processes 2 --process -1", "--process", "0 or more"),
    ("train --config TINY --workdir x --coordinator a:80 --processes 2 --process one", "--process", "not 'one'"),
    ("train --config TINY --workdir x --coordinator a:80 --processes 99999999999 --process 0", "--processes", "at most 1,000,000"),
):  # fmt: skip
    row(argv, *words)

# ---- Overrides: of a key that does not exist, and values that no key may have ----

COMMANDS = (
    "train --config READERS --workdir x", "sample --config READERS --workdir x", "eval --config READERS --workdir x",
    "cache --config READERS --workdir x --out y", "bench --config READERS", "aot --config READERS --topology v5e:4x4",
)  # fmt: skip


def command_of(text):
    """One of the commands, the same for a row wherever it stands."""
    return COMMANDS[zlib.crc32(text.encode()) % len(COMMANDS)]


for asked, meant in (
    ("train.stpes", "train.steps"), ("train.lr", "train.learning_rate"), ("lr", "train.learning_rate"), ("bs", "train.global_batch"),
    ("batch_size", "train.global_batch"), ("train.batch_size", "train.global_batch"), ("num_steps", "train.steps"),
    ("iterations", "train.steps"), ("max_steps", "train.steps"), ("epochs", "train.steps"), ("cfg", "sample.guidance"),
    ("cfg_scale", "sample.guidance"), ("wd", "train.weight_decay"), ("dim", "model.width"), ("hidden_size", "model.width"),
    ("layers", "model.depth"), ("n_layers", "model.depth"), ("n_heads", "model.heads"), ("ema_decay", "train.ema"),
    ("warmup", "train.warmup_steps"), ("grad_clip", "train.clip"), ("patch_size", "model.patch"), ("sample.nfe", "sample.steps"),
    ("optimizer.learning_rate", "train.learning_rate"), ("Train.Steps", "train.steps"), ("eval.batch_size", "eval.batch"),
    ("save_every", "train.checkpoint_every"), ("log_interval", "train.log_every"), ("precision", "model.dtype"),
    ("tp", "train.mesh.tensor"), ("data_dir", "data.dir"), ("dataset", "data.name"), ("learn_rate", "train.learning_rate"),
    ("label_wt", "label_weight"), ("loss.windows.0", "loss.windows"), ("temprature", "temperature"),
    ("data.path", "data.dir"), ("train.guidance_scale", "sample.guidance"),
):  # fmt: skip
    row(f"{command_of(asked)} --config.{asked}=1", f"'{asked}'", f"did you mean '{meant}'?")
for asked in ("train.beta1", "train.optimizer", "model.betas", "train.pathc"):
    row(f"train --config READERS --workdir x --config.{asked}=1", f"'{asked}': choose one of config.")
for asked, meant in (("train.max_iter", "train.steps"), ("train.grad_norm", "train.clip"), ("accumulate", "train.microbatches")):
    row(f"train --config READERS --workdir x --config.{asked}=1", f"did you mean '{meant}'?")
row("train --config READERS --workdir x --config.zzz=1", "'zzz'", "choose one of config.")
TRAIN = ["train", "--config", "READERS", "--workdir", "x"]
row([*TRAIN, f"--config.{'k' * 9000}=1"], "there is no config key 'kkk", name="a very long key")
row([*TRAIN, "--config.train.\nsteps=1"], "did you mean 'train.steps'", name="a key with a line break")
row([*TRAIN, f"--config.train.steps={'9' * 400}"], "at most 2,147,483,647")
row([*TRAIN, "--config.train.learning_rate=1e-46"], "above 0, not 1e-46")  # 0 in float32
row("train --config READERS --workdir x --config.train=1", "config.train is a section", "config.train.")
row("train --config READERS --workdir x --config.train.mesh=1", "config.train.mesh is a section")

for value, *words in (
    ("seed=-1", "0 or more"), ("seed=1.5", "an integer"), ("seed=18446744073709551616", "at most"), ("seed=", "an integer"),
    ("train.steps=0", "1 or more"), ("train.steps=-5", "1 or more"), ("train.steps=9e24", "an integer"),
    ("train.steps=9" + "0" * 24, "at most 2,147,483,647"),
    ("train.steps=3.5", "an integer"), ("train.steps=many", "'many'"),
    ("train.steps=True", "an integer"), ("train.steps=" + "1" * 5000, "an integer"), ("train.global_batch=0", "1 or more"),
    ("train.global_batch=-8", "1 or more"), ("train.global_batch=1000000000000", "at most"), ("train.microbatches=0", "1 or more"),
    ("train.log_every=0", "1 or more"), ("train.log_every=-1", "1 or more"), ("train.eval_every=-1", "0 or more"),
    ("train.checkpoint_every=0", "1 or more"), ("train.keep=0", "1 or more"), ("train.keep=-1", "1 or more"),
    ("train.prefetch=-1", "0 or more"), ("train.prefetch=1000000000000", "at most 1,024"), ("train.ema=1", "at least 0 and below 1"),
    ("train.ema=-0.1", "at least 0 and below 1"), ("train.ema=nan", "at least 0 and below 1"), ("train.ema=2", "below 1"),
    ("train.learning_rate=0", "above 0"), ("train.learning_rate=-1e-3", "above 0"), ("train.learning_rate=nan", "a finite number"),
    ("train.learning_rate=inf", "a finite number"), ("train.learning_rate=1e38", "at most 1,000"),
    ("train.learning_rate=fast", "a number"), ("train.warmup_steps=-1", "0 or more"), ("train.weight_decay=-0.1", "0 or more"),
    ("train.weight_decay=inf", "a finite number"), ("train.clip=0", "above 0"), ("train.clip=-1", "above 0"),
    ("train.clip=nan", "a finite number"), ("train.clip=inf", "a finite number"), ("train.mesh.data=0", "-1 or 1 or more"),
    ("train.mesh.fsdp=-2", "-1 or 1 or more"), ("train.mesh.tensor=10000000", "at most"), ("train.tensorboard=maybe", "true or false"),
    ("train.tensorboard=2", "true or false"), ("train.scale_rule=cube", "none, linear, sqrt"), ("model.width=0", "1 or more"),
    ("model.width=-8", "1 or more"), ("model.width=10000000", "at most 65,536"), ("model.width=8.0", "an integer"),
    ("model.depth=0", "1 or more"), ("model.depth=1000000", "at most 1,024"), ("model.heads=0", "1 or more"),
    ("model.patch=0", "1 or more"), ("model.patch=-2", "1 or more"), ("model.mlp_ratio=0", "above 0"), ("model.mlp_ratio=-4", "above 0"),
    ("model.dtype=float17", "bfloat16, float16, float32"), ("model.dtype=int32", "bfloat16"), ("model.dtype=", "bfloat16"),
    ("model.remat=all", "auto, none, some, dots, full"), ("times.joint=-0.5", "at least 0 and at most 1"), ("times.joint=1.5", "at most 1"),
    ("times.alone=nan", "at least 0 and at most 1"), ("dropout=-0.1", "at least 0"), ("dropout=1.1", "at most 1"),
    ("label_weight=-1", "0 or more"), ("label_weight=nan", "a finite number"), ("label_weight=inf", "a finite number"),
    ("label_weight=1e30", "at most"), ("kappa=nan", "a finite number"), ("kappa=-1", "0 or more"), ("temperature=0", "above 0"),
    ("temperature=-1", "above 0"), ("temperature=inf", "a finite number"), ("chain.steps=0", "1 or more"),
    ("chain.steps=-80", "1 or more"), ("chain.steps=1000000000", "at most 100,000"), ("loss.auxiliary=-1", "0 or more"),
    ("loss.auxiliary=inf", "a finite number"), ("loss.count=0", "1 or more"), ("loss.windows=64,-32", "1 or more"),
    ("loss.windows=a,b", "like 1,2"), ("loss.windows=1.5", "like 1,2"), ("loss.windows=", "like 1,2"),
    ("loss.windows=" + "[" * 3000, "like 1,2"), ("sample.steps=0", "1 or more"), ("sample.steps=-1", "1 or more"),
    ("sample.steps=1000000000", "at most 100,000"), ("sample.guidance=nan", "a finite number"),
    ("sample.guidance=inf", "a finite number"), ("sample.guidance=1e39", "at most 10,000"), ("sample.top_p=0", "above 0 and at most 1"),
    ("sample.top_p=86", "above 0 and at most 1"), ("sample.top_p=nan", "above 0 and at most 1"), ("sample.top_p=-0.5", "above 0"),
    ("eval.batch=0", "1 or more"), ("eval.batch=-1", "1 or more"), ("eval.examples=0", "1 or more"),
    ("eval.sampling_steps=8,0", "1 or more"),
    ("data.classes=-1", "0 or more"), ("data.size=0", "1 or more"), ("data.size=1000000", "at most 65,536"),
):  # fmt: skip
    key = value.partition("=")[0]
    row([*shlex.split(command_of(value)), f"--config.{value}"], f"config.{key} must be", *words, name=f"{len(ROWS)}: {value[:40]}")
row([*TRAIN, "--config.data.dir=a\0b"], "config.data.dir must be text without a NUL", name="NUL in a path")

for values, *words in (
    ("model.width=97", "width 97", "(with config.model.width=97)"), ("model.heads=5", "5 heads", "(with config.model.heads=5)"),
    ("model.patch=3", "patches of 3", "(with config.model.patch=3)"), ("times.joint=0.5", "sum to 1", "(with config.times.joint=0.5)"),
    ("model.width=65536", "GB", "choose a smaller network", "config.train.mesh.fsdp"),
):  # fmt: skip
    row(f"train --config {CONFIGS}/digits_joint.py --workdir x --config.{values}", *words)
for value, words in (  # of what is measured in training, too; 0 leaves some of it out
    ("in_loop.most=-5", "config.eval.in_loop.most must be 1 or more"), ("candidates=0", "config.data.dir is empty"),
    ("in_loop.candidates=-1", "config.eval.in_loop.candidates must be 0 or more"),
):  # fmt: skip
    row(f"train --config {CONFIGS}/joint/emoji_tokens.py --workdir x --config.eval.{value}", words, name=f"{len(ROWS)}: emoji, {value}")

MEANFLOW = f"train --config {CONFIGS}/imagenet256/meanflow_xl2.py --workdir x"
row(f"{MEANFLOW} --config.guidance.weight=0.5", "config.guidance.weight must be 1 or more")

# ---- Config files ----

GOOD = pathlib.Path(TINY).read_text()
HEAD = "from ml_collections import ConfigDict\ndef get_config():\n"
BUILD = "\ndef build(config):\n    pass\n"


def written(name, content):
    def make(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


for name, content, *words in (
    ("empty.py", "", "empty.py is no config file", "get_config"), ("half.py", f"{HEAD}    pass", "no function build"),
    ("number.py", "get_config = 3\nbuild = 4", "no function get_config"),
    ("syntax.py", "x = 1\ndef get_config(:", "syntax.py is not valid Python", "line 2"),
    ("tabs.py", "def get_config():\n\tx = 1\n        y = 2\n", "not valid Python", "line 3"),
    ("latin.py", b"name = '\xe9'", "latin.py is not valid Python"), ("utf16.py", "x = 1".encode("utf-16"), "utf16.py"),
    ("binary.py", bytes(range(256)), "binary.py"),
    ("raising.py", "x = 1\nraise ValueError('no luck')", "raising.py cannot be imported: ValueError: no luck (line 2)"),
    ("undefined.py", "width = depth", "NameError", "'depth'", "line 1"),
    ("package.py", "import no_such_package_here", "cannot be imported", "no_such_package_here"),
    ("attribute.py", "import math\nmath.nothing", "AttributeError", "line 2"),
    ("leaving.py", "import sys\nsys.exit(0)", "cannot be imported: SystemExit"),
    ("circle.py", "from circle import build, get_config", "cannot be imported: ImportError"),
    ("deep.py", "def f():\n    f()\nf()", "RecursionError"),
    ("fails.py", f"{HEAD}    return 1 / 0\n{BUILD}", "get_config of fails.py fails", "division by zero (line 3)"),
    ("argument.py", f"def get_config(size):\n    pass\n{BUILD}", "get_config of argument.py fails: TypeError"),
    ("none.py", f"{HEAD}    pass\n{BUILD}", "get_config returns a NoneType"),
    ("dict.py", f"{HEAD}    return dict(seed=0)\n{BUILD}", "get_config returns a dict"),
    ("seedless.py", f"{HEAD}    return ConfigDict(dict(train={{}}))\n{BUILD}", "no seed"),
    ("text_seed.py", f"{HEAD}    return ConfigDict(dict(seed='0', train={{}}))\n{BUILD}", "no seed"),
    ("trainless.py", f"{HEAD}    return ConfigDict(dict(seed=0))\n{BUILD}", "no train"),
    ("function.py", f"{HEAD}    return ConfigDict(dict(seed=0, train=dict(f=print)))\n{BUILD}", "config.train.f must be a number, text"),
    ("rate.py", GOOD.replace("1e-2", "-1e-2"), "config.train.learning_rate must be above 0"),
    ("nan.py", GOOD.replace("1e-2", "float('nan')"), "config.train.learning_rate must be a finite number"),
    ("lacking.py", GOOD.replace('"keep": 2,', ""), "config.train.keep", "add"),
    ("built_none.py", GOOD.replace("def build(config):", "def build(config):\n    return None"), "build returns a NoneType"),
    ("built_badly.py", GOOD.replace("def build(config):", "def build(config):\n    return config.modle"), "cannot be built", "modle"),
    ("build_leaves.py", GOOD.replace("def build(config):", "def build(config):\n    raise SystemExit(1)"), "cannot be built", "SystemExit"),
    ("wrong_call.py", GOOD.replace("processes.absorbing(10)", "processes.absorbing()"), "cannot be built", "absorbing()"),
    ("spelt.json", "{}", "spelt.json is no config file", "a Python file"),
):  # fmt: skip
    command = command_of(name).replace("READERS", name)
    if "sample" in command or "eval" in command or "cache" in command or "aot" in command:
        command = f"train --config {name} --workdir x" if "build" in name or name in ("lacking.py", "wrong_call.py") else command
    row(command, *words, files=written(name, content), name=f"{len(ROWS)}: config {name}")
row("train --config missing.py --workdir x", "there is no config file missing.py", "a Python file")
row(f"train --config {CONFIGS}/digits_jont.py --workdir x", "digits_jont.py", "did you mean", "digits_joint.py")
row("train --config folder.py --workdir x", "folder.py is no config file", files=lambda folder: (folder / "folder.py").mkdir())
row("train --config fifo.py --workdir x", "fifo.py is no config file", files=lambda folder: os.mkfifo(folder / "fifo.py"))
row("train --config loop.py --workdir x", "loop.py", files=lambda folder: (folder / "loop.py").symlink_to("loop.py"))
row(["train", "--config", "n" * 5000 + ".py", "--workdir", "x"], "nnn", "is no path|there is no config", name="a config with a long name")
row(["train", "--config", "a\nb.py", "--workdir", "x"], "there is no config file", name="a config with a line break")

# ---- Folders to write to ----

for flag, path, *words, files in (
    ("--workdir", "file", "file", "not a directory", written("file", "kept")),
    ("--workdir", "file/below", "file/below", "Not a directory", written("file", "kept")),
    ("--workdir", "/proc/mmdiff", "/proc/mmdiff", "choose a folder", None),
    ("--workdir", "gs://bucket/run", "gs://bucket/run", "mount the bucket", None),
    ("--workdir", "gone", "a link that leads nowhere", lambda folder: (folder / "gone").symlink_to("nowhere")),
    ("--workdir", "loop", "a link that leads nowhere", lambda folder: (folder / "loop").symlink_to("loop")),
    ("--workdir", "w" * 300, "File name too long", None),
    ("--workdir", "/dev/null", "/dev/null", "not a directory", None),
):
    row(["train", "--config", "TINY", "--workdir", path], f"{flag}|cannot write", *words, files=files,
        name=f"{len(ROWS)}: --workdir {path[:20]}")
for command in ("sample --config TINY --workdir RUN --out", "cache --config READERS --workdir empty --out"):
    for path, *words, files in (
        ("file", "not a directory", written("file", "kept")), ("file/below", "Not a directory", written("file", "kept")),
        ("gs://bucket/out", "mount the bucket", None), ("s3://bucket/out", "s3://bucket/out", None), ("/proc/out", "/proc/out", None),
        ("gone", "a link that leads nowhere", lambda folder: (folder / "gone").symlink_to("nowhere")),
    ):
        if command.startswith("sample"):
            row(f"{command} {path}", "--out|cannot write", *words, files=files)
for path, *words in (
    ("out", "a directory"), ("no/such/file.json", "No such file"), ("gs://bucket/x.json", "mount the bucket"),
    ("/proc/x.json", "/proc/x.json"),
):
    for command in ("bench --config TINY --json", "aot --config TINY --topology v5e:4x4 --json"):
        row(f"{command} {path}", "--json|cannot write", *words, files=lambda folder: (folder / "out").mkdir())

# ---- Runs that are not there, or of other values ----

for argv, *words in (
    ("sample --config TINY --workdir x", "there is no run in x", "mmdiff train"),
    ("eval --config TINY --workdir x", "there is no run in x", "train it first"),
    ("cache --config TINY --workdir x --out y", "there is no run in x"),
    ("sample --config TINY --workdir empty", "there is no checkpoint in empty"),
    ("eval --config TINY --workdir empty", "there is no checkpoint in empty"),
    ("eval --config TINY --workdir gs://bucket/run", "gs://bucket/run", "mount the bucket"),
    ("sample --config TINY --workdir gs://bucket/run", "gs://bucket/run", "mount the bucket"),
    ("cache --config TINY --workdir RUN --out y", "nothing to cache"),
    ("sample --config TINY --workdir RUN --step 5", "no checkpoint of step 5", "2, 4"),
    ("eval --config TINY --workdir RUN --step 999999999999999999999", "no checkpoint of step 9999", "2, 4"),
    ("eval --config TINY --workdir RUN --step best", "names no metric", "config.train.best"),
    ("eval --config TINY --workdir RUN --config.train.ema=0.5", "config.train.ema", "only config.sample"),
    ("sample --config TINY --workdir RUN --config.train.steps=7", "config.train.steps", "only config.sample"),
    ("train --config TINY --workdir RUN --config.train.ema=0.5", "train.ema"),
    ("train --config TINY --workdir x --config.train.microbatches=3", "does not divide the global batch 8"),
    ("train --config TINY --workdir x --config.train.mesh.data=3", "mesh", "device"),
    ("train --config TINY --workdir x --config.train.best=val/los --config.train.eval_every=1", "config.train.best", "val/loss"),
    ("train --config TINY --workdir x --config.train.best=val/loss", "config.train.best", "config.train.eval_every"),
    ("sample --config TINY --workdir file", "file", written("file", "no folder")),
):  # fmt: skip
    row(argv, *(word for word in words if isinstance(word, str)), files=next((word for word in words if callable(word)), None))

# ---- What is given ----


def pictures(folder):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / "whole.png")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "large.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:60])
    for name in ("text.png", "text.npz", "text.npy", "text.wav", "text.pkl"):
        (folder / name).write_text("neither an image nor an array")
    for name in ("nothing.png", "nothing.npz", "nothing.txt", "nothing.wav"):
        (folder / name).write_bytes(b"")
    (folder / "folder").mkdir()
    np.save(folder / "nan.npy", np.full((1, 8, 8, 3), np.nan, np.float32))
    np.save(folder / "large.npy", np.full((1, 8, 8, 3), 9, np.float32))
    np.save(folder / "letters.npy", np.array([["a"]]))
    np.save(folder / "objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.save(folder / "none.npy", np.zeros((0, 8, 8, 3), np.float32))
    np.savez(folder / "other.npz", a=np.zeros(3), b=np.zeros(3))
    np.savez(folder / "ids.npz", x=np.array([[99, 0, 1]]))
    np.savez(folder / "fractions.npz", x=np.array([0.5, 1.5]))
    with open(folder / "objects.npz", "wb") as stream:
        np.savez(stream, a=np.array([{"a": 1}], object))
    (folder / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    (folder / "danger.pkl").write_bytes(pickle.dumps(os.getcwd))
    (folder / "latin.txt").write_bytes("a small rouge d\xe9j\xe0".encode("latin-1"))
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    fields = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 8, 8, 3), }"
    (folder / "huge.npy").write_bytes(header + fields.ljust(117) + b"\n")


for given, *words in (
    ("lable=7", "unknown modality 'lable'", "did you mean 'label'"), ("x=1", "unknown modality 'x'"), ("=1", "unknown modality ''"),
    ("label", "write --given label=VALUE"), ("label=", "--given label has no value"), ("label=3", "label 3 does not exist", "0..2"),
    ("label=-1", "0..2"), ("label=1e9", "label"), ("label=nan", "label"), ("label=ct", "cat, dog, hen"), ("label=1,2,", "label"),
    ("label=99999999999999999999", "0..2"), ("label=missing.npy", "no such file: missing.npy"), ("label=fractions.npz", "integers"),
    ("label=ids.npz", "label"), ("label=other.npz", "no entry 'label'", "a, b"), ("image=missing.png", "no such file: missing.png"),
    ("image=large.png", "9 x 8 pixels", "8 x 8"), ("image=text.png", "text.png cannot be read"), ("image=cut.png", "cut.png"),
    ("image=nothing.png", "nothing.png"), ("image=folder", "folder", "no images"), ("image=text.npz", "text.npz"),
    ("image=nan.npy", "nan.npy", "not finite"), ("image=large.npy", "large.npy", "[-1, 1]"), ("image=letters.npy", "letters.npy"),
    ("image=objects.npy", "objects.npy"), ("image=objects.npz", "objects.npz"), ("image=none.npy", "none.npy"),
    ("image=huge.npy", "huge.npy"), ("image=", "--given image has no value"), ("image=/dev/null", "/dev/null"),
    ("grey=large.png", "large.png"), ("latent=whole.png", "latents come in"), ("latent=nan.npy", "latent"),
    ("latent=missing.npy", "missing.npy"), ("feature=a.txt", "feature"), ("feature=nan.npy", "feature"), ("row=3 1", "row"),
    ("row=3 1 99", "row: ids are 0..15"), ("row=a b c", "row", "numbers"), ("row=" + "9" * 30 + " 1 2", "row"),
    ("row=ids.npz", "row: ids are 0..15"), ("tokens=missing.txt", "no such file: missing.txt"), ("tokens=ids.npz", "ids.npz"),
    ("map=nan.npy", "map|nan.npy"), ("text=", "--given text has no value"), ("text=   ", "--given text has no value"),
    ("text=a zebra", "zebra"), ("text=missing.txt", "missing.txt"), ("text=nothing.txt", "nothing.txt|no words"),
    ("text=latin.txt", "latin.txt"), ("text=folder", "folder"), ("text=\U0001f600", "text"), ("audio=missing.wav", "no such file"),
    ("audio=text.wav", "text.wav", "as sound"), ("audio=nothing.wav", "nothing.wav"), ("audio=folder", "folder"),
    ("audio=nan.npy", "audio"), ("motion=missing.pkl", "missing.pkl"), ("motion=text.pkl", "text.pkl"), ("motion=list.pkl", "list.pkl"),
    ("motion=danger.pkl", "danger.pkl"), ("motion=whole.png", "whole.png"), ("motion=nan.npy", "motion"),
    ("music=ids.npz", "music: needs integers of shape"),
):  # fmt: skip
    row(["sample", "--config", "READERS", "--workdir", "empty", "--given", given], *words, files=pictures,
        name=f"{len(ROWS)}: --given {given[:40]}")
for argv, *words in (
    ("--absent text", "unknown modality 'text'", "image, label"), ("--absent ''", "unknown modality ''"),
    ("--absent lable", "did you mean 'label'"), ("--given label=1 --given label=2", "label is set twice"),
    ("--given label=1 --absent label", "label is set twice"), ("--given label=1 --absent image", "no modality is left"),
    ("--absent image --absent label", "no modality is left"), ("--given label=1,2,3 --number 2", "holds 3 examples, not 2"),
    ("--given label=10", "label 10 does not exist", "0..9"),
):
    row(f"sample --config TINY --workdir RUN {argv}", *words)


def samples(folder):
    (folder / "out").mkdir()
    np.savez(folder / "out" / "samples.npz", image=np.zeros((1, 8, 8, 1), np.float32))


row("sample --config TINY --workdir RUN --given image=out/samples.npz --out out", "out/samples.npz would be overwritten", files=samples)
row("sample --config TINY --workdir RUN --given image=out/samples.npz --out ./out/../out", "would be overwritten", files=samples)

# ---- Checkpoints ----


def damaged(change):
    def make(folder):
        shutil.copytree(RUN["run"], folder / "copy")
        change(folder / "copy")

    return make


def only_the_last(run):
    shutil.rmtree(run / "checkpoints" / "2")
    return run / "checkpoints" / "4"


def edited(run, **values):
    """A config.json that somebody changed."""
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flipped(folder):
    """One bit of the largest file."""
    file = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


for change, *words in (
    (lambda run: (only_the_last(run) / "manifest.json").unlink(), "no checkpoint in copy"),
    (lambda run: shutil.rmtree(only_the_last(run) / "ema"), "no checkpoint in copy"),
    (lambda run: [file.write_bytes(b"") for file in only_the_last(run).rglob("*") if file.is_file()], "no checkpoint in copy"),
    (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint in copy"),
    (lambda run: flipped(only_the_last(run) / "ema"), "no checkpoint in copy"),
    (lambda run: (only_the_last(run) / "manifest.json").write_text("[1]"), "no checkpoint in copy"),
    (lambda run: shutil.copytree(run / "checkpoints/2", run / "checkpoints/8"), "checkpoints/8 is a copy of that of step 2, not of step 8"),
    (lambda run: (run / "config.json").write_text('{"a": 1}'), "config.json|another config"),
    (lambda run: edited(run, sample={"steps": "many"}), "config.sample.steps is 'many' in copy/config.json"),
    (lambda run: edited(run, sample={"guidance": None}), "config.sample.guidance is None in copy/config.json"),
    (lambda run: edited(run, seed=[1]), "config.seed is [1] in copy/config.json"),
    (lambda run: (run / "config.json").write_text("{"), "config.json"),
    (lambda run: (run / "config.json").write_text("[1]"), "config.json"),
    (lambda run: (run / "config.json").write_bytes(b"\xff\xfe"), "config.json"),
    (lambda run: (run / "config.json").write_text('{"name": "a package"}'), "copy/config.json is not the config of a run"),
    (lambda run: (run / "data.json").write_text("[]"), "copy/data.json is not what a run writes"),
):
    for command in ("sample --config TINY --workdir copy", "eval --config TINY --workdir copy"):
        row(command, *words, files=damaged(change), name=f"{len(ROWS)}: damaged run, {command[:6]}")
row("train --config TINY --workdir copy", "copy/config.json is not the config of a run", "another folder",
    files=damaged(lambda run: (run / "config.json").write_text('{"name": "a package"}')))
row("train --config TINY --workdir copy --config.train.steps=9", "checkpoints/8 is a copy of that of step 2, not of step 8",
    files=damaged(lambda run: shutil.copytree(run / "checkpoints/2", run / "checkpoints/8")))


# ---- Caches and folders of data ----


def token_cache(change):
    def make(folder):
        cache = folder / "cache"
        (cache / "train").mkdir(parents=True)
        arrays = {"tokens": np.zeros((4, 4), np.int32), "label": np.zeros(4, np.int32)}
        for name, array in arrays.items():
            np.save(cache / "train" / f"{name}.npy", array)
        split = {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()}
        meta = {"format": 1, "network": "VQAutoencoder", "net": {}, "tokens": "tokens", "grid": [2, 2], "codes": 16, "fingerprint": "x"}
        meta |= {"step": 1, "splits": {"train": split}}
        (cache / "cache.json").write_text(json.dumps(meta))
        change(cache, meta)

    return make


def meta(**values):
    return lambda cache, old: (cache / "cache.json").write_text(json.dumps(old | values))


for name, change, *words in (
    ("not there", lambda cache, _: shutil.rmtree(cache), "there is no token cache in cache"),
    ("empty", lambda cache, _: (shutil.rmtree(cache), cache.mkdir()), "there is no token cache in cache"),
    ("no cache.json", lambda cache, _: (cache / "cache.json").unlink(), "there is no token cache in cache"),
    ("half a cache.json", lambda cache, _: (cache / "cache.json").write_text('{"format": 1, '), "cache.json"),
    ("a list", lambda cache, _: (cache / "cache.json").write_text("[1]"), "cache.json"),
    ("cache.json of bytes", lambda cache, _: (cache / "cache.json").write_bytes(b"\xff\xfe\x00"), "cache.json"),
    ("another format", meta(format=2), "format 2"), ("no splits", meta(splits={}), "no split 'train'"),
    ("another grid", meta(grid=[4, 4]), "4 x 4", "2 x 2"), ("another codebook", meta(codes=32), "32 codes", "16"),
    ("other tokens", meta(tokens="music"), "music"),
    ("no array", lambda cache, _: (cache / "train" / "tokens.npy").unlink(), "tokens.npy"),
    ("an empty array", lambda cache, _: (cache / "train" / "tokens.npy").write_bytes(b""), "tokens.npy"),
    ("a cut array", lambda cache, _: os.truncate(cache / "train" / "tokens.npy", 140), "tokens.npy"),
    ("a pickle", lambda cache, _: (cache / "train" / "tokens.npy").write_bytes(pickle.dumps(np.zeros((4, 4)))), "tokens.npy"),
    ("an array of objects", lambda cache, _: np.save(cache / "train" / "tokens.npy", np.array([[{}] * 4] * 4, object)), "tokens.npy"),
    ("another type", lambda cache, _: np.save(cache / "train" / "tokens.npy", np.zeros((4, 4), np.float32)), "tokens.npy", "int32"),
    ("another length", lambda cache, _: np.save(cache / "train" / "label.npy", np.zeros(3, np.int32)), "label.npy"),
    ("labels out of range", lambda cache, _: np.save(cache / "train" / "label.npy", np.full(4, 9, np.int32)), "label 9 does not exist"),
    ("negative labels", lambda cache, _: np.save(cache / "train" / "label.npy", np.full(4, -1, np.int32)), "label -1"),
    ("a folder for an array", lambda cache, _: ((cache / "train/label.npy").unlink(), (cache / "train/label.npy").mkdir()), "label.npy"),
    ("a file", lambda cache, _: (shutil.rmtree(cache), cache.write_text("no")), "there is no token cache in cache"),
):  # fmt: skip
    row([*TRAIN, "--config.data.source=tokens", "--config.data.dir=cache"], *words, files=token_cache(change),
        name=f"{len(ROWS)}: token cache, {name}")


def latent_cache(change):
    def make(folder):
        from mmdiff.data import latents
        from mmdiff.data.modalities import Labels, Latents

        batch = {"image": np.zeros((4, 2, 2, 4), np.float32), "label": np.zeros(4, np.int32)}
        latents.write_latents(folder / "cache", "train", [batch], {"image": Latents(2, 2, 4), "label": Labels(3)})
        change(folder / "cache" / "train")

    return make


for name, change, *words in (
    ("not there", shutil.rmtree, "latent cache cache/train does not exist"),
    ("no meta.json", lambda cache: (cache / "meta.json").unlink(), "not finished"),
    ("half a meta.json", lambda cache: (cache / "meta.json").write_text("{"), "meta.json"),
    ("a list", lambda cache: (cache / "meta.json").write_text("[]"), "meta.json"),
    ("no shard", lambda cache: next(cache.glob("image-*.npy")).unlink(), "image-00000.npy"),
    ("a cut shard", lambda cache: next(cache.glob("image-*.npy")).write_bytes(b"\x93NUMPY"), "image-00000.npy"),
    ("another shape", lambda cache: np.save(next(cache.glob("image-*.npy")), np.zeros((4, 2, 2, 3), np.float16)), "image-00000.npy"),
    ("another type", lambda cache: np.save(next(cache.glob("image-*.npy")), np.zeros((4, 2, 2, 4), np.float64)), "image-00000.npy"),
    ("labels out of range", lambda cache: np.save(next(cache.glob("label-*.npy")), np.full(4, 7, np.int32)), "label 7"),
    ("latents of NaN", lambda cache: np.save(next(cache.glob("image-*.npy")), np.full((4, 2, 2, 4), np.nan, np.float16)), "not finite"),
):
    row([*TRAIN, "--config.data.source=latents", "--config.data.dir=cache"], *words, files=latent_cache(change),
        name=f"{len(ROWS)}: latent cache, {name}")

for argv, *words in (
    ("latents", "config.data.dir is empty"), ("tokens", "config.data.dir is empty"),
    ("latents --config.data.dir=gs://bucket", "gs://bucket"), ("images --config.data.name=folder", "config.data.dir"),
    ("images --config.data.name=imagnet --config.data.dir=.", "imagnet"),
    ("images --config.data.name=folder --config.data.dir=missing", "missing"),
    ("captions --config.data.name=captioned --config.data.dir=missing", "missing"),
    ("pairs --config.data.name=cityscape --config.data.dir=.", "cityscape"), ("pairs --config.data.name=pairs", "data"),
):
    row(f"train --config READERS --workdir x --config.data.source={argv}", *words)


def labelled(change):
    """A folder of two classes of one image each."""

    def make(folder):
        for split, name in itertools.product(("train", "val"), ("cat", "dog")):
            (folder / "set" / split / name).mkdir(parents=True)
            Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8)).save(folder / "set" / split / name / "0.png")
        change(folder / "set" / "train")

    return make


for name, change, *words in (
    ("no train", shutil.rmtree, "set/train", "train/CLASS"),
    ("no classes", lambda train: (shutil.rmtree(train), train.mkdir()), "set/train"),
    ("an empty class", lambda train: (train / "hen").mkdir(), "'hen' has no images"),
    ("a class without an image", lambda train: os.rename(train / "cat/0.png", train / "cat/0.txt"), "'cat' has no images"),
    ("an image in no class", lambda train: shutil.copy(train / "cat/0.png", train / "1.png"), "1.png is in no folder of a class"),
    ("an empty image", lambda train: os.truncate(train / "cat/0.png", 0), "cat/0.png"),
    ("a cut image", lambda train: os.truncate(train / "cat/0.png", 50), "cat/0.png"),
    ("text for an image", lambda train: (train / "cat/0.png").write_text("no"), "cat/0.png"),
    ("a link to nothing", lambda train: ((train / "cat/0.png").unlink(), (train / "cat/0.png").symlink_to("x")), "cat/0.png"),
    ("a link to itself", lambda train: ((train / "cat/0.png").unlink(), (train / "cat/0.png").symlink_to("0.png")), "cat/0.png"),
    ("a pipe", lambda train: ((train / "cat/0.png").unlink(), os.mkfifo(train / "cat/0.png")), "cat/0.png"),
    ("a folder", lambda train: ((train / "cat/0.png").unlink(), (train / "cat/0.png").mkdir()), "cat"),
):  # fmt: skip
    row([*TRAIN, "--config.data.source=images", "--config.data.name=folder", "--config.data.dir=set"], *words, files=labelled(change),
        name=f"{len(ROWS)}: images, {name}")


def captioned(change):
    """An image with its caption."""

    def make(folder):
        for split in ("train", "val"):
            (folder / "set" / split).mkdir(parents=True)
            Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "set" / split / "0.png")
            (folder / "set" / split / "0.txt").write_text("a small red seven")
        change(folder / "set" / "train")

    return make


def in_json(value):
    return lambda train: ((train / "0.txt").unlink(), (train / "0.json").write_text(value))


for name, change, *words in (
    ("no caption", lambda train: (train / "0.txt").unlink(), "0.png|set/train"),
    ("UTF-16", lambda train: (train / "0.txt").write_bytes("a red seven".encode("utf-16")), "0.txt|0.png"),
    ("Latin-1", lambda train: (train / "0.txt").write_bytes("un sept tr\xe8s rouge".encode("latin-1")), "0.txt|0.png"),
    ("null", in_json('{"caption": null}'), "0.json|0.png"),
    ("NaN", in_json('{"caption": NaN}'), "0.json|0.png"),
    ("a number", in_json('{"caption": 7}'), "0.json|0.png"),
    ("an empty list", in_json('{"caption": []}'), "0.json|0.png"),
    ("an object", in_json('{"caption": {"a": "b"}}'), "0.json|0.png"),
    ("no such key", in_json('{"text": "a red seven"}'), "0.json|0.png"),
    ("half a JSON file", in_json('{"caption": '), "0.json|0.png"),
    ("a JSON list", in_json("[1]"), "0.json|0.png"),
    ("a lone surrogate", in_json('{"caption": "\\ud800"}'), "0.json|0.png"),
    ("a pipe for a caption", lambda train: ((train / "0.txt").unlink(), os.mkfifo(train / "0.txt")), "0.png|0.txt"),
    ("two images of one caption", lambda train: shutil.copy(train / "0.png", train / "0.jpg"), "0.jpg|0.png"),
    ("a list without tabs", lambda train: (train / "captions.tsv").write_text("0.png a red seven\n"), "captions.tsv"),
    ("a list of what is not there", lambda train: (train / "captions.tsv").write_text("9.png\ta red seven\n"), "9.png"),
    ("a tar file that is none", lambda train: ((train / "0.png").unlink(), (train / "0.tar").write_text("no")), "0.tar"),
):  # fmt: skip
    row([*TRAIN, "--config.data.source=captions", "--config.data.name=captioned", "--config.data.dir=set"], *words,
        files=captioned(change), name=f"{len(ROWS)}: captions, {name}")


def fits(folder):
    latent_cache(lambda cache: None)(folder)


for start, *words in (
    ("missing", "no checkpoint in missing"), ("empty", "no checkpoint in empty"), ("gs://bucket/run", "gs://bucket/run", "mount"),
    ("/dev/null", "/dev/null"),
):
    row([*TRAIN, "--config.data.source=latents", "--config.data.dir=cache", f"--config.train.start={start}"], *words, files=fits,
        name=f"{len(ROWS)}: start {start}")


# ---- The test ----

RUN = {}


@pytest.fixture(scope="module", autouse=True)
def trained(tmp_path_factory):
    RUN["run"] = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "--config", TINY, "--workdir", str(RUN["run"])]) == 0


def tree(folder):
    """Everything below a folder: names, sizes and times of the last change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns if path.is_file() else 0)
    return found


def test_there_are_enough_of_them_and_no_two_are_one():
    lines = {(argv if isinstance(argv, str) else shlex.join(argv), files) for _, argv, _, files in ROWS}
    assert len(lines) == len(ROWS) >= 250


@pytest.mark.parametrize("argv, words, files", [pytest.param(*rest, id=name) for name, *rest in ROWS])
def test_a_bad_input_is_one_sentence_at_once_and_nothing_is_written(argv, words, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if files:
        files(tmp_path)
    places = {"TINY": TINY, "READERS": READERS, "RUN": str(RUN["run"])}
    argv = [places.get(arg, arg) for arg in (shlex.split(argv) if isinstance(argv, str) else argv)]
    before = tree(tmp_path), tree(RUN["run"])
    capsys.readouterr()
    began = time.process_time()
    status = main(argv)
    seconds = time.process_time() - began
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, ""), printed.err
    assert printed.err.startswith("mmdiff: error: ") and printed.err.count("\n") == 1 and printed.err.rstrip()[-1] in ".?)", printed.err
    for word in words:
        assert any(part in printed.err for part in word.split("|")), (word, printed.err)
    assert len(printed.err) < 2000
    assert (tree(tmp_path), tree(RUN["run"])) == before
    assert seconds < SECONDS


def test_weights_that_are_not_finite_are_a_sentence_for_all_who_use_them(tmp_path, capsys):
    """Black images, labels, and Recall@1 = 1 came of them."""
    import jax

    from mmdiff import config as configs
    from mmdiff.training import checkpoints, run_metadata
    from mmdiff.training.step import init_state

    config, module = configs.load(TINY)
    experiment, run = module.build(config), tmp_path / "run"
    state = init_state(experiment.init, experiment.optimizer, jax.random.key(0), experiment.loss)
    ema = jax.tree.map(lambda x: x.at[0].set(jax.numpy.nan), state.ema)
    run_metadata.write_config(run, config)
    with checkpoints.Checkpoints(run, keep=2) as saved:
        for step, weights in (1, state.ema), (2, ema):
            meta = {"position": 8, "train_seconds": 1.0, "compile_seconds": 0.0, "metrics": {}}
            saved.save(state.replace(step=state.step + step, ema=weights), {}, meta)
    before = tree(tmp_path)
    for command in ("sample", "eval"):
        assert main([command, "--config", TINY, "--workdir", str(run)]) == 2
        said = capsys.readouterr().err
        assert "weights of step 2 in" in said and "not finite" in said and "--step 1" in said and said.count("\n") == 1
    assert tree(tmp_path) == before
