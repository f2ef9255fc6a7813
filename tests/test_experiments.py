"""What the programs of experiments share: tables of means and differences, rows that are not repeated."""

import json
import pickle
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from mmdiff import config as configs
from mmdiff import files
from mmdiff.errors import UserError


@pytest.fixture
def experiments(loaded_launch):
    return loaded_launch("experiments")


def row(setting, seed, overrides=None, part="markov", **metrics):
    return {"part": part, "setting": setting, "seed": seed, "overrides": overrides or {}, "metrics": metrics}


def test_tables_have_means_errors_and_differences_of_pairs(experiments, capsys):
    metrics = {"vanilla, T=20": (1.0, 2.0), "both, T=20": (1.5, 2.7)}
    rows = [row(name, seed, nll=nll) for name, both in metrics.items() for seed, nll in enumerate(both)]
    experiments.table([*rows, row("both, T=40", 0, nll=9.0)], {"markov": "vanilla"})  # has no vanilla beside it
    text = capsys.readouterr().out
    assert "| vanilla, T=20 | 2 | 1.5000 ± 0.5000 |" in text and "| both, T=40 | 1 | 9.0000 ± nan |" in text
    assert "| both minus vanilla, in pairs | 2 | 0.6000 ± 0.1000 |" in text


def test_figures_that_a_setting_lacks_are_left_open(experiments, capsys):
    experiments.table([row("a", 0, one=1.0), row("b", 0, one=2.0, other=3.0)], {})
    text = capsys.readouterr().out
    assert "| a | 1 | 1.0000 ± nan | nan ± nan |" in text and "minus" not in text


def test_finished_rows_count_only_for_the_values_they_were_run_with(experiments, tmp_path, monkeypatch, capsys):
    rows = [row(f"x={x}", seed, {"x": x}, part="p", metric=float(x)) for x in ("1", "2") for seed in experiments.SEEDS]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--table"])
    settings = [("p", "x=1", "data", {"x": "1"}), ("p", "x=2", "data", {"x": "2.0"})]
    experiments.main("", settings, None, {})
    text = capsys.readouterr().out
    assert "| x=1 | 3 | 1.0000 ± 0.0000 |" in text and "x=2" not in text


def test_rows_of_earlier_versions_count(experiments, tmp_path, monkeypatch, capsys):
    rows = "".join(json.dumps(row("x", seed, part="p", metric=2.0)) + "\n" for seed in experiments.SEEDS)
    (tmp_path / "runs.jsonl").write_text(rows.replace('"metrics"', '"figures"'))
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path)])
    experiments.main("", [("p", "x", "data", {})], None, {})
    assert "| x | 3 | 2.0000 ± 0.0000 |" in capsys.readouterr().out


def test_parts_of_real_data_are_run_where_these_are_named_with_seeds_of_their_own(experiments, tmp_path, monkeypatch, capsys):
    rows = [row("x", seed, part="made up", metric=2.0) for seed in experiments.SEEDS] + [row("y", 7, part="clothes", metric=3.0)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))  # all that is to be run

    def printed(*options):
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), *options])
        settings = [("made up", "x", "data", {}), ("clothes", "y", "data", {})]
        experiments.main("", settings, print, {}, real=("clothes",), seeds={"clothes": (7,)})
        return capsys.readouterr().out

    assert "| x | 3 |" in printed() and "| y | 1 |" not in printed()
    assert all("| x | 3 |" in text and "| y | 1 |" in text for text in (printed("--data", "folder"), printed("--table")))
    with pytest.raises(SystemExit):
        printed("--parts", "clothes")
    assert "clothes needs real data" in capsys.readouterr().err


def test_a_mistake_in_a_run_is_a_sentence_that_reaches_the_command(experiments, tmp_path):
    def run(seed, data, overrides):
        raise files.Missing(tmp_path / "emoji64.tar")

    with pytest.raises(UserError, match="no such file: .*emoji64.tar") as found:
        experiments._run(run, 0, "p", "x", "data", {})
    assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)


def test_a_mistake_keeps_what_was_running(experiments, tmp_path, monkeypatch):
    failed = threading.Event()

    def run(seed, data, overrides):
        if seed == 1:
            failed.set()
            raise UserError("no such file")
        assert failed.wait(30)
        return {"metric": float(seed)}, 1.0

    monkeypatch.setattr(experiments, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    args = types.SimpleNamespace(out=tmp_path, table=False, workers=2)
    with pytest.raises(UserError, match="no such file"):
        experiments.complete(args, [(seed, "p", "x", "data", {}) for seed in (0, 1, *range(2, 9))], run)
    assert json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[0])["seed"] == 0


def test_what_is_chosen_by_some_rows_follows_with_all_seeds(experiments, tmp_path, monkeypatch, capsys):
    rows = [row(x, 0, part="weights", metric=float(x)) for x in "123"]
    rows += [row("2", seed, part="p", metric=9.0) for seed in experiments.SEEDS]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--table"])
    settings = [("weights", x, "data", {}) for x in "123"]
    experiments.main(
        "", settings, None, {}, seeds={"weights": (0,)}, follow=lambda rows: [("p", rows[1]["setting"], "data", {})] * (len(rows) == 3))
    text = capsys.readouterr().out
    assert "| 3 | 1 | 3.0000" in text and "| 2 | 3 | 9.0000 ± 0.0000 |" in text


