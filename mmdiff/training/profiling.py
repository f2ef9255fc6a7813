"""A trace of some steps of a run, by `jax.profiler`: what the devices and the hosts do, and when."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax

from mmdiff.errors import UserError

WARM = 10  # steps before those that are traced, where no first one is named


class Profile:
    """Writes WORKDIR/profile/plugins/profile/TIME/HOST.xplane.pb, of each process; a context manager.

    Args:
      asked: (first step, last step), or (None, how many); None for no trace.
      workdir: the run's folder.
      start, last: the steps that the run begins after, and ends with.
      say: shows a line.

    Raises:
      UserError: no such step comes.
    """

    def __init__(self, asked: tuple[int | None, int] | None, workdir: pathlib.Path, start: int, last: int, say: Callable[[str], None]):
        self._folder, self._say, self._traces, self.first, self.last = pathlib.Path(workdir) / "profile", say, False, 0, 0
        if asked is None:
            return
        first, until = asked
        self.first = first if first is not None else max(start + 1, min(start + 1 + WARM, last + 1 - until))
        self.last = min(last, until if first is not None else self.first + until - 1)
        if not start < self.first <= self.last:
            raise UserError(f"--profile: steps {first} to {until} do not come: this run takes the steps {start + 1} to {last}.")

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_) -> None:
        if self._traces:
            self._stop()

    def at_edge(self, step: int) -> bool:
        """Whether the trace begins or ends after `step`: then the devices should have finished it."""
        return bool(self.first) and step in (self.first - 1, self.last)

    def after(self, step: int) -> None:
        """Begins or ends the trace, if that is due after `step`."""
        if not self.first:
            return
        if step == self.first - 1:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it hooks all running threads of Python, at which a process has died
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._traces = True
        elif step == self.last:
            self._stop()

    def _stop(self) -> None:
        self._traces = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # a full disk: training goes on
            self._say(f"no trace, training continues: {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            self._say(f"a trace of the steps {self.first} to {self.last} is in {self._folder} (pip install xprof; xprof {self._folder})")
