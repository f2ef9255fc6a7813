"""The names that files of earlier versions use: one table. Stored runs are read through it; nothing else in the package knows an old name.

Whoever renames something that a run stores adds a line here in the same commit. `tests/test_stored_runs.py` opens runs of before.

    KEYS      keys of config.json, or whole sections: {old: new}; new is "" where a key is gone and runs without it are the same runs
    VALUES    values of a key, in configs that have another one, too, by which those of a user are told apart: {(key, other): {old: new}}
    ADDED     keys that configs have got since: {key: the value that stands for runs without it}
    METRICS   metrics in report.json, metrics.jsonl, a checkpoint and config.train.best: {old: new}, whole or as the first part ("match")
    FILES     files of a workdir: {new: old}
    CONFIGS   shipped configs: {old: new}
    COMBINED  losses of `losses.combine`, from whose names random keys are made: {new: old}, so that runs continue bit for bit

A config file of a user's own may still use an old key: a stored key is renamed only where the config that is opened has the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

KEYS: dict[str, str] = {
    "eval.calls": "eval.sampling_steps", "eval.pictures": "eval.count", "eval.encoders": "", "data.damaged": "data.max_skipped",
    "times.draw": "times.text_to_image", "times.bare": "times.unconditional", "times.write": "times.image_to_text"}
VALUES: dict[tuple[str, str], dict[str, str]] = {
    ("tasks", "query.gamma"): {"draw": "generate", "name": "align"}, ("task", "kappa"): {"draw": "generate", "name": "classify"}}
ADDED: dict[str, Any] = {
    "model.time_offset": 0.0, "model.freq_shift": 0.0, "model.mlp_norm_eps": 1e-6, "model.image": 32, "model.mlp_ratio": 2.0,
    "model.conv": True, "text.published": False, "model.rope": False, "noise": "scaled_linear", "sample.heun": True}
METRICS: dict[str, str] = {
    "cosine_read": "cosine_predicted", "error_read": "error_predicted", "error_read_mean": "error_predicted_mean",
    "error_read_linear": "error_predicted_linear", "miou_read": "miou_predicted",
    "draw/loss": "generate/loss", "name/loss": "align/loss", "val/draw/loss": "val/generate/loss", "val/name/loss": "val/align/loss"}
FILES = {"dependencies.json": "beside.json"}
CONFIGS = {"cdcd/pictures_tokenizer": "cdcd/images_tokenizer"}
COMBINED = {"generate": "draw", "align": "name"}

T = TypeVar("T")


def keys(stored: Mapping[str, T], known: Iterable[str]) -> dict[str, T | Any]:
    """The values of a stored config by dotted key, under the names that a config with the `known` keys has for them.

    >>> keys({"eval.calls": [80, 40]}, known=["eval.sampling_steps"])
    {'eval.sampling_steps': [80, 40]}
    """
    known = set(known)
    found = {}
    for key, value in stored.items():
        new = key if key in known else _renamed(key, KEYS)
        if new in known:
            found[new] = value
        elif new or key in known:
            found[key] = value
    for (key, other), renamed in VALUES.items():
        if other in known and isinstance(found.get(key), str):
            found[key] = renamed.get(found[key], found[key])
    return {key: value for key, value in ADDED.items() if key in known and key not in found} | found


def metrics(stored: Mapping[str, T], known: Iterable[str] | None = None) -> dict[str, T]:
    """Stored values under the names that their metrics have now; where it is `known` which metrics there are, only these are new names.

    >>> metrics({"cosine_read": 0.5})
    {'cosine_predicted': 0.5}
    >>> metrics({"name/loss": 0.5}, known=["name/loss"])
    {'name/loss': 0.5}
    """
    renamed = {name: _renamed(name, METRICS) for name in stored}
    return {new if known is None or new in known else name: stored[name] for name, new in renamed.items()}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """The name of today: by the longest entry that is the name or, up to a dot or slash, its beginning."""
    for end in range(len(name), 0, -1):
        if name[:end] in table and name[end : end + 1] in ("", ".", "/"):
            return table[name[:end]] + name[end:] if table[name[:end]] else ""
    return name
