"""The weights that a run starts from, of a run with another network, other data or other classes: those that fit."""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmdiff.errors import UserError
from mmdiff.training import averaged_weights, checkpoint_files, run_metadata

LISTED = 40  # arrays that are named one by one


def start_from(
    workdir: str | os.PathLike, experiment: Any, described: dict[str, Any], ema: Any, mesh: Mesh, strict: bool = False
) -> tuple[Any, list[str]]:
    """-> (averaged weights, what is to be said): those of the newest checkpoint in `workdir` where an array has the same name and shape.

    Args:
      workdir: the run to start from.
      experiment: the run that starts.
      described: its data, `run_metadata.describe_data`.
      ema: its fresh averaged weights, which remain where nothing fits.
      mesh: what they are spread over, by experiment.rules.
      strict: demands that everything fits (config.train.start_strict).

    Raises:
      UserError: no checkpoint, one that cannot be read, nothing fits, or something does not and `strict` is set.
    """
    checkpoint, others = averaged_weights.choose(workdir)
    wanted, saved = averaged_weights.averages_of(experiment, mesh), checkpoint_files.saved_arrays(checkpoint, "ema")
    here, there = checkpoint_files.array_shapes(wanted), checkpoint_files.array_shapes(saved)
    fit = [name for name in here if there.get(name) == here[name]]
    unfit = [name for name in {**here, **there} if name not in fit]
    said = [f"the weights from {workdir} were trained with other {name}: what they know of these does not fit"
            for name in run_metadata.other_dependencies(workdir, experiment)]  # fmt: skip
    for name, (number, old, new) in run_metadata.other_classes(run_metadata.read_data(workdir), described).items():
        said.append(f"class {number} of {name} is {old} in {workdir} and {new} here: what the weights know of labels does not fit")
    if unfit:
        more = f" and {len(unfit) - LISTED} more" if len(unfit) > LISTED else ""
        shapes = [f"{name} ({there.get(name, 'absent')} there, {here.get(name, 'absent')} here)" for name in unfit[:LISTED]]
        listed = ", ".join(shapes) + more
        said.append(f"{len(fit)} of {len(here)} arrays are taken from {checkpoint}; those here that do not fit begin afresh: {listed}")
    if not fit or strict and said:
        reason = said[-1] if fit else f"no array of {checkpoint} fits this network, {listed}"
        remedy = "set config.train.start_strict=false to take what fits" if fit else "name a run of a like network as config.train.start"
        raise UserError(f"{reason}: {remedy}.")
    if not unfit:
        return averaged_weights.restore_averages(checkpoint, wanted, others), said

    targets = dict(zip(here, jax.tree.leaves(wanted)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    like = [
        targets[name] if name in fit else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
        for name, leaf in zip(there, jax.tree.leaves(saved))
    ]
    found = averaged_weights.restore_averages(checkpoint, jax.tree.unflatten(jax.tree.structure(saved), like), others)
    found = dict(zip(there, jax.tree.leaves(found)))
    fresh = zip(here, jax.tree.leaves(ema))
    return jax.tree.unflatten(jax.tree.structure(ema), [found[name] if name in fit else leaf for name, leaf in fresh]), said
