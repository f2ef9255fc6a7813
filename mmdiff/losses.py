r"""Losses: pure functions `(params, batch, key) -> (scalar, metrics)`, made from a process, a network, times and terms.

`diffusion` corrupts the batch once and runs the network once; any number of **terms** `(out, noised) -> [B]` share that pass.
`combine` adds whole **losses**, each with its own pass. Metrics are flat dicts with keys such as "loss/image".

    loss = diffusion(process, net.apply, times.joint(image=times.uniform(), label=times.uniform()))
    loss = diffusion(process, net.apply, t, terms={
        "image": (1.0, on("image", mse(process.parts["image"], min_snr(5.0)))),
        "label": (0.1, on("label", vlb(process.parts["label"]))),
    })

A batch holds the modalities by name and `index` [B], the examples' global positions: each example's randomness is
`fold_in(key, index)`, so the loss does not depend on the mesh, the number of hosts, the micro-batching or the batch's order. That holds
for terms that compare the examples of a batch, too, an `InBatchTerm` or negatives from the batch: see `microbatches`.

A loss with importance-sampled times (`times.importance`) has a state, as an optimizer of optax has, the statistics of its times:
`loss.init(params)`, `loss(params, batch, key, state)`, `loss.update(state, seen)`; `training.make_step` keeps it. Without the state it is
evaluated at that of `init`. See `microbatches.BatchLoss`.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmdiff import former_names
from mmdiff.average_velocity import averaged
from mmdiff.errors import UserError
from mmdiff.microbatches import BatchLoss, Pieces, without_state
from mmdiff.processes.base import Process, concrete, fold
from mmdiff.routing import kept_tokens, routed
from mmdiff.terms import (
    InBatchTerm,
    Term,
    adaptive,
    aligned,
    auxiliary,
    error_in,
    masked_ce,
    masked_elbo,
    min_snr,
    mse,
    of_parts,
    on,
    sigma_vlb,
    sigmoid,
    snr,
    vlb,
    weighted,
    x0_ce,
)
from mmdiff.times import Adaptive, Times, example_keys

__all__ = [
    "InBatchTerm", "Loss", "Term", "adaptive", "aligned", "auxiliary", "averaged", "combine", "diffusion", "error_in", "flips",
    "masked_ce", "masked_elbo", "min_snr", "mse", "of_parts", "on", "prepared", "routed", "sigma_vlb", "sigmoid", "snr", "vlb",
    "weighted", "x0_ce",
]

Loss = Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
"""`(params, batch, key) -> (scalar, metrics)`, as `jax.value_and_grad(..., has_aux=True)` takes it."""


def diffusion(
    process: Process, apply: Callable, times: Times, terms: Mapping[str, tuple[float, Term]] | Callable | None = None
) -> BatchLoss:
    """The loss of one noisy forward pass: `sum_k weight_k mean_b term_k(out, noised)[b]`.

    With importance-sampled times the mean over b is weighted by 1 / (T p_t), so it estimates the same as with uniform ones.

    Args:
      process: what corrupts the data.
      apply: `(params, net_x, net_t) -> out`.
      times: `(key, index) -> t`.
      terms: name -> (weight, term); a term may return [B], or a dict of [B] by modality. The process's own loss by default. With
        weight 0 a term is reported and nothing else. Or a function that gives them, `process -> terms`, called with
        `process.bind(params)`.

    Returns a `Loss`; its metrics are "loss/<term>" and, for terms that return a dict, "loss/<modality>".

    >>> from mmdiff import schedules, times
    >>> from mmdiff.processes import Gaussian, Joint, velocity
    >>> process = Joint(image=Gaussian(schedules.flow(), velocity))
    >>> zero = lambda params, x, t: {"image": params * x["image"]}
    >>> batch = {"image": jnp.ones((4, 8, 8, 1)), "index": jnp.arange(4)}
    >>> loss = diffusion(process, zero, times.joint(image=times.uniform()))
    >>> value, metrics = jax.jit(loss)(0.0, batch, jax.random.key(0))
    >>> value.shape, "loss/image" in metrics
    ((), True)
    """

    def terms_of(process):
        return {"": (1.0, process.loss)} if terms is None else terms(process) if callable(terms) else terms

    if isinstance(terms, Mapping):
        _check_weights("diffusion", terms)
    source = times.source if isinstance(times, Adaptive) else None
    if source and source.term not in terms_of(process):
        names = sorted(terms_of(process))
        raise UserError(f"the times are importance-sampled by the term {source.term!r}, but the loss has the terms {names}.")

    def reduced(values, importance=None, place=None):
        """The weighted sum, the metrics and what was seen of name -> (weight, values [B] or a dict of them)."""
        total, metrics, seen = jnp.zeros((), jnp.float32), {}, {}
        for name, (weight, value) in values.items():
            if source and name == source.term:
                seen = source.observe(place, value)
            for part, value in value.items() if isinstance(value, Mapping) else (("", value),):
                value = value.astype(jnp.float32)
                value = (value if importance is None else importance * value).mean()
                metrics["/".join(["loss", *filter(None, (name, part))])] = value
                total = total + weight * value if weight else total  # 0 times a term could still be NaN, or change the last bit
        return Pieces(total, metrics, seen=seen)

    def pieces(params, batch, key, *, state=None, average=None, micro=None):
        index = batch["index"]
        if process.shared and average is None:
            average = without_state(params)
        bound = process.bind(average)
        micro = micro and micro.replace(x0=bound.select(micro.batch))
        keys = example_keys(key, index)
        times_key = jax.random.fold_in(key, zlib.crc32(b"times"))
        importance = place = None
        if source:
            t, importance, place = times.sample(times_key, index, without_state(source.init()) if state is None else state)
        else:
            t = times(times_key, index)
        noised = bound.corrupt(fold(keys, "corrupt"), bound.select(batch), t).replace(batch=batch, key=key, micro=micro)
        net_x, net_t = bound.inputs(noised.xt, noised.t)
        if isinstance(net_x, Mapping):
            net_x = {**net_x, **kept_tokens(batch)}
        out = apply(params, net_x, net_t)
        own, embeddings = {}, {}
        for name, (weight, term) in terms_of(bound).items():
            if isinstance(term, InBatchTerm):
                embeddings[name] = _used(weight, term.embed(out, noised)), importance, place
            else:
                own[name] = weight, term(out, noised)
        return reduced(own, importance, place)._replace(embeddings=embeddings)

    def contrast(params, embeddings):
        each = []
        for name, (weight, term) in terms_of(process).items():
            if name in embeddings:
                embedded, *weights = embeddings[name]
                each.append(reduced({name: (weight, term.contrast(embedded))}, *weights))
        metrics, seen = ({name: value for one in each for name, value in one[i].items()} for i in (1, 3))
        return Pieces(sum((one.value for one in each), jnp.zeros((), jnp.float32)), metrics, seen=seen)

    def check(batch):
        process.check(batch.get("x0", batch))

    learning = {"init": lambda params: source.init(), "update": source.update} if source else {}
    return BatchLoss(pieces=pieces, contrast=contrast, check=check, **learning)


def prepared(loss: Loss, prepare: Callable) -> BatchLoss:
    """`loss` of a batch to which `prepare(batch, keys)` [B] adds entries, sampled anew at every step: masks, crops."""
    loss = BatchLoss.of(loss)

    def more(batch, key):
        return {**batch, **prepare(batch, fold(example_keys(key, batch["index"]), "prepare"))}

    def pieces(params, batch, key, *, micro=None, **given):
        micro = micro and micro.replace(batch=more(micro.batch, key))
        return loss.pieces(params, more(batch, key), key, micro=micro, **given)

    return dataclasses.replace(loss, pieces=pieces)


def flips(name: str, share: float) -> Callable:
    """What `prepared` takes to mirror a share of the images `name` [B, H, W, C], left to right: each example by its own key.

    >>> mirror = flips("image", 0.5)
    >>> mirror({"image": jnp.zeros((4, 8, 8, 3))}, jax.random.split(jax.random.key(0), 4))["image"].shape
    (4, 8, 8, 3)
    """

    def prepare(batch, keys):
        chosen = jax.vmap(lambda key: jax.random.bernoulli(key, share))(keys)
        return {name: jnp.where(chosen[:, None, None, None], batch[name][:, :, ::-1], batch[name])}

    return prepare


def combine(**losses: tuple[float, Loss]) -> BatchLoss:
    """`sum_i weight_i loss_i`, each with its own key and its metrics under its name: `combine(image=(1.0, a), text=(0.1, b))`.

    With weight 0 a loss is reported and nothing else.

    >>> constant = lambda params, batch, key: (params, {"loss": params})
    >>> value, metrics = combine(a=(1.0, constant), b=(0.5, constant))(jnp.float32(2.0), {}, jax.random.key(0))
    >>> float(value)
    3.0
    """
    _check_weights("combine", losses)
    parts = {name: (weight, BatchLoss.of(loss)) for name, (weight, loss) in losses.items()}

    def summed(results):
        """Of name -> Pieces the weighted sum, all metrics, embeddings and what was seen."""
        total, metrics, embeddings, seen = jnp.zeros((), jnp.float32), {}, {}, {}
        for name, each in results.items():
            weight = parts[name][0]
            total = total + weight * each.value if weight else total  # as in `diffusion`
            metrics |= {f"{name}/loss": each.value, **{f"{name}/{key}": item for key, item in each.metrics.items()}}
            if jax.tree.leaves(each.embeddings):
                embeddings[name] = _used(weight, each.embeddings)
            if each.seen:
                seen[name] = each.seen
        return Pieces(total, metrics, embeddings, seen)

    def pieces(params, batch, key, *, state=None, **given):
        def of(name, part):
            own = None if state is None else state.get(name)
            word = former_names.COMBINED.get(name, name)
            return part.pieces(params, batch, jax.random.fold_in(key, zlib.crc32(word.encode())), state=own, **given)

        return summed({name: of(name, part) for name, (_, part) in parts.items()})

    def contrast(params, embeddings):
        return summed({name: parts[name][1].contrast(params, embedded) for name, embedded in embeddings.items()})

    def init(params):
        states = {name: part.init(params) for name, (_, part) in parts.items()}
        return {name: state for name, state in states.items() if state is not None} or None

    def update(state, seen):
        return state and {name: parts[name][1].update(own, seen.get(name, {})) for name, own in state.items()}

    def check(batch):
        for _, part in parts.values():
            part.check(batch)

    return BatchLoss(pieces=pieces, contrast=contrast, init=init, update=update, check=check)


def _check_weights(where: str, parts: Mapping[str, tuple[float, Any]]) -> None:
    """Raises UserError for a weight that is not finite."""
    for name, (weight, _) in parts.items():
        if concrete(weight) and not math.isfinite(weight):
            raise UserError(f"{where} needs finite weights, got {weight} for {name!r}.")


def _used(weight: float, embeddings: Any) -> Any:
    """Embeddings of a term with this weight; with 0 they have no gradient, which could be NaN even if what comes back is 0."""
    return embeddings if weight else jax.lax.stop_gradient(embeddings)
