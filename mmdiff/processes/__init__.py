"""Corruption processes: how clean data become noisy, and the way back."""

from mmdiff.processes.aggregate import Aggregate, Hidden
from mmdiff.processes.base import Given, Joint, Noised, Process, fold
from mmdiff.processes.discrete import Categorical, Discrete, Markov, absorbing, mixed, uniform
from mmdiff.processes.gaussian import Gaussian, LearnedSigma, edm, eps, v, velocity, x0
from mmdiff.processes.mask_replace import MaskReplace
from mmdiff.processes.mean_shift import MeanShift, by_network, card, identity, moving_target, stepwise, template

__all__ = [
    "Aggregate", "Categorical", "Discrete", "Gaussian", "Given", "Hidden", "Joint", "LearnedSigma", "Markov", "MaskReplace", "MeanShift",
    "Noised", "Process", "absorbing", "by_network", "card", "edm", "eps", "fold", "identity", "mixed", "moving_target", "stepwise",
    "template", "uniform", "v", "velocity", "x0",
]
