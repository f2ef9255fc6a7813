"""The pages' Python examples run and do what they say; their commands parse; paths, images and links exist."""

import importlib.util
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import arguments, losses, nets, sampling, schedules, times
from mmdiff import config as configs
from mmdiff.__main__ import main
from mmdiff.experiment import initialiser
from mmdiff.processes import Gaussian, Joint, velocity

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "configs").rglob("README.md")), ROOT / "launch/README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEXTS = dict(zip(NAMES, (page.read_text(encoding="utf-8") for page in PAGES)))


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def shell(text):
    """The lines of a page's shell blocks, without their comments."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.fixture(scope="module")
def namespaces():
    spaces = []
    for name, text in TEXTS.items():
        for block in blocks(text, "python"):
            space = {"__name__": "page"}
            exec(compile(block.replace("depth=2, width=32", "depth=1, width=16"), name, "exec"), space)
            spaces.append(space)
    return spaces


def find(namespaces, name):
    return next(space for space in namespaces if name in space)


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 170


def test_first_example_trains_and_samples(namespaces):
    space = find(namespaces, "sevens")
    assert np.isfinite(space["value"]) and {"loss/image", "loss/label"} <= set(space["metrics"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(space["grads"]))
    assert set(np.asarray(space["sevens"]["label"])) == {7}
    np.testing.assert_array_equal(space["labels"]["image"], space["batch"]["image"])
    assert space["pairs"]["image"].shape == space["images"]["image"].shape == (4, 8, 8, 1)


@pytest.mark.slow
def test_ring_is_a_chain_and_trains_in_a_joint(namespaces):
    ring = find(namespaces, "Ring")["Ring"](12)
    rng = np.random.default_rng(0)
    p, f = (jnp.asarray(rng.random((3, 12)), jnp.float32) for _ in range(2))
    s, t = jnp.array([0.1, 0.2, 0.0]), jnp.array([0.3, 0.9, 0.5])
    np.testing.assert_allclose((ring.push(p, s, t) * f).sum(-1), (p * ring.pull(f, s, t)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(ring.push(ring.push(p, None, s), s, t), ring.push(p, None, t), atol=1e-5)
    np.testing.assert_allclose(ring.push(p, None, jnp.ones(3)), jnp.broadcast_to(p.sum(-1, keepdims=True) / 12, (3, 12)), rtol=1e-2)

    process = Joint(image=Gaussian(schedules.flow(), velocity), hour=ring)
    net = nets.MMDiT({"image": nets.Patches(4, 4, 1, 2), "hour": nets.Label(12, 12)}, depth=1, width=16, heads=2)
    shape = {"image": (4, 4, 1), "hour": ()}
    params = jax.jit(initialiser(net, process, shape))(jax.random.key(0))
    batch = {"image": jnp.zeros((3, 4, 4, 1)), "hour": jnp.array([0, 5, 11]), "index": jnp.arange(3)}
    loss = losses.diffusion(process, net.apply, times.shared("image", "hour"))
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, jax.random.key(1))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    samples = sampling.sample(process, net.apply, params, jax.random.split(jax.random.key(2), 3), sampling.uniform_grid(3), shape)
    assert ((samples["hour"] >= 0) & (samples["hour"] < 12)).all()


def test_the_loss_of_the_example_counts_both_terms(namespaces):
    space = find(namespaces, "pseudo_huber")
    batch = {"image": jnp.zeros((4, 2, 2, 1)), "label": jnp.arange(4), "index": jnp.arange(4)}
    out = {"image": jnp.zeros((4, 2, 2, 1)), "label": jnp.zeros((4, 10))}  # its network returns its parameters
    value, metrics = space["loss"](out, batch, jax.random.key(0))
    np.testing.assert_allclose(value, metrics["loss/image"] + 0.1 * metrics["loss/label"], rtol=1e-6)
    assert metrics["loss/image"] > 0 and metrics["loss/label"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_path_image_and_link_of_a_page_exists(name):
    for path in set(re.findall(r"\b(?:configs|launch|mmdiff)/[\w./]*\w", TEXTS[name])):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        assert ((ROOT / name).parent / target.partition("#")[0]).exists(), target


def head(path):
    """The commands of a docstring, with the variables that it sets."""
    text = re.match(r'"""(.*?)"""', path.read_text(encoding="utf-8"), flags=re.DOTALL)[1].replace("\\\\\n", " ")
    variables = {}

    def filled(line):
        return re.sub(r"\$([A-Z]+)", lambda found: variables[found[1]], line)

    for name, value in re.findall(r'^ +([A-Z]+)="(.*)"$', text, flags=re.MULTILINE):  # in order: one may hold those before it
        variables[name] = filled(value)
    lines = [line.strip() for line in text.splitlines() if re.match(r" +(python|bash|mmdiff) ", line)]
    return [shlex.split(filled(line), comments=True) for line in lines]


COMMANDS = {name: shell(text) for name, text in TEXTS.items()}
COMMANDS |= {str(path.relative_to(ROOT)): head(path) for path in sorted((ROOT / "configs").rglob("*.py"))}


@pytest.mark.parametrize("name", COMMANDS)
def test_printed_commands_have_flags_and_values_that_exist(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert COMMANDS[name] or name.endswith("README.md"), "a config's head states its commands"
    for words in COMMANDS[name]:
        if words[:3] == ["python", "-m", "mmdiff"]:
            words = words[2:]
        if words[0] == "mmdiff" and "..." not in words:
            args = arguments.parse(words[1:])
            if args.config:
                configs.load(args.config, args.overrides)
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words
        elif words[0] in ("python", "bash"):
            assert pathlib.Path(words[1]).is_file(), words


@pytest.mark.slow
def test_commands_of_the_readme_run_in_order_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    small = ["model.width=16", "model.depth=1", "train.steps=2", "sample.steps=2"]
    for words in COMMANDS["README.md"]:
        if words[:3] == ["python", "-m", "mmdiff"] and "configs/digits_joint.py" in words:
            words = [word.replace("runs/", f"{tmp_path}/runs/") for word in words[3:]]
            words += [f"--config.{each}" for each in small if words[0] == "train"]
            assert main(words) == 0, (words, capsys.readouterr())
    assert (tmp_path / "runs/a/report.json").is_file() and (tmp_path / "runs/a/labels/samples.npz").is_file()
    assert (tmp_path / "runs/b/checkpoints").is_dir()
