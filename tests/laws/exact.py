"""What the laws are checked against: the processes, schedules and parameterisations, dense float64 algebra, and exact denoisers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from tiers import some

from mmdiff import processes, schedules
from mmdiff.processes import gaussian

SCHEDULES = {
    "flow": schedules.flow(),
    "cosine": schedules.cosine(),
    "linear_beta": schedules.linear_beta(1000),
    "edm": schedules.edm(),
    "shifted": schedules.shift(schedules.flow(), 3.0),
}
PREDICTS = {"x0": gaussian.x0, "eps": gaussian.eps, "v": gaussian.v, "velocity": gaussian.velocity, "edm": gaussian.edm(0.5)}


def flow64(t):
    return 1 - t, t


def cosine64(t):
    return np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)


def masked_cosine64(t):
    return 1 - np.sin(np.pi * t / 2), np.sin(np.pi * t / 2)


def linear_beta64(t, steps=1000):
    log_ab = np.interp(t * steps, np.arange(steps + 1), np.append(0, np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, steps)))))
    return np.exp(log_ab / 2), np.sqrt(-np.expm1(log_ab))


def edm64(t):
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    return np.ones_like(t), np.where(t > 0, (low + t * (high - low)) ** 7, 0.0)


def shifted64(t):
    return flow64(3 * t / (1 + 2 * t))


SCHEDULES64 = {"flow": flow64, "cosine": cosine64, "linear_beta": linear_beta64, "edm": edm64, "shifted": shifted64}

# ---------------------------------------------------------------------------------------------------------------- discrete

STEPS = 8  # every discrete law is checked on times i / 8, which the Markov chains know exactly
CLASSES = 4


def _random_rows(*shape):
    rows = np.random.default_rng(0).uniform(0.1, 1.0, shape) + 2.0 * np.eye(shape[-1])
    return rows / rows.sum(-1, keepdims=True)


def mask_and_replace():
    """VQ-Diffusion's chain, which no rank-one chain is: masks stay, other tokens are masked, redrawn or kept."""
    matrices = []
    for i in range(STEPS):
        masked = 1 / (STEPS - i)  # everything is masked at the end
        keep = (1 - masked) * 0.8
        matrix = np.zeros((CLASSES + 1, CLASSES + 1))
        matrix[:CLASSES, :CLASSES] = keep * np.eye(CLASSES) + (1 - masked - keep) / CLASSES
        matrix[:CLASSES, CLASSES] = masked
        matrix[CLASSES, CLASSES] = 1
        matrices.append(matrix)
    return np.stack(matrices)


def banded():
    """Neighbouring levels mix; the last step forgets everything, so that the end of the chain is its prior."""
    matrix = 0.6 * np.eye(CLASSES) + 0.2 * np.eye(CLASSES, k=1) + 0.2 * np.eye(CLASSES, k=-1)
    matrix += np.diag(1 - matrix.sum(1))
    last = np.full((CLASSES, CLASSES), 1 / CLASSES)
    return np.stack([matrix] * (STEPS - 1) + [last])


DISCRETE = {
    "absorbing": processes.absorbing(CLASSES),
    "absorbing_cosine": processes.absorbing(CLASSES, schedules.masked_cosine()),
    "uniform": processes.uniform(CLASSES),
    "mixed": processes.mixed(CLASSES, 0.4),
    "rank_one": processes.Categorical((0.1, 0.2, 0.3, 0.4), schedules.masked_cosine()),
    "mask_and_replace": processes.Markov(mask_and_replace(), classes=CLASSES),
    "vqd_released": processes.MaskReplace(CLASSES, schedules.vqd_released(STEPS)),
    "vqd_paper": processes.MaskReplace(CLASSES, schedules.vqd_paper(STEPS)),
    "banded": processes.Markov(banded()),
    "markov": processes.Markov(_random_rows(STEPS, 5, 5), classes=CLASSES),
}
SOME_DISCRETE = some(DISCRETE, "absorbing", "mixed", "vqd_released", "markov")
COSINE = ("absorbing_cosine", "rank_one")
REMEMBER = ("markov", "vqd_released")  # their end still knows a little of the beginning: it is not their prior
RANK_ONE = ("absorbing", "absorbing_cosine", "uniform", "mixed", "rank_one")


def keep64(name, t):
    """a(t), the probability to be kept, of a rank-one chain."""
    return (masked_cosine64 if name in COSINE else flow64)(np.asarray(t, np.float64))[0]


