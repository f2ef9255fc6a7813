"""Skipped steps: the first is reported, and many in a row end a run that no longer learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from mmdiff.errors import UserError

MOST = 100  # skipped steps in a row that end a run, where config.train does not set max_skipped


class SkippedSteps:
    """Looks at the metrics of every step that the device has finished.

    Args:
      options: config.train.
      say: shows a line.
      latest: `() -> the step of the newest checkpoint`, or None.
      ahead: how far the position is ahead of step * global_batch.
    """

    def __init__(self, options: ml_collections.ConfigDict, say: Callable[[str], Any], latest: Callable[[], int | None], ahead: int = 0):
        self._options, self._say, self._latest, self._ahead = options, say, latest, ahead
        self._in_a_row, self._seen = 0, False

    def finished(self, step: int, metrics: Mapping[str, Any], total: Any) -> None:
        """The step's metrics, and how many steps of the run were skipped up to it.

        Raises:
          UserError: config.train.max_skipped steps in a row, or all steps of the run, were skipped. All processes raise it.
        """
        if not float(metrics["skipped"]):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        cause = next((name for name in ("loss", "grad_norm") if not math.isfinite(float(metrics[name]))), "")
        cause = {"loss": "loss", "grad_norm": "gradient", "": "update by the optimizer"}[cause]
        if not self._seen:
            self._seen, size = True, self._options.global_batch
            first = (step - 1) * size + self._ahead
            self._say(
                f"step {step} is skipped: its {cause} is not finite; it holds the examples at the positions {first} to "
                f"{first + size - 1} of the order (mmdiff.data.order); further skipped steps are counted"
            )
        every = step == self._options.steps and int(total) == step
        if self._in_a_row >= self._options.get("max_skipped", MOST) or every:
            saved = self._latest()
            kept = f"continues from step {saved}, which is kept" if saved else "starts again, as there is no checkpoint yet"
            raise UserError(
                f"{self._in_a_row} steps in a row up to step {step} were skipped (config.train.max_skipped), as the {cause} was not "
                f"finite: look at the learning rate and the data, and run the same command again, which {kept}."
            )
