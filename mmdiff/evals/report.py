"""The two files an evaluation leaves in the run's folder: report.json for programs, report.html for people."""

from __future__ import annotations

import base64
import datetime
import functools
import html
import importlib.metadata
import io
import json
import math
import operator
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from mmdiff import config as configs
from mmdiff import files, former_names
from mmdiff.errors import UserError
from mmdiff.evals import plots
from mmdiff.evals.evaluator import EvalResult

PACKAGES = ("mmdiff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "scikit-learn", "tensorflow-datasets")


def paths(workdir, split: str = "test") -> tuple[pathlib.Path, pathlib.Path]:
    """The two files of a report: report.json and report.html, of the validation data report-validation.json and .html."""
    name = "report" if split == "test" else f"report-{split}"
    return pathlib.Path(workdir, f"{name}.json"), pathlib.Path(workdir, f"{name}.html")


def is_of(path: pathlib.Path, step: int, config: Any) -> bool:
    """Whether report.json is there, of the weights of a step, and of this config."""
    try:
        report = files.read_json(path)
    except UserError:
        return False
    if not isinstance(report, Mapping) or report.get("step") != step or not isinstance(report.get("config"), Mapping):
        return False
    here = json.loads(configs.to_json(config))
    differs = configs.difference(former_names.keys(configs.flatten(report["config"]), configs.flatten(here)), here)
    return all(key in configs.OPTIONAL and old is None for key, (old, _) in differs.items())


def write(
    workdir, experiment, config, results: Sequence[EvalResult], step: int, cost: Mapping[str, float] | None = None
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the two files of what was measured on `experiment.split`; returns their `paths`.

    report.json is flat: every metric by name, then the `cost` of the measured weights, `train_seconds`, `images_per_second` and `steps`
    (null if it is not known), their `step`, `seed`, the `split` that was measured, and the dicts `settings` (counts,
    sampler, features), `versions`, `device` and `config`. report.html is one self-contained page with the figures and the curves of
    metrics.jsonl.

    Raises:
      UserError: the folder cannot be written.
    """
    workdir = pathlib.Path(workdir)
    measured = functools.reduce(operator.or_, results)
    report = {
        **{name: _number(value) for name, value in measured.metrics.items()},
        **dict.fromkeys(("train_seconds", "images_per_second", "steps")),
        **(cost or {}),
        "step": int(step),
        "seed": int(config.seed),
        "split": experiment.split,
        "settings": dict(measured.settings),
        "versions": versions(),
        "device": device(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": json.loads(configs.to_json(config)),
    }
    json_path, html_path = paths(workdir, experiment.split)
    try:
        files.write_whole(json_path, json.dumps(configs.plain(report), indent=2, allow_nan=False) + "\n")
        files.write_whole(html_path, _page(workdir, report, measured))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write the report to {workdir} ({reason}): free some space or allow writing.") from error
    return json_path, html_path


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a metric may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> dict[str, Any]:
    """What this process computes on: `kind`, `platform`, `count`, and the host's processor and its cores."""
    devices = jax.devices()
    return {
        "kind": devices[0].device_kind,
        "platform": devices[0].platform,
        "count": len(devices),
        "host": _processor(),
        "host_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def read_metrics(path) -> dict[str, tuple[list[float], list[float]]]:
    """The curves of a metrics.jsonl: name -> (steps, values). Of a step that was logged twice the later line counts.

    Each line is an object with "step" and numbers. A line that is cut short (the run was killed while writing) is passed over.
    """
    curves: dict[str, dict[float, float]] = {}
    for line in _lines(pathlib.Path(path)):
        try:
            record = json.loads(line)
            step = float(record.pop("step"))
            numbers = {
                name: float(value) for name, value in record.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
            }
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
            continue
        for name, value in numbers.items():
            curves.setdefault(name, {})[step] = value
    return {name: (list(points), list(points.values())) for name, points in curves.items()}


# ---- The page ----

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --panel: #ffffff; --ink: #1f2328; --dim: #66707a; --line: #e3e5e8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181b; --panel: #1e2125; --ink: #e4e6e8; --dim: #98a1aa; --line: #33373c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 40px 20px 64px; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 26px; font-weight: 650; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 17px; font-weight: 650; margin: 40px 0 12px; }
p { margin: 0 0 12px; } .dim, figcaption { color: var(--dim); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px; margin-top: 24px; }
.card, figure, .panel { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 12px 14px; } .card b { display: block; font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--dim); font-size: 13px; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 16px; align-items: start; }
figure { margin: 0; padding: 16px; } figure h3 { font-size: 14px; font-weight: 600; margin: 0 0 10px; }
figure img, figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: 13px; margin-top: 10px; }
label { display: flex; align-items: center; gap: 12px; font-size: 13px; margin-top: 8px; } audio { height: 32px; flex: 1; min-width: 0; }
.panel { padding: 4px 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } td { padding: 8px 14px 8px 0; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child td { border-top: 0; } td:first-child { font-family: ui-monospace, monospace; font-size: 13px; white-space: nowrap; }
td.value { font-variant-numeric: tabular-nums; font-weight: 600; } td:last-child { width: 99%; }
details { margin-top: 12px; } summary { cursor: pointer; font-weight: 600; } pre { font-size: 12.5px; overflow-x: auto; }
"""


def _page(workdir: pathlib.Path, report: Mapping, measured: EvalResult) -> str:
    title = f"{workdir.resolve().name}: {report['split']} data at step {report['step']:,}"
    hardware = report["device"]
    trained = [f"{report['train_seconds']:,.0f} s of training"] if _real(report["train_seconds"]) else []
    trained += [f"{report['images_per_second']:,.0f} images per second"] if _real(report["images_per_second"]) else []
    where = f"{hardware['count']} x {hardware['kind']} ({hardware['host']}, {hardware['host_cores']} cores)"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="dim">{html.escape(" · ".join([*trained, where, "seed " + str(report["seed"]), report["time"]]))}</p>',
        '<div class="cards">',
        *(_card(name.replace("_", " "), value) for name, value in measured.metrics.items()),
        "</div>",
        "<h2>Figures</h2>" if measured.figures else "",
        '<div class="grid">',
        *(_figure(title, figure.image, figure.caption, figure.sounds) for title, figure in measured.figures.items()),
        "</div>",
    ]
    charts = list(_charts(workdir / "metrics.jsonl"))
    if charts:
        parts += ["<h2>Training</h2>", '<div class="grid">', *charts, "</div>"]
    parts += [
        "<h2>What the metrics are</h2>",
        _table([(name, _digits(value), measured.definitions.get(name, "")) for name, value in measured.metrics.items()]),
        "<h2>How they were measured</h2>",
        _table([(name, "", _words(value)) for name, value in report["settings"].items()]),
        "<h2>Versions</h2>",
        _table([(name, "", value) for name, value in report["versions"].items()]),
        f"<details><summary>Config</summary><pre>{html.escape(json.dumps(report['config'], indent=2))}</pre></details>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _charts(path: pathlib.Path) -> Iterator[str]:
    """One chart for each group of metrics: "loss", "loss/image" and the held-out "val/loss" are one group."""
    groups: dict[str, dict] = {}
    for name, curve in read_metrics(path).items():
        if name != "train_seconds" and any(curve[1]):  # what is always zero needs no chart
            groups.setdefault(name.removeprefix("val/").partition("/")[0], {})[name] = curve
    for group, curves in sorted(groups.items(), key=lambda item: item[0] != "loss"):  # the loss comes first
        chart = plots.lines(curves)
        if chart:
            yield _figure(group.replace("_", " "), chart, "")


def _figure(title: str, image: Any, caption: str, sounds: Mapping[str, bytes] | None = None) -> str:
    if not isinstance(image, str):
        data = io.BytesIO()
        image.save(data, "PNG", optimize=True)
        source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        # Two pixels of the image to one of the page: sharp on every screen.
        image = f'<img src="{source}" width="{image.width // 2}" alt="{html.escape(title)}">'
    players = "".join(
        f'<label>{html.escape(name)}<audio controls src="data:audio/wav;base64,{base64.b64encode(sound).decode()}"></audio></label>'
        for name, sound in (sounds or {}).items()
    )
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{html.escape(title)}</h3>{image}{players}{caption}</figure>"


def _card(name: str, value: float) -> str:
    return f'<div class="card"><b>{_digits(value)}</b><span>{html.escape(name)}</span></div>'


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    cells = []
    for name, value, text in rows:
        middle = f'<td class="value">{value}</td>' if value else ""
        cells.append(f"<tr><td>{html.escape(name)}</td>{middle}<td>{html.escape(text)}</td></tr>")
    return f'<div class="panel"><table>{"".join(cells)}</table></div>'


# ---- Parts ----


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return files.read_lines(path)
    except UserError:
        return []


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _number(value) -> float | None:
    """JSON has no NaN and no infinity: null."""
    return float(value) if math.isfinite(value) else None


def _real(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _digits(value: float) -> str:
    """Four decimals for shares and the like, four significant digits for the rest."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.4g}"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
