"""Published weights made of runs: what `mmdiff convert --to` does (`conversion` is the way in).

    export_weights(open_run("imagenet256/dit_xl2", "runs/mine"), "published", "mine")   # averaged weights, for others
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

from mmdiff import __version__, schedules
from mmdiff import config as configs
from mmdiff import files as readers
from mmdiff.conversion import OWN
from mmdiff.convert import diffusers_dit, kinds, layouts
from mmdiff.convert.weight_files import weight_files
from mmdiff.convert.weight_writer import write_weights
from mmdiff.data import drafts
from mmdiff.data.modalities import Labels
from mmdiff.errors import UserError
from mmdiff.processes import Gaussian, Joint
from mmdiff.training import remote_runs, run_metadata
from mmdiff.training.run_metadata import SOURCE


def export_weights(run: Any, to: str, out: str | os.PathLike, vae: str | os.PathLike | None = None) -> list[str]:
    """Writes the averaged weights of a run for others; -> what is to be said of them.

    Args:
      run: an open run.
      to: "published" (the layout of the original code), "diffusers" (its folder: of DiT the whole pipeline), or "mmdiff" (parameters by
        path with the config, from which `conversion.import_weights` makes the same run).
      out: a folder that does not exist, or is empty, or the address of one.
      vae: for a DiT in "diffusers", the folder of the autoencoder, in diffusers' layout, that the pipeline gets a copy of; that of the
        config (config.encoder.path) by default.

    Raises:
      UserError: the network's function is not the published one, or there is something in `out`; nothing is written then.
    """
    try:
        with remote_runs.filled_at(out) as folder, drafts.draft(folder, time.time_ns()) as draft:  # nothing is continued
            said = {OWN: _write_own, "published": _write_published, "diffusers": _write_diffusers}[to](run, draft, vae)
            if noted := run_metadata.read_source(run.workdir):
                readers.write_json(draft / SOURCE, noted)
                said.append(f"licence: {noted['licence']}")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): choose another folder.") from error
    return [*said, f"{out} holds step {run.step} of {run.workdir}"]


def _write_own(run: Any, out: pathlib.Path, vae: Any) -> list[str]:
    arrays = {"/".join(path): np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(run.params).items()}
    config = {"format": OWN, "version": __version__, "step": run.step, "config": json.loads(configs.to_json(run.config))}
    for name, file in {"data": "data.json", "dependencies": "dependencies.json", "source": SOURCE}.items():
        config[name] = run_metadata.read_json(run.workdir / file) or {}
    write_weights(out, arrays, config)
    return [f"{len(arrays)} arrays by their path: read them with --as {OWN}"]


def _write_published(run: Any, out: pathlib.Path, vae: Any) -> list[str]:
    name, kind = _exported(run)
    if name == "diffusers-dit":
        raise UserError("the run computes diffusers' DiT, which the original code does not: write it with --to diffusers.")
    tensors = layouts.tensors(kind.layout, run.experiment.net, run.params["params"])
    write_weights(out, tensors)
    return [f"{len(tensors)} tensors of {kind.about}"]


def _write_diffusers(run: Any, out: pathlib.Path, vae: Any) -> list[str]:
    name, kind = _exported(run)
    net = run.experiment.net
    if not kind.classes:
        raise UserError(f"diffusers has no pipeline for {kind.about}: write it with --to published.")
    if kind.alone:
        layout, config_of = kind.alone
        tensors = layouts.tensors(layout, net, run.params["params"])
        config = config_of(net, tensors)
        write_weights(out, tensors, config)
        return [f"{len(tensors)} tensors of diffusers' {config['_class_name']}: the rest of the pipeline, CLIP among it, is not written"]
    vae = vae or run.config.get("encoder", {}).get("path")
    if not vae:
        raise UserError("diffusers' pipeline decodes latents: name the folder of the autoencoder, in diffusers' layout, with --vae.")
    if net.patches.height != net.patches.width:
        raise UserError(f"diffusers' DiT has square images alone, not {net.patches.height}x{net.patches.width}: write --to published.")
    steps = _check_chain(run)
    vae = _vae(readers.expand(vae), net.patches.channels)
    tensors = layouts.tensors(diffusers_dit.DIFFUSERS, net, run.params["params"])
    write_weights(out / "transformer", tensors, diffusers_dit.transformer_config(net))
    (out / "vae").mkdir()
    for file in [vae / "config.json", *weight_files(vae)]:
        shutil.copyfile(file, out / "vae" / file.name)
    for index in vae.glob("*.index.json"):
        shutil.copyfile(index, out / "vae" / index.name)
    (out / "scheduler").mkdir()
    for path, content in (
        ("scheduler/scheduler_config.json", diffusers_dit.scheduler_config(steps)),
        ("model_index.json", diffusers_dit.model_index(_class_names(run))),
    ):
        (out / path).write_text(json.dumps(content, indent=2) + "\n")
    said = [f"{len(tensors)} tensors of diffusers' DiTPipeline, with the autoencoder of {vae}"]
    if name == "dit":
        said.append("diffusers computes another function of them: the features of times have the frequencies 10000^(-i/127), not /128")
    if net.classes != 1000:
        said.append(f"DiTPipeline takes class 1000 for the null: with {net.classes} classes it samples without guidance (guidance_scale=1)")
    return said


def _exported(run: Any) -> tuple[str, kinds.Kind]:
    """The kind of published weights that a run has."""
    net = run.experiment.net
    name = kinds.kind_of(net)
    if name is None:
        near = [(name, found) for name, kind in kinds.KINDS.items() if (found := kinds.differences(kind, net))]
        if not near:
            raise UserError(f"{run.name} has a network of its own, which has no published layout: write it with --to {OWN}.")
        name, found = min(near, key=lambda pair: len(pair[1]))
        listed = ", ".join(f"{field}={here}, not {needed}" for field, (here, needed) in found.items())
        raise UserError(f"the network of {run.name} is not that of {name} ({listed}), where its weights mean nothing: write --to {OWN}.")
    return name, kinds.KINDS[name]


def _check_chain(run: Any) -> int:
    """The steps of the chain that diffusers' scheduler is told of. Raises UserError for another chain or parameterisation."""
    process = run.experiment.process
    parts = process.parts.values() if isinstance(process, Joint) else [process]
    image = next((part for part in parts if isinstance(part, Gaussian)), None)
    nodes, steps = np.arange(1, 1001) / np.float32(1000), 1000
    alike = image is not None and getattr(image.predict, "__name__", "") == "eps"
    if not alike or not np.allclose(image.schedule(nodes)[0], schedules.linear_beta(steps)(nodes)[0], atol=1e-6):
        raise UserError(f"{run.name} is not of eps and 1,000 linear betas, as DiT is: write its weights with --to published.")
    return steps


def _vae(folder: pathlib.Path, channels: int) -> pathlib.Path:
    """The folder of an autoencoder of diffusers', perhaps that of a pipeline. Raises UserError unless it has so many channels."""
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    config = readers.read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if not isinstance(config, Mapping) or config.get("_class_name") != "AutoencoderKL" or config.get("latent_channels", 4) != channels:
        raise UserError(f"{folder} is not the folder of an AutoencoderKL with {channels} latent channels: name one with --vae.")
    return folder


def _class_names(run: Any) -> list[str]:
    labels = next((modality for modality in run.experiment.modalities.values() if isinstance(modality, Labels)), None)
    if labels is None:
        return []
    return [str(words) for words in labels.names or range(labels.count)]
