"""From a source to the batches of this process, ahead of time."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmdiff.data.order import ORDER_VERSION, indices, positions
from mmdiff.data.sources import Source, first_non_finite
from mmdiff.errors import UserError

log = logging.getLogger(__name__)
NAMED = 10  # examples that are not finite, in the log


def batches(
    source: Source,
    seed: int,
    global_batch: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    order: int = ORDER_VERSION,
    ahead: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of every global batch from `start_step` on, without end.

    With B = global_batch and P = process_count, process p owns the rows [p*B/P, (p+1)*B/P) of each batch; the parts of all
    processes, one after the other, are the batch of a single process. `order` is the version of the order of the
    examples; step i begins at position i*B + `ahead`.

    An example with a NaN or an infinite value is named in the log when it first comes, by its number in the source; the step leaves its
    batch out.

    Yields:
      The source's arrays [B/P, ...] and "index", uint32 [B/P]: the global position modulo 2**32, which is the same number for
      an example on any number of hosts and never recurs within 4 billion examples (so it can name a random key).

    Raises:
      UserError: a batch that is not positive or that the processes do not divide.
    """
    if global_batch < 1 or global_batch % process_count:
        raise UserError(
            f"a global batch of {global_batch} cannot be split evenly over {process_count} process(es): "
            f"choose a positive multiple of {process_count}."
        )
    local = global_batch // process_count
    rows = slice(process_index * local, (process_index + 1) * local)
    named: set[int] = set()
    take = getattr(source, "take_in_epochs", lambda chosen, epochs: source.take(chosen))

    def generate(step):
        while True:
            at = positions(step, global_batch)[rows] + ahead
            chosen = indices(seed, at, len(source), order)
            batch = take(chosen, at // len(source))
            if len(named) < NAMED and (bad := first_non_finite(batch, chosen)) and bad[1] not in named:
                named.add(bad[1])
                last = ", and no others are named" if len(named) == NAMED else ""
                what = "example %d of the training data has values of %r that are not finite: fix or remove it%s."
                log.warning(what, bad[1], bad[0], last)
            yield {**batch, "index": (at % 2**32).astype(np.uint32)}
            step += 1

    return generate(int(start_step))


def prefetch(items: Iterator[Any], ahead: int) -> contextlib.AbstractContextManager[Iterator[Any]]:
    """A context whose value iterates over `items`, made in a thread, `ahead` of them before they are asked for."""

    @contextlib.contextmanager
    def context():
        with ThreadPoolExecutor(1, "prefetch") as pool:
            waiting = collections.deque(pool.submit(next, items) for _ in range(ahead))

            def generate():
                while True:
                    waiting.append(pool.submit(next, items))
                    yield waiting.popleft().result()  # an error in the thread comes up here

            try:
                yield generate()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return context()