def dense(name, s, t):
    """q(x_t | x_s) as a float64 matrix [states, states] with rows x_s."""
    process = DISCRETE[name]
    if isinstance(process, processes.Markov):
        total = np.eye(process.states)
        for i in range(round(s * STEPS), round(t * STEPS)):
            total = total @ process.steps[i]
        return total
    if isinstance(process, processes.MaskReplace):
        return dense_mask_replace(process, s, t)
    a_s, a_t = keep64(name, s), keep64(name, t)
    a = a_t / a_s if a_s > 0 else 0.0
    return a * np.eye(process.states) + (1 - a) * np.asarray(process.redraw)[None]


def dense_mask_replace(process, s, t):
    """The product of VQ-Diffusion's matrices Q_i, transposed, from its own recursions: i = s T + 1 .. t T."""
    total, (kept, _, masked), size = np.eye(process.states), process.schedule.rows.T, process.classes
    for i in range(round(s * process.schedule.steps) + 1, round(t * process.schedule.steps) + 1):
        alpha, gamma = kept[i] / kept[i - 1], 1 - (1 - masked[i]) / (1 - masked[i - 1])
        matrix = np.zeros_like(total)
        matrix[:size, :size] = alpha * np.eye(size) + (1 - alpha - gamma) / size
        matrix[:size, size], matrix[size, size] = gamma, 1
        total = total @ matrix
    return total


def dense_posterior(name, xt, belief, t, s):
    """q(x_s | x_t, x_0 ~ belief) by Bayes for every x_0, then the mixture over what x_t leaves possible; None if nothing is."""
    process = DISCRETE[name]
    likelihood = dense(name, 0, t)[: process.classes, xt]
    possible = likelihood > 0
    belief = np.where(possible, belief, 0.0)
    if belief.sum() == 0:
        return None
    belief = belief / belief.sum()
    given_x0 = dense(name, 0, s)[: process.classes] * dense(name, s, t)[:, xt]
    return (belief[possible, None] * given_x0[possible] / likelihood[possible, None]).sum(0)


def dense_belief(name, data, xt, t):
    """p(x_0 | x_t) under a data distribution [classes]: the exact denoiser of one token; None if x_t cannot be."""
    joint = data * dense(name, 0, t)[: len(data), xt]
    return joint / joint.sum() if joint.sum() > 0 else None


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


# -------------------------------------------------------------------------------------------------------- exact denoisers


class Mixture:
    """Vectors x_0 ~ sum_k p_k N(m_k, s^2 I) with their component k: everything about them is known.

    `means` is [K, D]. The network below is exact for `Joint(image=Gaussian, label=Categorical)` and for the Gaussian alone.
    """

    def __init__(self, weights, means, std):
        self.weights, self.means, self.std = np.asarray(weights, np.float32), np.asarray(means, np.float32), std

    def draw(self, key, count):
        one, two = jax.random.split(key)
        label = jax.random.choice(one, len(self.weights), (count,), p=jnp.asarray(self.weights)).astype(jnp.int32)
        x = jnp.asarray(self.means)[label] + self.std * jax.random.normal(two, (count, self.means.shape[1]))
        return {"image": x, "label": label}

    def beliefs(self, xt, alpha, sigma, likelihood):
        """(E[x_0 | x_t, y_t], p(k | x_t, y_t)), with `likelihood` [B, K] = q(y_t | y_0 = k)."""
        spread = alpha**2 * self.std**2 + sigma**2
        gap = xt[:, None] - alpha[:, None] * self.means
        scores = jnp.log(self.weights) - 0.5 * (gap**2).sum(-1) / spread + jnp.log(likelihood)
        share = jax.nn.softmax(scores, axis=-1)
        mean = self.means + (alpha * self.std**2 / spread)[..., None] * gap
        return (share[..., None] * mean).sum(1), share

    def outputs(self, process, xt, t, likelihood):
        """What a perfect network of this `Gaussian` returns, and p(k | x_t, y_t)."""
        inside = jnp.where(t > 0, t, 0.5)[:, None]
        alpha, sigma = process.schedule(inside)
        p, q = process.predict(process.schedule, inside)
        mean, share = self.beliefs(xt, *process.schedule(t[:, None]), likelihood)
        return p * mean + q * (xt - alpha * mean) / sigma, share

    def image_network(self, process):
        flat = np.ones((1, len(self.weights)), np.float32)
        return lambda params, xt, t: self.outputs(process, xt, t, flat)[0]

    def joint_network(self, process):
        image, label = process.parts["image"], process.parts["label"]

        def apply(params, x, t):
            likelihood = label.pull(jax.nn.one_hot(x["label"], label.states), None, t["label"])[:, : label.classes]
            out, share = self.outputs(image, x["image"], t["image"], likelihood)
            return {"image": out, "label": jnp.log(jnp.maximum(share, 1e-30))}

        return apply


def gaussian_entropy(std, dims):
    return dims * 0.5 * math.log(2 * math.pi * math.e * std**2)
