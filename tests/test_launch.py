"""The launch scripts print what they run and run what they print; the manifest is consistent; the notebook trains."""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from mmdiff import arguments
from mmdiff import config as configs
from mmdiff.__main__ import main

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SLICE = {"NAME": "dit", "ZONE": "us-west4-a", "TYPE": "v5litepod-16"}
RUN = ["--config", "configs/digits_joint.py", "--workdir", "/mnt/runs/it's here", "--config.train.steps=7"]
SAMPLE = ["sample", *RUN[:4], "--format=npz"]
EVAL = ["eval", *RUN[:4]]
MEASURE = ["eval", "--samples", "/mnt/runs/set/samples.npz", "--reference=/mnt/runs/reference.npz", "--json", "/mnt/runs/found.json"]
CACHE = ["cache", "--config", "imagenet256/dit_xl2", "--out=/mnt/runs/latents", "--config.encoder.path=/mnt/runs/vae"]
TOOLS = ("gcloud", "sbatch", "srun", "scontrol", "tar", "mkdir", "bash", "sleep", "env")


@pytest.fixture
def fakes(tmp_path):
    """Stand-ins for the cluster's tools and for everything else that a script runs: each records its words, and does nothing."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    for tool in TOOLS:
        path = folder / tool
        path.write_text(
            f"""#!{sys.executable}
import json, os, sys
with open({str(tmp_path / "calls.jsonl")!r}, "a") as file:
    print(json.dumps([{tool!r}, *sys.argv[1:]]), file=file)
if "describe" in sys.argv:
    states = os.environ.get("STATES", "ACTIVE").split()
    done = open({str(tmp_path / "calls.jsonl")!r}).read().count("describe")
    print(states[min(done, len(states)) - 1])
