"""Corruption processes: how clean data become noisy, and the way back."""

from mmdiff.processes.aggregate import Addend, Aggregate, Hidden, card, identity, moving_target, stepwise, template
from mmdiff.processes.base import Given, Joint, Noised, Process, fold
from mmdiff.processes.discrete import Categorical, Discrete, Markov, MaskReplace, absorbing, mixed, uniform
from mmdiff.processes.gaussian import Gaussian, LearnedSigma, edm, eps, v, velocity, x0

__all__ = [
    "Addend", "Aggregate", "Categorical", "Discrete", "Gaussian", "Given", "Hidden", "Joint", "LearnedSigma", "Markov", "MaskReplace",
    "Noised", "Process", "absorbing", "card", "edm", "eps", "fold", "identity", "mixed", "moving_target", "stepwise", "template", "uniform",
    "v", "velocity", "x0",
]
