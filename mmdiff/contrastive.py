r"""Contrast: terms that keep a network from explaining its noisy input by data that do not belong to the condition.

A **negative** z^j is such data. `contrast` takes any diffusion term (a step's KL, a cross-entropy, a squared error) and evaluates it
on the same x_t and the same network output as if x_t had come from z^j,

    s_0 = -term(out, noised),      s_j = -term(out, process.with_x0(noised, z^j)),      j = 1 .. N,

so that N negatives cost no network call. A **form** makes one number of the scores: `linear` (CDCD's), `weighted` or `infonce`.

    tokens = process.parts["tokens"]
    losses.diffusion(process, net.apply, times, {
        "vlb": (1.0, on("tokens", vlb(tokens, T))),
        "step_intra": (5e-5, on("tokens", time_weighted(contrast(tokens, vlb(tokens, T), intra()), T))),
        "sample_inter": (T * 5e-6, where_present("label", on("tokens", time_weighted(contrast(tokens, x0_ce(tokens), inter()), T)))),
    })

Negatives are functions `noised (x0 of one modality, batch and key) -> z [N, B, ...]`, or `-> (z, valid [N, B])` where some do not exist.
They see the data of the whole batch, also where the loss is computed in micro-batches.

Source: Zhu et al. 2023 (CDCD), whose released code is `linear` on one forward pass; the paper lets negatives run their own chains
(`resampled_negatives`). `linear` is no bound on the mutual information of data and condition. `infonce` is one of its kind, but only
for scores and negatives as its docstring has them: here the scores see x_t, too, which comes from the positive.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmdiff import losses
from mmdiff.errors import UserError
from mmdiff.lazy_logits import LazyLogits
from mmdiff.losses import Term
from mmdiff.microbatches import BatchLoss, Pieces, whole_batch
from mmdiff.processes.base import Noised, Process, fold
from mmdiff.times import Times, example_keys

Negatives = Callable[[Noised], Any]
Form = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def contrast(process: Process, term: Term, negatives: Negatives, form: Form | None = None) -> Term:
    """`form(term of x_0, terms of the negatives)`, [B], on the forward pass that all terms share.

    Args:
      process: the modality's, whose `with_x0` says what changes with x_0.
      term: `vlb(process, T)` is CDCD's step mode, `x0_ce(process)` its sample mode (of one step, not of T: their weight times T is the
        one here); any other will do. Of a `Gaussian`, take one that stays bounded, `mse(process, min_snr(5.0))`: at small t a negative
        would have needed noise without limit.
      negatives: `intra`, `inter`, `shifted`, `table` or a function of one's own.
      form: `linear()` by default.

    >>> from mmdiff.processes import absorbing
    >>> tokens = absorbing(4)
    >>> term = contrast(tokens, losses.x0_ce(tokens), intra(chunks=2, count=3), infonce())
    >>> x0, t = jnp.array([[0, 0, 1, 1]]), jnp.array([0.5])
    >>> noised = jax.jit(tokens.corrupt)(jax.random.split(jax.random.key(0), 1), x0, t).replace(key=jax.random.key(1))
    >>> jax.jit(term)(10.0 * jax.nn.one_hot(x0, 4), noised).shape
    (1,)
    """
    form = form or linear()

    def contrasted(out, noised):
        z, valid = _sampled(negatives, noised)
        lazy = isinstance(out, LazyLogits)  # each pass computes them again: one for x_0 and all negatives
        z = jnp.concatenate([noised.x0[None], z]) if lazy else z
        values = jax.vmap(lambda x0: term(out, process.with_x0(noised, x0)))(z)
        return form(values[0], values[1:], valid) if lazy else form(term(out, noised), values, valid)

    return contrasted


def cdcd(
    process: Process,
    steps: int,
    *,
    auxiliary: float = 5e-4,
    falling: bool = True,
    step_intra: float = 0.0,
    step_inter: float = 0.0,
    sample_intra: float = 0.0,
    sample_inter: float = 0.0,
    count: int = 10,
    chunks: int = 8,
    inter_negatives: Negatives | None = None,
    form: Form | None = None,
    of: str | None = None,
    given: str | None = None,
) -> dict[str, tuple[float, Term]]:
    """CDCD's loss as terms for `losses.diffusion`: the chain's bound, the auxiliary and the contrasts, by mode and negatives,

        L = vlb + T auxiliary a(t) CE + step_* w(t) contrast(vlb, *) + T sample_* w(t) contrast(CE, *),    * intra or inter,

    with w(t) = 1 + (i - 1) / T at t = i / T (`time_weighted`). The released weights (auxiliary 5e-4, step_intra 5e-5, sample_inter 5e-6)
    are of one step of the chain and so are the arguments. A contrast of weight 0 is left out.

    Args:
      process, steps: the discrete chain and its T.
      falling: the auxiliary's a(t): from 2 to 1 (images), or from 1 to 2 (music).
      count: negatives for every example; chunks: see `intra`.
      inter_negatives: negatives of other conditions; `inter(count)` by default.
      form: of all contrasts; `linear()`, the released one, by default.
      of: the modality's name, for a joint pass.
      given: the condition's name there. Data of another condition are negatives only where a condition is present: where it is dropped, for
        guidance, they are data like any other, and the inter contrasts are 0.

    >>> from mmdiff import schedules
    >>> from mmdiff.processes import MaskReplace
    >>> tokens = MaskReplace(16, schedules.vqd_released(100))
    >>> terms = cdcd(tokens, 100, step_intra=5e-5, of="tokens", given="label")
    >>> {name: round(weight, 6) for name, (weight, term) in terms.items()}
    {'vlb': 1.0, 'auxiliary': 0.05, 'step_intra': 5e-05}
    """
    if given and not of:
        raise UserError(f"cdcd: the condition {given!r} is one of a joint pass: say the modality's name, too, of=...")
    vlb, ce = losses.vlb(process, steps), losses.x0_ce(process)
    within, between = intra(chunks, count), inter_negatives or inter(count)
    terms = {"vlb": (1.0, vlb), "auxiliary": (steps * auxiliary, losses.auxiliary(process, steps, falling))}
    if of:
        terms = {name: (weight, losses.on(of, term)) for name, (weight, term) in terms.items()}
    for name, weight, term, negatives in (
        ("step_intra", step_intra, vlb, within), ("step_inter", step_inter, vlb, between),
        ("sample_intra", steps * sample_intra, ce, within), ("sample_inter", steps * sample_inter, ce, between),
    ):  # fmt: skip
        if weight:
            found = time_weighted(contrast(process, term, negatives, form), steps)
            found = losses.on(of, found) if of else found
            terms[name] = (weight, where_present(given, found) if given and negatives is between else found)
    return terms


def where_present(name: str, term: Term) -> Term:
    """A term of a joint pass where its condition `name` is there, 0 where it is absent (at t = 1)."""
    return lambda out, noised: jnp.where(noised.t[name] < 1, term(out, noised), 0.0)


def resampled_negatives(
    process: Process,
    apply: Callable,
    times: Times,
    term: Term,
    negatives: Negatives,
    form: Form | None = None,
    of: str | None = None,
) -> BatchLoss:
    """The contrast of negatives that are corrupted by themselves: a `Loss` of N + 1 network calls, to be added with `combine`.

    Each negative takes the place of the clean data, at the example's time and with its conditions: the network sees z^j_t, and
    `term` is evaluated on what it makes of it. The calls come one after the other and keep no activations: memory is one call's.

    Args:
      process, apply, times: as in `losses.diffusion`; importance-sampled times are sampled uniformly.
      term: of the whole pass, `on("tokens", vlb(process.parts["tokens"], T))`.
      negatives, form: as in `contrast`.
      of: the modality of a `Joint` that the negatives are of.
    """
    form = form or linear()

    def pieces(params, batch, key, *, micro=None, **_):
        index, x0 = batch["index"], process.select(batch)
        keys = fold(example_keys(key, index), "corrupt")
        t = times(jax.random.fold_in(key, zlib.crc32(b"times")), index)

        def value(x0, keys):
            noised = process.corrupt(keys, x0, t).replace(batch=batch, key=key)
            return term(apply(params, *process.inputs(noised.xt, noised.t)), noised)

        micro = micro and micro.replace(x0=process.select(micro.batch))
        clean = Noised(x0=x0, xt=x0, t=t, batch=batch, key=key, micro=micro)
        z, valid = _sampled(negatives, clean if of is None else clean.of(of))

        def negative(j, z):
            return value(z if of is None else {**x0, of: z}, fold(keys, j + 1))

        negative = jax.checkpoint(negative, prevent_cse=False)
        values = jax.lax.map(lambda item: negative(*item), (jnp.arange(len(z)), z))
        return Pieces(form(value(x0, keys), values, valid).mean(), {})

    return BatchLoss(pieces=pieces)


def _sampled(negatives: Negatives, noised: Noised) -> tuple[jax.Array, jax.Array]:
    """The negatives [N, B, ...] and which of them there are [N, B]."""
    micro, own = noised.micro, isinstance(negatives, _Own)
    x0, batch = (noised.x0, noised.batch) if micro is None or own else (micro.x0, micro.batch)
    found = negatives(Noised(x0=x0, xt=None, t=None, batch=batch, key=noised.key))
    z, valid = found if isinstance(found, tuple) else (found, None)
    if z.shape[1:] != x0.shape:
        raise UserError(f"negatives are [N, *x0.shape], here [N, {', '.join(map(str, x0.shape))}], not {list(z.shape)}.")
    valid = jnp.ones(z.shape[:2], bool) if valid is None else valid
    if own:
        return z, valid
    return whole_batch((z, valid)) if micro is None else (jax.vmap(micro.rows)(z), jax.vmap(micro.rows)(valid))


def time_weighted(term: Term, steps: int) -> Term:
    """`(1 + (i - 1) / T) term` at t = i / T: CDCD's weight of a contrast over time. Inside of it: the scores' temperature."""
    return lambda out, noised: (1.0 + (jnp.round(noised.t * steps) - 1.0) / steps) * term(out, noised)


# ------------------------------------------------------------------------------------------------------------------- forms
# Functions `(positive [B], values [N, B], valid [N, B]) -> [B]` of the term's values, the negatives' scores with their sign turned.


def form(name: str, temperature: float = 1.0) -> Form:
    """The form of a config: "linear" (without a temperature), "weighted" or "infonce". Raises UserError for another name."""
    forms = {"linear": linear, "weighted": lambda: weighted(temperature), "infonce": lambda: infonce(temperature)}
    if name not in forms:
        raise UserError(f"there is no form of contrast {name!r}: choose one of {', '.join(forms)}.")
    return forms[name]()


def linear() -> Form:
    """`-1/N sum_j value_j`: less of it is a worse explanation of the negatives, however bad it already is.

    Neither bounded nor a bound: keep its weight small. A clamp in the term is what ends it. An example with fewer negatives averages
    over those it has, one without any counts nothing.
    """

    def form(positive, values, valid):
        return -jnp.where(valid, values, 0.0).sum(0) / jnp.maximum(valid.sum(0), 1)

    return form


def weighted(temperature: float = 1.0) -> Form:
    """`-sum_j w_j value_j` with the constants `w = softmax(s_0, .., s_N)`, `s = -value / temperature`.

    `linear` with weights that vanish for negatives already explained badly: the negatives' part of the gradient of `temperature *
    infonce(temperature)`.
    """
    _check_temperature(temperature)

    def form(positive, values, valid):
        w = jax.lax.stop_gradient(jax.nn.softmax(_scores(positive, values, valid, temperature), axis=0))[1:]
        return -jnp.where(valid, w * values, 0.0).sum(0)

    return form


def infonce(temperature: float = 1.0) -> Form:
    """`-s_0 + logsumexp(s_0, .., s_N)`, `s = -value / temperature`: at least 0, and log(N + 1) at equal scores.

    With log density ratios for scores and negatives from the marginal, `log(N + 1)` minus its mean is a lower bound on the mutual
    information (van den Oord et al. 2018). A term is per dimension: temperature 1 / (number of dimensions) makes scores of whole examples.
    """
    _check_temperature(temperature)

    def form(positive, values, valid):
        scores = _scores(positive, values, valid, temperature)
        return jax.nn.logsumexp(scores, axis=0) - scores[0]

    return form


def _check_temperature(value):
    if not 0 < value < math.inf:
        raise UserError(f"the temperature of a contrast must be a finite number above 0, not {value}.")


def _scores(positive, values, valid, temperature):
    return jnp.concatenate([-positive[None], jnp.where(valid, -values, -jnp.inf)]) / temperature


# --------------------------------------------------------------------------------------------------------------- negatives


@dataclasses.dataclass(frozen=True)
class _Own:
    """Negatives that an example has from its own data: a micro-batch is all they need."""

    negatives: Negatives

    def __call__(self, noised):
        return self.negatives(noised)


def intra(chunks: int = 8, count: int = 10, derange: bool = False) -> Negatives:
    """The example itself in another order: `chunks` pieces of floor(L / chunks) along its first dimension, permuted.

    One permutation per negative for all examples, new at every step; what the chunks leave over stays at the end. On average one
    chunk stays in place; with `derange` none does (the permutation is one random cycle).
    """
    if chunks < 2:
        raise UserError(f"intra permutes at least two chunks, not {chunks}.")

    def negatives(noised):
        x0 = jnp.asarray(noised.x0)
        length = x0.shape[1] if x0.ndim > 1 else 1
        if length < chunks:
            raise UserError(f"intra: examples of length {length} cannot be cut into {chunks} chunks.")
        order = jax.vmap(lambda key: jax.random.permutation(key, chunks))(_keys(noised, "intra", count))
        if derange:
            # In each row's cycle every chunk is followed by the next one of a random order.
            order = jax.vmap(lambda row: jnp.zeros_like(row).at[row].set(jnp.roll(row, -1)))(order)
        size = length // chunks
        place = (order[..., None] * size + jnp.arange(size)).reshape(count, size * chunks)
        tail = jnp.broadcast_to(jnp.arange(size * chunks, length), (count, length - size * chunks))
        return jax.vmap(lambda row: x0[:, row])(jnp.concatenate([place, tail], axis=1))

    return _Own(negatives)


def shifted(count: int) -> Negatives:
    """The next `count` examples of the batch, whatever their condition: the batch rolled by 1 .. count."""

    def negatives(noised):
        if count >= len(noised.x0):
            raise UserError(f"shifted: a batch of {len(noised.x0)} examples gives at most {len(noised.x0) - 1} negatives, not {count}.")
        return jnp.stack([jnp.roll(noised.x0, -j, axis=0) for j in range(1, count + 1)])

    return negatives


def inter(count: int = 10, by: str = "label") -> Negatives:
    """Different examples of the batch, sampled at random from those whose `batch[by]` is another, hence never the example itself.

    Examples with fewer than `count` such partners have as many negatives as there are; in a batch of one class they have none. Who is
    sampled depends on the examples' global positions, not on their order.
    """

    def negatives(noised):
        condition, index = _entry(noised, by), _entry(noised, "index")
        condition = condition.reshape(len(condition), -1)
        other = (condition[:, None] != condition[None]).any(-1)
        keys = example_keys(_keys(noised, "inter"), index)
        scores = jax.vmap(lambda key: jax.vmap(jax.random.uniform)(example_keys(key, index)))(keys)
        best, who = jax.lax.top_k(jnp.where(other, scores, -1.0), min(count, len(index)))
        return jnp.moveaxis(jnp.asarray(noised.x0)[who], 1, 0), best.T >= 0

    return negatives


def table(name: str) -> Negatives:
    """Negatives that the data source gives with every example, `batch[name]` [B, N, ...]."""
    return _Own(lambda noised: jnp.moveaxis(_entry(noised, name), 1, 0))


def _entry(noised, name):
    if noised.batch is None or name not in noised.batch:
        held = "nothing" if noised.batch is None else sorted(noised.batch)
        raise KeyError(f"negatives need the batch's entry {name!r}: it holds {held}.")
    return noised.batch[name]


def _keys(noised, name, count=None):
    if noised.key is None:
        raise ValueError(f"{name} negatives are sampled with the step's key, which losses.diffusion sets: noised.key is None.")
    key = jax.random.fold_in(noised.key, zlib.crc32(name.encode()))
    return key if count is None else jax.random.split(key, count)