sys.exit(int(os.environ.get("STATUS_" + {tool!r}, 0)))
"""
        )
        path.chmod(0o755)
    return folder


def launch(fakes, script, *words, **settings):
    """-> (the finished script, the commands that it has called)."""
    kept = {key: value for key, value in os.environ.items() if key in ("LANG", "TMPDIR")}
    kept["VENV"] = sys.prefix  # has mmdiff: nothing is installed
    env = {**kept, "PATH": f"{fakes}:{os.environ['PATH']}", "HOME": str(fakes.parent), **settings}
    bash = shutil.which("bash")
    done = subprocess.run([bash, str(LAUNCH / script), *words], env=env, cwd=fakes.parent, capture_output=True, text=True, timeout=600)
    calls = fakes.parent / "calls.jsonl"
    called = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    calls.unlink(missing_ok=True)
    return done, called


def printed(done):
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def of_cloud(plan):
    """Without what is done here: the config is checked by a Python that has mmdiff."""
    return [command for command in plan if command[0] not in ("cd", "env") and not command[0].endswith("/bash")]


def flags(command):
    return dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--") and "=" in word)


def test_scripts_are_clean():
    scripts = sorted(str(path.relative_to(ROOT)) for path in LAUNCH.glob("*.sh"))
    assert len(scripts) >= 7
    tool = shutil.which("shellcheck") or str(pathlib.Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([tool, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["tpu_vm.sh", "multislice.sh", "slurm.sh"])
def test_help(fakes, script):
    for words in (["--help"], ["run", "-h"]):
        done, called = launch(fakes, script, *words)
        assert done.returncode == 0 and "--dry-run" in done.stdout and f"launch/{script}" in done.stdout and called == []
        assert "set -euo" not in done.stdout and not any(line.startswith("#") for line in done.stdout.splitlines())


# ---- TPU ----


COMMANDS = [
    ("tpu_vm.sh", ["create", "--reserved"], {"SPOT": "1"}),
    ("tpu_vm.sh", ["install"], {"PROJECT": "my-project"}),
    ("tpu_vm.sh", ["run", *RUN], {"BUCKET": "my-bucket"}),
    ("tpu_vm.sh", ["tail"], {}),
    ("tpu_vm.sh", ["stop"], {}),
    ("tpu_vm.sh", ["delete"], {}),
    ("tpu_vm.sh", ["all", *RUN], {}),
    ("multislice.sh", ["all", *RUN], {"SLICES": "4"}),
    ("tpu_vm.sh", ["run", *SAMPLE], {"SLICES": "4"}),
    ("tpu_vm.sh", ["run", *EVAL], {"BUCKET": "my-bucket"}),
    ("tpu_vm.sh", ["all", *CACHE], {"BUCKET": "my-bucket"}),
    ("multislice.sh", ["run", *MEASURE], {"SLICES": "2"}),
]


@pytest.mark.parametrize(("script", "words", "settings"), COMMANDS)
def test_a_dry_run_prints_what_a_run_calls(fakes, script, words, settings):
    settings = {**SLICE, **settings}
    for order in (["--dry-run", *words], [*words, "--dry-run"]):
        done, called = launch(fakes, script, *order, **settings)
        plan = printed(done)
        assert called == [] and plan
    done, called = launch(fakes, script, *words, **settings)
    assert done.returncode == 0, done.stderr
    assert called == [command for command in plan if command[0] != "cd" and not command[0].endswith("/bash")]
    if words[0] in ("run", "all"):
        [check] = [command for command in called if command[0] == "env"]
        command = words[1] if words[1] in ("eval", "sample", "cache") else "train"
        number = str(16 * int(settings.get("SLICES", 1)))
        assert called[0] == check and check[1:6] == ["JAX_PLATFORMS=cpu", f"{sys.prefix}/bin/python", "-m", "mmdiff", command]
        assert check[6:8] == ["--check", number] and [word for word in words[1:] if word not in check] == []


def test_a_slice_from_nothing(fakes):
    done, _ = launch(fakes, "tpu_vm.sh", "--dry-run", "all", *RUN, **SLICE, SPOT="1", BUCKET="my-bucket", PROJECT="p")
    assert [command[0].rpartition("/")[2] for command in printed(done)][:3] == ["cd", "bash", "env"]  # before anything is asked for
    plan = of_cloud(printed(done))
    assert [command[:1] if command[0] != "gcloud" else command[4:6] for command in plan] == [
        ["create", "dit"], ["describe", "dit"], ["mkdir"], ["tar"], ["scp", plan[4][5]], ["ssh", "dit"], ["ssh", "dit"], ["ssh", "dit"],
    ]  # fmt: skip
    assert all(command[:4] == ["gcloud", "compute", "tpus", "queued-resources"] for command in plan if command[0] == "gcloud")
    assert all({"zone": "us-west4-a", "project": "p"}.items() <= flags(command).items() for command in plan if command[0] == "gcloud")
    create, _, _, pack, copy, install, run, tail = plan
    assert {"accelerator-type": "v5litepod-16", "runtime-version": "v2-alpha-tpuv5-lite", "node-id": "dit"}.items() <= flags(create).items()
    assert "--spot" in create and "dit:" in copy and pack[2] == copy[5]
    for command in (copy, install, run):
        assert {"node": "all", "worker": "all"}.items() <= flags(command).items()
    assert {"node": "0", "worker": "0"}.items() <= flags(tail).items()
    # What the hosts get is again read by a shell.
    assert shlex.split(flags(run)["command"]) == ["BUCKET=my-bucket", "bash", "mmdiff/launch/tpu_host.sh", "run", *RUN]
    assert flags(install)["command"].endswith("BUCKET=my-bucket bash mmdiff/launch/tpu_host.sh install")


def test_several_slices(fakes):
    plan = of_cloud(printed(launch(fakes, "multislice.sh", "--dry-run", "all", *RUN, **SLICE, SLICES="4")[0]))
    assert {"node-count": "4", "node-prefix": "dit"}.items() <= flags(plan[0]).items() and "node-id" not in flags(plan[0])
    [run] = [shlex.split(flags(command)["command"]) for command in plan if " run " in flags(command).get("command", "")]
    assert run[-1] == "--config.train.mesh.slices=4" and run[0].startswith("LIBTPU_INIT_ARGS=--xla_tpu_")
    done, _ = launch(fakes, "multislice.sh", "--dry-run", "run", *RUN, "--config.train.mesh.slices=2", **SLICE, SLICES="4")
    assert done.stdout.count("mesh.slices=2") == 2 and "mesh.slices=4" not in done.stdout  # of the check and of the run
    for path in sorted((ROOT / "configs").rglob("*.py")):
        config, _ = configs.load(str(path), [("train.mesh.slices", "4")])  # every config has what is added
        assert config.train.mesh.slices == 4


def test_slices_sample(fakes):
    for words in (SAMPLE, EVAL, MEASURE, CACHE):
        [run] = of_cloud(printed(launch(fakes, "multislice.sh", "--dry-run", "run", *words, **SLICE, SLICES="4")[0]))
        assert shlex.split(flags(run)["command"]) == ["bash", "mmdiff/launch/tpu_host.sh", "run", *words]


IMAGES = {"v4-32": "tpu-ubuntu2204-base", "v5litepod-16": "v2-alpha-tpuv5-lite", "v5p-32": "v2-alpha-tpuv5", "v6e-16": "v2-alpha-tpuv6e"}


@pytest.mark.parametrize(("kind", "image"), IMAGES.items())
def test_every_generation_has_its_image(fakes, kind, image):
    plan = printed(launch(fakes, "tpu_vm.sh", "--dry-run", "create", **{**SLICE, "TYPE": kind})[0])
    assert flags(plan[0])["runtime-version"] == image
    plan = printed(launch(fakes, "tpu_vm.sh", "--dry-run", "create", **{**SLICE, "TYPE": "v9-1"}, RUNTIME="other")[0])
    assert flags(plan[0])["runtime-version"] == "other"


def test_create_waits(fakes):
    done, called = launch(fakes, "tpu_vm.sh", "create", **SLICE, STATES="WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert done.returncode == 0 and [command[0] for command in called] == ["gcloud", "gcloud", "sleep", "gcloud", "sleep", "gcloud"]
    done, called = launch(fakes, "tpu_vm.sh", "all", *RUN, **SLICE, STATES="PROVISIONING FAILED")
    assert done.returncode == 1 and "FAILED" in done.stderr and called[-1][4] == "describe"


MISTAKES = [
    ("tpu_vm.sh", [], SLICE, "no command"),
    ("tpu_vm.sh", ["fly"], SLICE, "fly"),
    ("tpu_vm.sh", ["tail"], {"ZONE": "z"}, "NAME"),
    ("tpu_vm.sh", ["stop"], {"NAME": "n"}, "ZONE"),
    ("tpu_vm.sh", ["create"], {"NAME": "n", "ZONE": "z"}, "TYPE"),
    ("tpu_vm.sh", ["create"], {**SLICE, "TYPE": "v9-1"}, "v5litepod"),
    ("tpu_vm.sh", ["run", "--workdir", "/mnt/runs/a"], SLICE, "--config"),
    ("tpu_vm.sh", ["all", "--config=c.py"], SLICE, "--workdir"),
    ("tpu_vm.sh", ["run", "--config=c.py", "--workdir=/tmp/a"], {**SLICE, "BUCKET": "b"}, "/mnt/runs"),
    ("tpu_vm.sh", ["all", *CACHE[:3]], SLICE, "--out"),
    ("tpu_vm.sh", ["run", *CACHE[:3], "--out=/tmp/a"], {**SLICE, "BUCKET": "b"}, "--out must be below /mnt/runs"),
    ("tpu_vm.sh", ["run", "--config=/home/me/mine.py", "--workdir=/mnt/runs/a"], SLICE, "below configs/"),
    ("tpu_vm.sh", ["run", "--config=setup.py", "--workdir=/mnt/runs/a"], SLICE, "below configs/"),
    ("slurm.sh", ["eval", "--config=c.py"], {}, "--workdir"),
    ("multislice.sh", ["create"], SLICE, "SLICES"),
    ("multislice.sh", ["create"], {**SLICE, "SLICES": "1"}, "SLICES"),
    ("multislice.sh", ["create"], {**SLICE, "SLICES": "two"}, "SLICES"),
    ("tpu_vm.sh", ["run", *SAMPLE[:5]], SLICE, "--format"),
    ("slurm.sh", SAMPLE[:5], {}, "--format"),
    ("slurm.sh", ["--workdir", "/tmp/a"], {}, "--config"),
    ("slurm.sh", ["--config", "c.py"], {}, "--workdir"),
    ("slurm.sh", ["--config", "c.py", "--workdir", "a"], {"NODES": "many"}, "NODES"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "words", "settings", "culprit"), MISTAKES)
def test_mistakes_are_one_sentence(fakes, script, words, settings, culprit):
    for dry in ([], ["--dry-run"]):
        done, called = launch(fakes, script, *words, *dry, **settings)
        assert done.returncode == 2 and done.stdout == "" and called == []
        assert re.fullmatch(r"mmdiff: error: .*\.\n", done.stderr) and culprit in done.stderr


PRINTED = re.findall(r"^([A-Z]+=.*bash launch/(?:tpu_vm|multislice|slurm)\.sh .*)$", (LAUNCH / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", PRINTED)
def test_the_pages_commands_start_what_they_say(fakes, line):
    settings, words = dict(re.findall(r"([A-Z]+)=(\S+)", line)), shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    plan = printed(launch(fakes, words[script].removeprefix("launch/"), "--dry-run", *words[script + 1 :], **settings)[0])
    [check] = [command[command.index("mmdiff") + 1 :] for command in plan if "--check" in command]
    args = arguments.parse(check)
    assert args.check == (0 if "TYPE" not in settings and "GPUS" not in settings else 16 * int(settings.get("SLICES", 1)))
    if args.config:
        configs.load(str(ROOT / args.config), args.overrides)


REFUSED = [
    ("tpu_vm.sh", ["all", *RUN, "--config.train.global_batch=100"], SLICE, "a multiple of 16; the nearest is config.train.global_batch=96"),
    ("tpu_vm.sh", ["run", *RUN, "--config.train.lerning_rate=1"], SLICE, "did you mean"),
    ("tpu_vm.sh", ["run", "--config=own/images", *RUN[2:4], "--config.data.dir=no/such"], SLICE, "names no/such, which is not there"),
]


@pytest.mark.parametrize(
    ("script", "words", "settings", "culprit"), [REFUSED[0], *(pytest.param(*rest, marks=pytest.mark.slow) for rest in REFUSED[1:])])
def test_what_would_not_start_is_refused_before_it_is_paid_for(fakes, script, words, settings, culprit):
    (fakes / "env").unlink()
    done, called = launch(fakes, script, *words, **settings)
    assert done.returncode == 2 and called == []
    assert re.fullmatch(r"mmdiff: error: .*[.?]\n", done.stderr) and culprit in done.stderr, done.stderr


def check(capsys, command, *words):
    status = main([command, "--check", "8", *words])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_checks_say_what_would_start_and_what_is_elsewhere(capsys, tmp_path):
    digits = ["--config", "digits_joint", "--workdir", "/nowhere/runs/a"]
    own = ["--config", "own/images", *digits[2:]]
    for status, culprit, words in (
        (0, "train would start on 8 devices: 743,630 parameters", ["train", *digits]),
        (2, "does not fit the 8 device(s)", ["train", *digits, "--config.train.mesh.fsdp=3"]),
        (2, "which is not there", ["train", *own, f"--config.data.dir={tmp_path}/none"]),
        (0, "/nowhere/data/images is not on this machine", ["train", *own, "--config.data.dir=/nowhere/data/images"]),
        (0, "would start", ["eval", *digits]),
        (2, "did you mean 'label'?", ["sample", *digits, "--given=lable=7"]),
        (0, "sample would start", ["sample", *digits, "--format=npz", "--classes=balanced", "--number=50000"]),
        (2, "names no published encoders", ["cache", "--config=digits_joint", "--out=/nowhere/x"]),
        (0, "cache would start", ["cache", "--config=cdcd/scenes_tokenizer", *digits[2:], "--out=/nowhere/x"]),
        (2, "leave it out", ["cache", "--config=cdcd/scenes_tokenizer", *digits[2:], "--out=/nowhere/x", "--distributed"]),
        (2, "config.encoder.path is empty", ["cache", "--config=imagenet256/dit_xl2", "--out=/nowhere/x"]),
        (2, "which is not there", ["eval", "--samples=/nowhere/a/b.npz", f"--reference={tmp_path}/c.npz"]),
    ):
        found, text = check(capsys, *words)
        assert found == status and culprit in text, (words, text)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def host(tmp_path):
    """A host's home folder with an installed checkout, whose Python tells its words, and saves itself on SIGTERM."""
    checkout = tmp_path / "mmdiff"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / "launch").symlink_to(LAUNCH)
    shutil.copy(ROOT / "setup.py", checkout)
    python = checkout / ".venv" / "bin" / "python"
    python.write_text(
        "#!/usr/bin/env bash\ntrap 'echo saved; exit 143' TERM\necho \"$PWD $*\"\nfor i in $(seq 3000); do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    (checkout / ".venv" / "mmdiff.stamp").write_text("extras: tpu\n" + (ROOT / "setup.py").read_text())

    def call(*words):
        # As sshd runs what `gcloud ssh --command` is given, and hangs up afterwards.
        command = f"bash mmdiff/launch/tpu_host.sh {shlex.join(words)}"
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=600, start_new_session=True)

    yield call
    call("stop")


