"""What the files of a checkpoint say: which steps are whole, their meta, the names and shapes of their arrays."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from mmdiff.errors import UserError
from mmdiff.training import integrity, run_metadata


def read_meta(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself: position, train_seconds, metrics, ...; {} if there is none of this step."""
    checkpoint = run_metadata.checkpoint_folder(workdir) / str(step)
    return meta_of(checkpoint) if checkpoint.is_dir() else {}


def cost(meta: Mapping[str, Any]) -> dict[str, float]:
    """`train_seconds` up to a checkpoint, evaluations and saves included, and the `images_per_second` that this makes."""
    return {"train_seconds": meta["train_seconds"], "images_per_second": meta["position"] / meta["train_seconds"]}


def intact(folder: pathlib.Path) -> tuple[list[int], dict[int, str]]:
    """-> (the steps of checkpoints whose small files are whole and whose others have their size, what is wrong with each of the others)."""
    found = {step: integrity.damage(folder / str(step)) for step in run_metadata.steps(folder)}
    return [step for step in found if not found[step]], {step: problem for step, problem in found.items() if problem}


def meta_of(checkpoint: pathlib.Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises UserError if it cannot be read."""
    with unreadable(checkpoint), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        meta = reader.restore(checkpoint / "meta")
        if not isinstance(meta, Mapping):
            raise ValueError(f"its meta is {meta!r:.50}")
        return meta


def check_step(checkpoint: pathlib.Path, step: int | None) -> None:
    """Raises UserError if a checkpoint is of another step than its folder says; those of earlier versions do not note it for inference."""
    if step not in (None, int(checkpoint.name)):
        raise UserError(
            f"the checkpoint {checkpoint} is a copy of that of step {step}, not of step {checkpoint.name}: "
            f"move it away, or name its folder {step} again.")


def check_fit(checkpoint: pathlib.Path, **items: Any) -> None:
    """Raises UserError unless the saved arrays have the names and shapes of these trees."""
    for item, tree in items.items():
        saved, wanted = array_shapes(saved_arrays(checkpoint, item)), array_shapes(tree)
        for name in [*wanted, *saved]:
            there, here = saved.get(name, "absent"), wanted.get(name, "absent")
            if there != here:
                raise UserError(
                    f"the checkpoint {checkpoint} is of another network, optimizer or loss: {item}/{name} is {there} there and "
                    f"{here} here; go back to the code and config that wrote it, or use another workdir."
                )


def saved_arrays(checkpoint: pathlib.Path, item: str) -> Any:
    """A pytree with what is noted of each array in an item of a checkpoint, "state" or "ema": `shape`, `dtype`."""
    with unreadable(checkpoint):
        return ocp.StandardCheckpointHandler().metadata(checkpoint / item).tree


def array_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """path -> shape of the arrays of a tree, "params/blocks/mlp/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


@contextlib.contextmanager
def unreadable(checkpoint: pathlib.Path):
    """Reports what goes wrong when a checkpoint is read as one sentence."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read ({reason}): if it is corrupt, move it away to continue from the one before."
        ) from error
