"""Stored names are read as those of today, and only where the config at hand has these."""

import pytest

from mmdiff import former_names


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(former_names, "KEYS", {"eval.tries": "eval.count", "head": "model.head", "form": ""})
    monkeypatch.setattr(former_names, "VALUES", {("task", "kappa"): {"draw": "generate"}})
    monkeypatch.setattr(former_names, "ADDED", {"model.bias": True})
    monkeypatch.setattr(former_names, "METRICS", {"match": "embedding_loss", "figures/old": "new"})


def test_keys_and_sections_are_renamed(table):
    stored = {"eval.tries": 3, "head.width": 8, "seed": 0}
    assert former_names.keys(stored, ["eval.count", "model.head.width", "seed"]) == {"eval.count": 3, "model.head.width": 8, "seed": 0}


def test_a_key_that_is_gone_is_left_out_and_one_that_is_new_has_the_value_of_before(table):
    assert former_names.keys({"form": "linear", "seed": 0}, ["seed", "model.bias"]) == {"seed": 0, "model.bias": True}
    assert former_names.keys({"model.bias": False}, ["model.bias"]) == {"model.bias": False}


def test_a_config_that_has_the_old_key_keeps_it(table):
    assert former_names.keys({"eval.tries": 3, "form": "linear"}, ["eval.tries", "form"]) == {"eval.tries": 3, "form": "linear"}


def test_values_are_renamed_in_configs_that_have_the_other_key_alone(table):
    assert former_names.keys({"task": "draw", "kappa": 1.0}, ["task", "kappa"]) == {"task": "generate", "kappa": 1.0}
    assert former_names.keys({"task": "both", "kappa": 1.0}, ["task", "kappa"]) == {"task": "both", "kappa": 1.0}
    assert former_names.keys({"task": "draw"}, ["task"]) == {"task": "draw"}
    assert former_names.keys({"task": ["draw"], "kappa": 1.0}, ["task", "kappa"]) == {"task": ["draw"], "kappa": 1.0}


def test_what_the_table_does_not_know_stays(table):
    assert former_names.keys({"other": 1, "eval.tries_more": 2}, ["eval.count"]) == {"other": 1, "eval.tries_more": 2}


def test_metrics_are_renamed_whole_or_by_their_first_part(table):
    stored = {"match": 1.0, "match/accuracy": 0.5, "matches": 2.0, "figures/old": 3.0}
    assert former_names.metrics(stored) == {"embedding_loss": 1.0, "embedding_loss/accuracy": 0.5, "matches": 2.0, "new": 3.0}


def test_a_metric_that_is_there_under_its_old_name_keeps_it(table):
    stored = {"match": 1.0, "figures/old": 3.0}
    assert former_names.metrics(stored, known=["match", "new"]) == {"match": 1.0, "new": 3.0}