def test_a_host_runs_stops_and_continues(host, tmp_path):
    log = tmp_path / "mmdiff.log"
    assert host("stop").returncode == 0  # nothing is alive

    done = host("run", *RUN)
    assert done.returncode == 0, done.stderr
    pid = int((tmp_path / "mmdiff.pid").read_text())
    os.kill(pid, signal.SIGHUP)  # the connection is gone: the run is not
    wait_for(lambda: log.exists() and log.read_text())
    assert log.read_text() == f"{tmp_path / 'mmdiff'} -m mmdiff train --distributed {' '.join(RUN)}\n"

    again = host("run", *RUN)
    assert again.returncode == 1 and "stop it first" in again.stderr

    assert host("stop").returncode == 0
    assert log.read_text().endswith("saved\n")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert host("tail").stdout.endswith("saved\n")  # ends, as the run has

    assert host("run", *RUN).returncode == 0
    wait_for(lambda: log.read_text().count("--distributed") == 2)
    host("stop")
    assert host("run", *SAMPLE).returncode == 0
    wait_for(lambda: f"-m mmdiff sample --distributed {' '.join(SAMPLE[1:])}\n" in log.read_text())


def wait_for(condition, seconds=600):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


# ---- Slurm ----


def test_slurm_prints_what_it_runs(fakes, tmp_path):
    settings = {"NODES": "2", "GPUS": "4", "VENV": "/shared/venv"}
    plan = printed(launch(fakes, "slurm.sh", "--dry-run", *RUN, **settings)[0])
    assert [command[0].rpartition("/")[2] for command in plan] == ["bash", "env", "mkdir", "sbatch", "env", "scontrol"]
    install, check, folder, submit, train, requeue = plan
    assert check[1:] == ["JAX_PLATFORMS=cpu", "/shared/venv/bin/python", "-m", "mmdiff", "train", "--check", "8", "--distributed", *RUN]
    assert "VENV=/shared/venv environment cuda" in install[-1]
    wanted = {"nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "signal": "TERM@300", "output": f"{RUN[3]}/slurm-%j.log"}
    assert wanted.items() <= flags(submit).items() and "--requeue" in submit and folder[-1] == RUN[3]
    srun = train.index("srun")
    assert train[-len(RUN) - 5 :] == ["/shared/venv/bin/python", "-m", "mmdiff", "train", "--distributed", *RUN]
    assert "--kill-on-bad-exit=0" in train[srun:]

    for words in (["train", *RUN], SAMPLE, EVAL, MEASURE, CACHE):
        *_, started, _ = printed(launch(fakes, "slurm.sh", "--dry-run", *words, **settings)[0])
        assert started[-len(words) - 3 :] == ["-m", "mmdiff", words[0], "--distributed", *words[1:]]

    # Outside a job it installs (with the bash that runs it, which is no stand-in) and submits.
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "venv" / "mmdiff.stamp").write_text("extras: cuda\n" + (ROOT / "setup.py").read_text())
    settings["VENV"] = str(tmp_path / "venv")
    plan = printed(launch(fakes, "slurm.sh", "--dry-run", *RUN, **settings)[0])
    done, called = launch(fakes, "slurm.sh", *RUN, **settings)
    assert done.returncode == 0, done.stderr
    assert called == plan[1:4]
    done, called = launch(fakes, "slurm.sh", *RUN, **settings, STATUS_env="2")  # the check fails: nothing is submitted
    assert done.returncode == 2 and called == plan[1:2]

    # The job is the script again, with the same words and settings; in a job it trains.
    [*_, wrapped] = plan[3]
    words = shlex.split(wrapped.removeprefix("--wrap="))
    assert words[:2] == ["exec", "env"] and words[-len(RUN) - 1 :] == [str(LAUNCH / "slurm.sh"), *RUN]
    job = dict(word.split("=", 1) for word in words[2 : words.index("bash")])
    done, called = launch(fakes, "slurm.sh", *RUN, **job, SLURM_JOB_ID="JOB", STATUS_env="143")
    assert done.returncode == 143 and called == plan[4:]


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_slurm_requeues_after_a_saved_stop_only(fakes, status):
    done, called = launch(fakes, "slurm.sh", *RUN, SLURM_JOB_ID="12", STATUS_env=str(status))
    assert done.returncode == status and [command[0] for command in called] == ["env"]


