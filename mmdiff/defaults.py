"""The values that most configs share. Plain values: each can be overridden as `--config.train.x=...`."""

from __future__ import annotations

from typing import Any


def training_config(
    *, steps: int, global_batch: int, ema: float, learning_rate: float, eval_every: int, checkpoint_every: int = 0, **others: Any
) -> dict[str, Any]:
    """The section `train` of a config: these values and `others` (of its optimizer, say), over the defaults below.

    Checkpoints are written as often as the loss is measured, unless `checkpoint_every` says otherwise.

    >>> train = training_config(steps=100, global_batch=8, ema=0.99, learning_rate=1e-3, eval_every=50, clip=1.0)
    >>> train["microbatches"], train["clip"]
    (1, 1.0)
    """
    return {
        "steps": steps, "global_batch": global_batch, "microbatches": 1, "ema": ema, "start": "", "learning_rate": learning_rate,
        "log_every": 50, "eval_every": eval_every, "checkpoint_every": checkpoint_every or eval_every, "keep": 2, "best": "",
        "prefetch": 4, "tensorboard": True, "mesh": {"slices": 1, "data": -1, "fsdp": 1, "seq": 1, "tensor": 1}, **others}
