"""mmdiff: multi-modal diffusion in JAX and Flax.

    from mmdiff import Experiment, losses, nets, processes, sampling, schedules, times

`import mmdiff` is cheap: everything is imported when it is first used.
"""

from mmdiff.exports import lazily

__version__ = "0.1.0"

__all__, __getattr__, __dir__ = lazily(
    __name__,
    "contrastive", "convert", "data", "encoders", "evals", "grids", "guidance", "losses", "matching", "nets", "processes", "sampling",
    "schedules", "times", "training", "transforms",
    defaults="training_config", errors="UserError", experiment="Experiment initialiser", runs="open_run Run",
)