def test_the_error_is_that_of_the_mean(experiments):
    values = np.random.default_rng(0).normal(3.0, 2.0, (10_000, 1))
    assert experiments.cells(values).split(" ± ")[1] == "0.0200"


@pytest.mark.slow
def test_solvers_sample_with_the_same_weights_and_noise(experiments, loaded_launch, monkeypatch):
    solvers = loaded_launch("solver_experiments")
    monkeypatch.setattr(solvers, "COUNT", 20)
    monkeypatch.setattr(solvers, "REFERENCE", 13)
    small = {"train.steps": "2", "train.global_batch": "16", "model.width": "16", "model.depth": "1"}
    small |= {"sample.steps": "6", "sample.heun": "true"}
    metrics, _ = solvers.run(0, "digits_joint", small)
    names = {f"{what} {solver}/{calls}" for what in ("error", "frechet") for solver in ("heun", "2m", "unipc") for calls in (11, 23)}
    assert set(metrics) == names and all(np.isfinite(value) for value in metrics.values())
    # Heun of 12 steps is nearly the reference of 13: the noise and the labels are the same.
    assert metrics["error heun/23"] < 0.1 and metrics["frechet heun/23"] == pytest.approx(metrics["frechet 2m/23"], rel=0.2)
    assert metrics["error unipc/23"] < 0.1


def test_guidance_is_compared_at_the_same_frechet_ratio(loaded_launch):
    guidance = loaded_launch("guidance_experiments")
    found = {("one way", 1.0): [(0.70, 1.2)], ("one way", 1.5): [(0.90, 1.0)], ("one way", 2.0): [(0.92, 2.0), (0.96, 2.2)]}
    found |= {("each", 1.5): [(0.91, 1.1)], ("each", 2.0): [(0.95, 1.65)], ("each", 3.0): [(1.0, 9.0)]}
    _, _, worse, _, two, *each = guidance.table(found)
    assert worse == "| one way | 1 | 0.7000 ± nan | 1.200 ± nan | - |"
    assert two == "| one way | 2 | 0.9400 ± 0.0200 | 2.100 ± 0.100 | - |"
    assert [line.split(" | ")[-1] for line in each] == ["+0.0100 |", "+0.0300 |", "+0.0600 |"]  # not against the worse one at 1.2


@pytest.mark.slow
def test_guidance_is_measured_of_one_run_s_weights(loaded_launch, monkeypatch):
    guidance = loaded_launch("guidance_experiments")
    monkeypatch.setattr(guidance, "WEIGHTS", (1.0, 1.5))
    small = [("model.width", "16"), ("model.depth", "1"), ("model.heads", "2"), ("sample.steps", "2")]
    config, module = configs.load(str(guidance.CONFIG), small)
    experiment = module.build(config)
    params = jax.jit(experiment.init)(jax.random.key(0))
    found = guidance.measure(types.SimpleNamespace(experiment=experiment, config=config, params=params), seeds=1)
    assert len(found) == 4 and all(len(values) == 1 and np.isfinite(values).all() for values in found.values())


@pytest.mark.slow
def test_solvers_are_compared_against_calls_of_one_run_s_weights(experiments, loaded_launch, capsys):
    calls = loaded_launch("calls_experiments")
    small = [("model.width", "16"), ("model.depth", "1"), ("model.heads", "2"), ("sample.heun", "true")]
    config, module = configs.load(str(calls.CONFIG), small)
    experiment, rng = module.build(config), np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(x.dtype), jax.eval_shape(experiment.init, jax.random.key(0)))
    run = types.SimpleNamespace(experiment=experiment, config=config, params=params)
    rows = {"3 Heun steps": ("heun", 3), "5 steps of DDIM": ("ddim", 5), "5 steps of UniPC": ("unipc", 5)}
    found = calls.measure(run, 1, rows, per_class=5)
    assert [row["metrics"]["calls"] for row in found] == [5, 5, 5]
    ratios = [row["metrics"]["joint ratio"] for row in found]
    assert np.isfinite(ratios).all() and len(set(ratios)) == 3  # a solver of its own each
    experiments.table(found, {"sampler": "3 Heun steps"})
    assert "| 5 steps of UniPC minus 3 Heun steps, in pairs | 1 |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_field_of_the_recipe_is_measured_of_one_training(loaded_launch):
    recipe = loaded_launch("recipe_experiments")
    small = {"train.steps": "6", "train.global_batch": "16", "model.width": "16", "model.depth": "1", "sample.steps": "2"}
    small |= {"train.warmup_steps": "1", "train.learning_rate": "0.02", "train.ema": "0.5"}  # blocks do nothing before they are trained
    fields = (recipe.FIELDS[name] for name in (recipe.BASE, 'mlp="swiglu"'))
    (plain, _), (gated, _) = (recipe.run(0, "digits_joint", {"config": small, "model": each}) for each in fields)
    assert set(plain) == set(gated) and np.isfinite([*plain.values(), *gated.values()]).all()
    assert plain["parameters"] != gated["parameters"] and plain["loss"] != gated["loss"]
    assert plain["loss"] == pytest.approx(plain["image"] + 0.4 * plain["label"], rel=1e-5)
