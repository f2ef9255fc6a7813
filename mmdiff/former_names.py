"""The names that files of earlier versions use: one table. Stored runs are read through it; nothing else in the package knows an old name.

Whoever renames something that a run stores adds a line here in the same commit. `tests/test_stored_runs.py` opens runs of before.

    KEYS      keys of config.json, or whole sections: {old: new}; new is "" where a key is gone and runs without it are the same runs
    ADDED     keys that configs have got since: {key: the value that stands for runs without it}
    METRICS   metrics in report.json, metrics.jsonl, a checkpoint and config.train.best: {old: new}, whole or as the first part ("match")
    FILES     files of a workdir: {new: old}

A config file of a user's own may still use an old key: a stored key is renamed only where the config that is opened has the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

KEYS: dict[str, str] = {"eval.calls": "eval.sampling_steps"}
ADDED: dict[str, Any] = {}
METRICS: dict[str, str] = {
    "cosine_read": "cosine_predicted", "error_read": "error_predicted", "error_read_mean": "error_predicted_mean",
    "error_read_linear": "error_predicted_linear", "miou_read": "miou_predicted"}
FILES = {"dependencies.json": "beside.json"}

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
    return {key: value for key, value in ADDED.items() if key in known and key not in found} | found


def metrics(stored: Mapping[str, T]) -> dict[str, T]:
    """Stored values under the names that their metrics have now.

    >>> metrics({"cosine_read": 0.5})
    {'cosine_predicted': 0.5}
    """
    return {_renamed(name, METRICS): value for name, value in stored.items()}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """The name of today: by the longest entry that is the name or, up to a dot or slash, its beginning."""
    for end in range(len(name), 0, -1):
        if name[:end] in table and name[end : end + 1] in ("", ".", "/"):
            return table[name[:end]] + name[end:] if table[name[:end]] else ""
    return name
