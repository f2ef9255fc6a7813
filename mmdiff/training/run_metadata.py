"""What a run's folder says of the run, and whether it may continue: its config, its data, its classes, what it depends on.

    WORKDIR/config.json         the run's config
    WORKDIR/dependencies.json   fingerprints of the frozen networks that it is trained with, if there are any
    WORKDIR/data.json           the fingerprint of its training data and the names of the classes (each checkpoint has them as well)
    WORKDIR/source.json         of converted weights, and of runs that start from them: what they are, whose, and their licence
    WORKDIR/snapshots           see `post_hoc_ema`
    WORKDIR/checkpoints/STEP    a run that has none may start again with any config
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from mmdiff import config as configs
from mmdiff import files, former_names
from mmdiff.data.modalities import Labels
from mmdiff.data.sources import fingerprint
from mmdiff.errors import UserError

CONFIG, SOURCE, SNAPSHOTS = "config.json", "source.json", "snapshots"
LISTED = 6  # keys of another config that an error names

# What may change when a run continues: how it learns, how long, where and how often, but not what its weights mean. A section stands for
# its keys. (The mesh, micro-batches and rematerialisation change results by rounding only.)
# What lies there must be the same: fingerprints of data and of frozen networks are compared.
FOLDERS = (
    "data.dir", "data.towers", "data.set", "data.images", "encoder.kind", "encoder.path", "encoder.codes", "text_encoder.kind",
    "text_encoder.path", "text_encoder.tokenizer", "vector_encoder.kind", "vector_encoder.path", "feature_encoder.kind",
    "feature_encoder.path", "text_encoder.reduce", "tokenizer.kind", "tokenizer.path")
MAY_DIFFER = ("train", "sample", "eval", *FOLDERS, "data.damaged", "data.max_skipped", "model.remat")
MUST_AGREE = ("train.ema", "train.ema_widths", "train.start", "train.noise_scale", "train.norm_groups")  # what is averaged, and of what
MAY_DIFFER_IN_USE = (*MAY_DIFFER, *MUST_AGREE, "seed")  # when the weights are only used


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """The values of WORKDIR/config.json; {} if there is no such file. Raises UserError if it is not the config of a run."""
    path = pathlib.Path(workdir) / CONFIG
    config = read_json(path)
    if config is None:
        return {}
    if not isinstance(config, Mapping) or not isinstance(config.get("train"), Mapping):
        raise UserError(f"{path} is not the config of a run: restore it, or choose another folder.")
    return config


def check_config(
    workdir: str | os.PathLike, config: ml_collections.ConfigDict, *, in_use: bool = False
) -> dict[str, tuple[Any, Any]]:
    """-> {key: (there, here)}: what differs from the run in `workdir`, and may.

    Keys in MAY_DIFFER (full keys or sections) may, unless a longer one in MUST_AGREE says that they may not; those in MAY_DIFFER_IN_USE if
    the weights are only used (`in_use`), not trained on. Without a checkpoint there is nothing to protect: {}.

    Raises:
      UserError: `workdir` holds checkpoints of another config (it names keys that differ, `LISTED` at most, with both values) or, if it is
        to be trained, of none, or something else.
    """
    stored = read_config(workdir)
    if not steps(checkpoint_folder(workdir)):
        return {}
    if not stored and in_use:
        return {}  # weights that fit can be used, but to train them on, with another seed perhaps, would be another run
    if not stored:
        raise UserError(f"{workdir} holds checkpoints without their config.json, so nobody knows what they are of: restore it.")
    may_differ = MAY_DIFFER_IN_USE if in_use else MAY_DIFFER
    here = json.loads(configs.to_json(config))
    values = configs.flatten(here)
    there = {key: value for key, value in configs.OPTIONAL.items() if key in values} | former_names.keys(configs.flatten(stored), values)
    differs = configs.difference(there, here)

    def longest(key, names):
        return max((len(name) for name in names if key == name or key.startswith(f"{name}.")), default=0)

    may = {key for key in differs if longest(key, may_differ) > longest(key, set(MUST_AGREE) - set(may_differ))}
    if set(differs) - may:
        named = [f"{key} (there {old!r}, here {new!r})" for key, (old, new) in differs.items() if key not in may]
        listed = ", ".join(named[:LISTED]) + (f" and {len(named) - LISTED} more" if len(named) > LISTED else "")
        raise UserError(f"{workdir} holds a run of another config: {listed}; use that config or another workdir.")
    return {key: values for key, values in differs.items() if key in may}


def write_config(workdir: str | os.PathLike, config: ml_collections.ConfigDict) -> None:
    """Writes WORKDIR/config.json, creating the folder. Raises UserError if that is not possible, or if there is one of something else."""
    path = pathlib.Path(workdir) / CONFIG
    with writing(workdir):
        read_config(workdir)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, configs.to_json(config))


def check_dependencies(workdir: str | os.PathLike, experiment: Any) -> None:
    """Raises UserError if the run in `workdir` was trained with other frozen networks than those available (`Experiment.frozen_deps`)."""
    for name, (there, here) in other_dependencies(workdir, experiment).items():
        raise UserError(
            f"{workdir} was trained with {name} of fingerprint {there[:12]}, and available is {here[:12]}: bring the former back, or train "
            "again in another workdir.")


def other_dependencies(workdir: str | os.PathLike, experiment: Any) -> dict[str, tuple[str, str]]:
    """The available frozen networks that are not those of the run in `workdir`: name -> fingerprints (there, here)."""
    stored = _dependencies(workdir) if experiment.frozen_deps else {}
    found = {name: (stored[name], fingerprint()) for name, fingerprint in experiment.frozen_deps.items() if name in stored}
    return {name: (there, here) for name, (there, here) in found.items() if here and here != there}


def write_dependencies(workdir: str | os.PathLike, experiment: Any) -> None:
    """Writes WORKDIR/dependencies.json, where there is something to say. Raises UserError if that is not possible."""
    found = _dependencies(workdir) | {name: here for name, fingerprint in experiment.frozen_deps.items() if (here := fingerprint())}
    path = pathlib.Path(workdir) / "dependencies.json"
    if found or path.exists():
        with writing(workdir):
            files.write_json(path, found)


def write_source(workdir: str | os.PathLike, start: str | os.PathLike) -> None:
    """Writes WORKDIR/source.json, if the run that this one starts from has one: the licence of its weights goes on."""
    if start and (found := read_source(files.expand(start, without=files.ASIDE))):
        with writing(workdir):
            files.write_json(pathlib.Path(workdir) / SOURCE, found)


def read_source(workdir: str | os.PathLike) -> dict[str, Any]:
    """What WORKDIR/source.json says, {} without it. Raises UserError if it is damaged: a licence is not dropped."""
    path = pathlib.Path(workdir) / SOURCE
    found = read_json(path)
    if found is not None and not (isinstance(found, Mapping) and isinstance(found.get("licence"), str)):
        raise UserError(f"{path} is not what mmdiff convert writes: restore it.")
    return dict(found or {})


def describe_data(experiment: Any, source: Any) -> dict[str, Any]:
    """What a run notes of its training data: {"fingerprint": "LENGTH-DIGEST", "classes": {modality: [name, ...]}}."""
    labels = {name: modality for name, modality in experiment.modalities.items() if isinstance(modality, Labels)}
    classes = {name: [str(word) for word in _words(each) or getattr(source, "names", ())] for name, each in labels.items()}
    return {"fingerprint": fingerprint(source), "classes": {name: words for name, words in classes.items() if words}}


def check_data(
    workdir: str | os.PathLike, stored: Mapping[str, Any] | None, here: Mapping[str, Any], *, moved: Iterable[str] = (), other: bool = False
) -> list[str]:
    """What is to be said when a run continues with these data.

    Args:
      workdir: the run.
      stored: `describe_data` of the run, None in runs of before it was noted.
      here: that of the data it continues with.
      moved: the keys of the config that name another folder now.
      other: whether the user wants to continue with other data (config.train.other_data).

    Raises:
      UserError: the data are others, labels mean other classes, or that cannot be known of data that were moved.
    """
    if not stored:
        if moved := list(moved):
            raise UserError(
                f"{workdir} does not say what it was trained on, so the data cannot be compared: config.{moved[0]} must stay as it is.")
        return ["the run does not say what it was trained on: the data are taken to be the same"]
    found = []
    for name, (number, old, new) in other_classes(stored, here).items():
        found.append(f"class {number} of {name} was {old} and is {new} now, so labels mean something else")
    if stored["fingerprint"] != here["fingerprint"]:
        old, new = (int(data["fingerprint"].partition("-")[0]) for data in (stored, here))
        what = f"{old:,} examples then, {new:,} now" if old != new else f"{old:,} examples as before, but not the same"
        found.append(f"the training data are not those of the run in {workdir} ({what})")
    if found and not other:
        raise UserError(f"{'; '.join(found)}: bring the former data back, or set config.train.other_data=true to continue with these.")
    return found


def other_classes(stored: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[int, str, str]]:
    """The modalities whose labels mean other classes than before: name -> the first such label and its class (then, now)."""
    found = {}
    for name, old in stored.get("classes", {}).items():
        new = here.get("classes", {}).get(name)
        if new and new != old:
            pairs = itertools.zip_longest(old, new, fillvalue="no class")
            number, words = next((number, words) for number, words in enumerate(pairs) if words[0] != words[1])
            found[name] = (number, *words)
    return found


def check_classes(workdir: str | os.PathLike, experiment: Any) -> None:
    """Raises UserError if labels mean other classes in the test data than in what the run in `workdir` was trained on.

    Only the data themselves can tell where the config names no classes (a folder of classes that has got one more).
    """
    stored = read_data(workdir)
    unnamed = [name for name in stored.get("classes", {}) if not _words(experiment.modalities.get(name))]
    names = [str(word) for word in getattr(experiment.test_data(), "names", ())] if unnamed else []
    for name, (number, old, new) in other_classes(stored, {"classes": dict.fromkeys(unnamed, names)}).items():
        raise UserError(
            f"class {number} of {name} was {old} in the data that the run in {workdir} was trained on and is {new} in those to measure on: "
            "name a folder with the same classes as config.data.dir.")


def write_data(workdir: str | os.PathLike, described: Mapping[str, Any]) -> None:
    """Writes WORKDIR/data.json. Raises UserError if that is not possible."""
    with writing(workdir):
        files.write_json(pathlib.Path(workdir) / "data.json", described)


def read_data(workdir: str | os.PathLike) -> dict[str, Any]:
    """What WORKDIR/data.json says, {} without it. Raises UserError if it is damaged."""
    path = pathlib.Path(workdir) / "data.json"
    found = read_json(path)
    whole = isinstance(found, Mapping) and isinstance(found.get("fingerprint"), str) and isinstance(found.get("classes"), Mapping)
    whole = whole and all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in found["classes"].values())
    if found is not None and not whole:
        raise UserError(f"{path} is not what a run writes: restore it, or remove it and name classes by their numbers.")
    return dict(found or {})


def with_class_names(experiment: Any, workdir: str | os.PathLike) -> Any:
    """The experiment, whose classes have the names that the data of the run gave them where it does not name them itself."""
    named = {}
    for name, words in read_data(workdir).get("classes", {}).items():
        modality = experiment.modalities.get(name)
        if isinstance(modality, Labels) and not _words(modality):
            words = [*words, *map(str, range(len(words), modality.count))][: modality.count]
            named[name] = dataclasses.replace(modality, names=tuple(words))
    return dataclasses.replace(experiment, modalities={**experiment.modalities, **named}) if named else experiment


def checkpoint_folder(workdir: str | os.PathLike) -> pathlib.Path:
    """WORKDIR/checkpoints, without links on the way. Raises UserError if WORKDIR is no path of a folder."""
    if "://" in str(workdir):
        raise UserError(f"the workdir {workdir} is not a folder: mount the bucket (gcsfuse, s3fs) and name the folder.")
    try:
        return pathlib.Path(workdir).resolve() / "checkpoints"
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a null byte
        raise UserError(f"the workdir {workdir!s} is no folder ({error}): choose another.") from error


def steps(folder: pathlib.Path) -> list[int]:
    """The steps of all committed checkpoints in a run's checkpoint folder, ascending. Raises UserError if it may not be read."""
    with reading(folder):
        if not folder.is_dir():
            return []
        names = [entry.name for entry in folder.iterdir() if entry.name.isascii() and entry.name.isdecimal() and entry.is_dir()]
        return sorted(int(name) for name in names if name == str(int(name)))  # 007 is nobody's step


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds; None if there is no file. Raises UserError if it may not be read or is damaged."""
    try:
        found = files.read_json(path)
        if found is None:
            raise files.FileError(path, "is not a JSON file of a run (it is null)", "restore it")
        return found
    except files.Missing:
        if path.is_symlink():
            raise UserError(f"{path} is a link to what is not there: restore it, or use another workdir.") from None
        return None
    except files.FileError as error:
        if isinstance(error.__cause__, OSError):
            with reading(path):
                raise error.__cause__ from None
        raise UserError(f"{path} {error.reason}: restore it, or use another workdir.") from error


@contextlib.contextmanager
def reading(path: str | os.PathLike):
    """Reports what the operating system says of a file or folder of a run that cannot be read."""
    try:
        yield
    except OSError as error:
        remedy = "ask its owner for it" if isinstance(error, PermissionError) else "restore it"
        reason = error.strerror or error
        raise UserError(f"{error.filename or path} cannot be read ({reason}): {remedy}, or use another workdir.") from error


@contextlib.contextmanager
def writing(workdir: str | os.PathLike):
    """Reports what the operating system says of a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        if error.filename and os.path.dirname(str(error.filename)) == os.path.realpath(workdir):
            reason = f"{os.path.basename(str(error.filename))}: {reason}"
        raise UserError(f"the workdir {workdir} cannot be written ({reason}): choose another.") from error


def _words(modality: Any) -> Sequence[str]:
    """What the config calls the classes of a modality."""
    return (modality.names or modality.synonyms or ()) if isinstance(modality, Labels) else ()


def _dependencies(workdir: str | os.PathLike) -> dict[str, str]:
    """What is noted of a run; a folder without checkpoints holds none, whatever an earlier attempt has left."""
    if not steps(checkpoint_folder(workdir)):
        return {}
    for name in ("dependencies.json", former_names.FILES["dependencies.json"]):
        path = pathlib.Path(workdir) / name
        found = read_json(path)
        if found is not None:
            if not isinstance(found, Mapping) or not all(isinstance(value, str) for value in found.values()):
                raise UserError(f"{path} is not a list of fingerprints: restore it, or use another workdir.")
            return dict(found)
    return {}
