r"""Sequences from known Markov chains, one chain per class: the data whose likelihood and class posterior are exact.

    p(x | c) = pi_c[x_1] prod_{i=2}^L P_c[x_{i-1}, x_i],      P_c = (1 - w) P + w Q_c,      pi_c P_c = pi_c

The rows of P and of every Q_c are uniform on the simplex (Dirichlet(1, ..., 1)). P is shared by the classes, so that they overlap: with
w = 2/3 and L = 32 Bayes' rule finds the class of 95 % of the sequences. Chains start in their stationary law, so the law of a pair of
neighbours is the same everywhere. Nothing is stored, and numpy's version does not matter: all randomness is raw words of Philox-4x64.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from mmdiff.data.sources import ArraySource
from mmdiff.errors import UserError

STATES, LENGTH, CLASSES = 16, 32, 10
OWN = 2 / 3  # w: the share of a transition matrix that is its class's own
SIZES = {"train": 50_000, "validation": 2_000, "test": 2_000}
_STREAMS = {"chains": 0, "train": 1, "test": 2, "validation": 3}  # independent streams of random words


@dataclasses.dataclass(frozen=True, eq=False)
class Chains:
    """One Markov chain per class, with exact laws.

    Attributes:
      initial: float64 [classes, states], the law of the first token.
      transition: float64 [classes, states, states], rows sum to one.
      length: tokens of a sequence.
    """

    initial: np.ndarray
    transition: np.ndarray
    length: int

    @property
    def classes(self) -> int:
        return self.initial.shape[0]

    @property
    def states(self) -> int:
        return self.initial.shape[1]

    @property
    def bigrams(self) -> np.ndarray:
        """The law of two neighbours, [classes, states, states]; it is the same at every place if `initial` is stationary."""
        return self.initial[:, :, None] * self.transition

    @property
    def entropy(self) -> np.ndarray:
        """E[-log p(x | c)] of a whole sequence from chain c in nats, [classes]: no model has a smaller expected loss."""
        law, total = self.initial, -_plogp(self.initial)
        for _ in range(self.length - 1):
            total = total - np.einsum("cs,csr->c", law, self.transition * np.log(self.transition))
            law = np.einsum("cs,csr->cr", law, self.transition)
        return total

    def sample(self, labels: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Sequences int32 [n, length] of the classes `labels` [n]: distribution functions inverted at `uniforms` [n, length] in [0, 1)."""
        tokens = np.empty(uniforms.shape, np.int32)
        rows = self.initial[labels]
        for i in range(self.length):
            cumulative = np.cumsum(rows, axis=1)
            # Rounding may leave the last value a little below one.
            tokens[:, i] = np.minimum((cumulative <= uniforms[:, i : i + 1]).sum(1), self.states - 1)
            rows = self.transition[labels, tokens[:, i]]
        return tokens

    def log_likelihood(self, tokens: np.ndarray) -> np.ndarray:
        """log p(x | c) in nats of sequences [n, length] under every chain, float64 [n, classes]."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self.length or tokens.dtype.kind not in "iu":
            raise ValueError(f"these chains have integer sequences [n, {self.length}], got {tokens.dtype} {list(tokens.shape)}.")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.states):
            raise ValueError(f"these chains have the states 0..{self.states - 1}, got {tokens.min()}..{tokens.max()}.")
        steps = np.log(self.transition)[:, tokens[:, :-1], tokens[:, 1:]].sum(-1)
        return (np.log(self.initial)[:, tokens[:, 0]] + steps).T

    def posterior(self, tokens: np.ndarray) -> np.ndarray:
        """p(c | x) with all classes equally likely, float64 [n, classes]: its argmax is the Bayes classifier."""
        log_p = self.log_likelihood(tokens)
        p = np.exp(log_p - log_p.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def order_gain(self, tokens: np.ndarray, labels: np.ndarray, chunks: int = 8) -> np.ndarray:
        r"""What the order of a sequence's chunks is worth under its own chain, in nats, float64 [n]:

            log p(x | c) - E_shuffle log p(shuffle(x) | c)

        where `shuffle` permutes the `chunks` pieces of length/chunks tokens uniformly. Exact: only the seams differ, each chunk is first
        with probability 1/chunks, and each ordered pair of chunks meets with the same.
        """
        if self.length % chunks or chunks < 2:
            raise ValueError(f"sequences of {self.length} tokens do not fall into {chunks} equal chunks of one or more.")
        pieces = np.asarray(tokens).reshape(len(tokens), chunks, -1)
        first, last, label = pieces[..., 0], pieces[..., -1], np.asarray(labels)
        start = np.log(self.initial)[label[:, None], first]
        seams = np.log(self.transition)[label[:, None, None], last[:, :, None], first[:, None, :]]  # [n, from, to]
        real = start[:, 0] + np.trace(seams, offset=1, axis1=1, axis2=2)
        meet = seams.sum((1, 2)) - np.trace(seams, axis1=1, axis2=2)
        return real - start.mean(1) - meet / chunks


@functools.cache
def chains(own: float = OWN, length: int = LENGTH) -> Chains:
    """The ten chains of 16 states; `own` (w above, 0 to 1) says how far the classes lie apart."""
    if not 0 <= own <= 1:
        raise UserError(f"the share of a chain that is its own lies in [0, 1], not {own}.")
    # Exponentials over their sum are uniform on the simplex.
    draws = -np.log1p(-_uniforms("chains", (CLASSES + 1, STATES, STATES)))
    draws /= draws.sum(-1, keepdims=True)
    transition = (1 - own) * draws[0] + own * draws[1:]
    # pi (P - 1) = 0 with the last equation replaced by sum pi = 1.
    system = np.swapaxes(transition, 1, 2) - np.eye(STATES)
    system[:, -1] = 1.0
    right = np.zeros((CLASSES, STATES, 1))
    right[:, -1] = 1.0
    return Chains(np.linalg.solve(system, right)[..., 0], transition, length)


def markov_source(split: str, count: int | None = None, of: Chains | None = None) -> ArraySource:
    """Sequences in memory: tokens int32 [n, length], label int32 [n]; example i has the class i mod 10.

    Example i is the same whatever `count`, so a larger set continues a smaller one.

    Args:
      split: "train", "validation" or "test", which share no random numbers.
      count: n; by default 50,000, 2,000 and 2,000.
      of: the chains; `chains()` by default.

    Raises:
      UserError: an unknown split, or no examples.
    """
    if split not in SIZES:
        raise UserError(f"the Markov chains have no split {split!r}: choose one of {', '.join(SIZES)}.")
    of, count = of or chains(), SIZES[split] if count is None else count
    if count < 1:
        raise UserError(f"a source needs one example or more, not {count}.")
    label = np.arange(count, dtype=np.int32) % of.classes
    return ArraySource({"tokens": of.sample(label, _uniforms(split, (count, of.length))), "label": label})


def _plogp(p: np.ndarray) -> np.ndarray:
    return (p * np.log(p)).sum(-1)


def _uniforms(stream: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniforms in [0, 1) with 53 bits. A longer array begins with the shorter one."""
    words = np.random.Philox(key=np.array([0, _STREAMS[stream]], np.uint64)).random_raw(int(np.prod(shape)))
    return (words >> np.uint64(11)).reshape(shape) * 2.0**-53
