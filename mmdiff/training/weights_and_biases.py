"""Curves and grids in Weights & Biases, for config.train.wandb=PROJECT: an optional package, `pip install 'mmdiff[wandb]'`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

from mmdiff import files
from mmdiff.errors import UserError, import_extra

log = logging.getLogger(__name__)


def check(project: str) -> None:
    """Raises UserError if a project is named and the package is not there."""
    if project:
        try:
            importlib.import_module("wandb")
        except ImportError as error:
            remedy = "pip install 'mmdiff[wandb]', or leave it out"
            raise UserError(f"config.train.wandb needs the package wandb ({error}): {remedy}.") from error


class WandbRun:
    """The run in Weights & Biases: the same one when it continues, by the id in WORKDIR/wandb.json.

    What goes wrong later ends these curves, with a warning, and not the training.

    Args:
      workdir: the run's folder, whose name it has.
      project: where it belongs.
      config: all values of the run.

    Raises:
      UserError: it cannot begin: no login, no network, ...
    """

    def __init__(self, workdir: pathlib.Path, project: str, config: Mapping[str, Any]):
        wandb = import_extra("wandb", "wandb")

        self._image, path = wandb.Image, pathlib.Path(workdir) / "wandb.json"
        try:
            identity = files.read_json(path)["id"]
        except files.Missing:
            identity = secrets.token_hex(4)
            files.write_json(path, {"id": identity})
        name = path.absolute().parent.name
        try:
            self._run = wandb.init(project=project, id=identity, name=name, dir=str(workdir), resume="allow", config=dict(config))
        except Exception as error:
            remedy = "run wandb login, set WANDB_MODE=offline, or leave it out"
            raise UserError(f"config.train.wandb={project!r} cannot be reached ({' '.join(str(error).split())}): {remedy}.") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, lambda: dict(values))

    def image(self, step: int, name: str, image: Any) -> None:
        """A Pillow image."""
        self._log(step, lambda: {name: self._image(image)})

    def close(self) -> None:
        with self._optional():
            if self._run:
                self._run.finish()

    def _log(self, step, content) -> None:
        with self._optional():
            if self._run:
                self._run.log(content(), step=step)

    @contextlib.contextmanager
    def _optional(self):
        try:
            yield
        except Exception as error:  # a run does not end for want of curves
            self._run = None
            log.warning("nothing more is sent to Weights & Biases: %s: %s", type(error).__name__, error)