def test_slurm_does_not_requeue_what_is_cancelled(fakes):
    # scancel signals the script as well as the processes.
    (fakes / "env").write_text(f"#!{sys.executable}\nimport os, signal, sys\nos.kill(os.getppid(), signal.SIGTERM)\nsys.exit(143)\n")
    done, called = launch(fakes, "slurm.sh", *RUN, SLURM_JOB_ID="12")
    assert done.returncode == 143 and called == []


@pytest.mark.slow
def test_xla_knows_the_flags():
    """XLA ends the process at a flag that it does not know; the builds for the CPU parse those for GPUs too."""
    found = re.findall(r"--xla_gpu_\w+=\w+", (LAUNCH / "slurm.sh").read_text())
    assert found
    for flag, known in [(" ".join(found), True), ("--xla_gpu_no_such_flag=true", False)]:
        env = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=env, capture_output=True, timeout=120)
        assert (done.returncode == 0) == known, done.stderr


# ---- GKE ----


def test_manifest():
    text = (LAUNCH / "gke.yaml").read_text()
    spec = yaml.safe_load(text)
    assert (spec["apiVersion"], spec["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in spec["metadata"]["annotations"]
    [slices] = spec["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]

    # One pod per host, and no host to spare.
    selector = pod["nodeSelector"]
    chips = math.prod(int(side) for side in selector["cloud.google.com/gke-tpu-topology"].split("x"))
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] in text.split("apiVersion")[0] and per_host == 4
    assert job["parallelism"] == job["completions"] == chips // per_host > 1 and job["backoffLimit"] == 0
    assert slices["replicas"] == 1

    # A mistake of the user ends it; everything else starts it again.
    [rule] = job["podFailurePolicy"]["rules"]
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy needs
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert spec["spec"]["failurePolicy"]["maxRestarts"] > 10 and pod["terminationGracePeriodSeconds"] >= 120

    # The workdir is in the bucket.
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"] and volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true" and pod["serviceAccountName"]
    env = {item["name"]: item["value"] for item in container["env"]}
    arguments = shlex.split(env["ARGUMENTS"])
    assert arguments[arguments.index("--workdir") + 1].startswith(mount["mountPath"] + "/")
    assert (ROOT / arguments[arguments.index("--config") + 1]).exists()
    script = container["args"][0]
    assert set(re.findall(r"\$(\w+)", script)) == set(env) and env["COMMAND"] == "train"
    assert "exec python -m mmdiff $COMMAND --distributed" in script
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    assert sorted(set(re.findall(r"YOUR-\w+", text.partition("\napiVersion")[2]))) == ["YOUR-BUCKET", "YOUR-REPOSITORY"]


# ---- Colab ----


def test_notebook_is_committed_without_outputs():
    import nbformat

    notebook = nbformat.read(LAUNCH / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_notebook_trains_and_shows(monkeypatch, tmp_path):
    import nbclient
    import nbformat

    monkeypatch.setenv("STEPS", "30")
    monkeypatch.setenv("DRIVE", str(tmp_path / "drive"))
    (tmp_path / "drive").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as there
    notebook = nbformat.read(LAUNCH / "colab.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    probe = nbformat.v4.new_code_cell("import json; json.dumps([float(x) for x in history['loss']])")
    notebook.cells.append(probe)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()

    images = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code]
    assert sum(images) == 6  # data, curves, sampled digits, classified digits, pairs, sevens of the run
    text = "".join(output.text for cell in code for output in cell.outputs if output.output_type == "stream")
    assert "500 test digits are classified right" in text and "step 30: " in text and "30/30" in text
    assert (tmp_path / "drive/mmdiff/digits_joint/checkpoints/30").is_dir()
    values = json.loads(eval(probe.outputs[-1].data["text/plain"]))
    assert len(values) == 30 and sum(values[-5:]) < 0.9 * sum(values[:5])
