"""Cross-entropy of masked tokens: what each token and each example weighs, and what is said of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import integers, normal

from mmdiff import losses, processes, schedules, times
from mmdiff.errors import UserError
from mmdiff.lazy_logits import LazyLogits
from mmdiff.processes import Joint, Noised, absorbing

B, LENGTH, K, PADDING = 6, 7, 5, 0
T = np.float32([0.0, 1e-4, 0.1, 0.5, 0.9, 1.0])
X0 = integers(0, (B, LENGTH), 0, K)
HIDDEN = np.random.default_rng(1).uniform(size=(B, LENGTH)) < np.array([0, 0.2, 0.4, 0.5, 0.9, 1.0])[:, None]
XT = np.where(HIDDEN, K, X0).astype(np.int32)
OUT = normal(2, (B, LENGTH, K))
NLL = np.log(np.exp(OUT).sum(-1)) - np.take_along_axis(OUT, X0[..., None], -1)[..., 0]


def noised(xt=XT):
    return Noised(X0, xt, T)


def values(*terms, out=OUT):
    """Of each term its value; the metric's name comes with it."""
    return jax.tree.map(np.asarray, jax.jit(lambda: [term(out, noised()) for term in terms])())


def test_by_token_it_is_the_bound_and_the_own_loss():
    """With MD4's weight the continuous-time bound (1e-6), without a weight the process's own loss, of two schedules."""
    for keep in (schedules.flow(), schedules.masked_cosine()):
        process = absorbing(K, keep)
        own, plain, bound, rate = values(
            process.loss, losses.masked_ce(process), losses.masked_ce(process, losses.masked_elbo()), losses.vlb(process))
        np.testing.assert_allclose(plain["by_token"], own, rtol=1e-6)
        # The rate's clock stops a hair before 1.
        np.testing.assert_allclose(bound["by_token"][:-1], rate[:-1], rtol=2e-6)
        np.testing.assert_allclose(bound["by_token"][-1], rate[-1], rtol=1e-5, atol=1e-5)


def test_padding_and_weights_of_the_time():
    """Against sums by hand: a tenth for padding, a capped 1/t, and what divides them; t = 0 costs nothing."""
    process, weight = absorbing(K), losses.masked_elbo(cap=5.0)
    by_token, by_example = values(*(losses.masked_ce(process, weight, {PADDING: 0.1}, by) for by in ("token", "example")))
    factors = HIDDEN * np.where(X0 == PADDING, 0.1, 1.0)
    scale = np.minimum(5.0, 1 / np.maximum(T, 1e-6))
    total = np.where(T > 0, (factors * NLL).sum(-1), 0.0)
    np.testing.assert_allclose(by_token["by_token"], scale * total / LENGTH, rtol=1e-5)
    np.testing.assert_allclose(by_example["by_example"], scale * total / np.maximum(factors.sum(-1), 1e-9), rtol=1e-5)
    assert (X0[HIDDEN] == PADDING).any() and (X0[HIDDEN] != PADDING).any() and scale[1] == 5 and 5 > scale[3] > 1


def test_the_metric_says_what_is_weighed_and_masked_tokens_weigh_the_same():
    """The gradient with respect to a token's own cost: equal for all tokens of a batch, or 1 / n for the n masked ones of an example."""
    process = Joint(text=absorbing(K))
    for by in ("token", "example"):
        term = losses.on("text", losses.masked_ce(process.parts["text"], by=by))
        loss = losses.diffusion(process, lambda params, x, t: {"text": OUT}, times.joint(text=0.5), {"text": (1.0, term)})
        batch = {"text": X0, "index": np.arange(B, dtype=np.uint32)}
        assert set(jax.eval_shape(loss, None, batch, jax.random.key(0))[1]) == {f"loss/text/by_{by}"}

        def weigh(out, by=by):
            return losses.masked_ce(absorbing(K), by=by)(out, noised())[f"by_{by}"].sum()

        # The logits' gradient at the true class is weight (p - 1).
        p = np.exp(-NLL)
        slope = np.take_along_axis(np.asarray(jax.jit(jax.grad(weigh))(OUT)), X0[..., None], -1)[..., 0] / (p - 1)
        masked = HIDDEN & (T > 0)[:, None]
        counts = np.full((B, 1), LENGTH) if by == "token" else masked.sum(-1, keepdims=True)
        np.testing.assert_allclose(slope, np.where(masked, 1 / np.maximum(counts, 1), 0), rtol=1e-5, atol=1e-6)


def test_of_lazy_logits():
    """Seven tokens in chunks of three and one: the values and gradients of whole logits."""
    weights = normal(3, (B, LENGTH, 4)), normal(4, (4, K)), normal(5, (K,))
    terms = [losses.masked_ce(absorbing(K), losses.masked_elbo(5.0), {PADDING: 0.1}, by) for by in ("token", "example")]

    def total(weights, lazy):
        out = LazyLogits(*weights, chunks=3, dtype=jnp.float32)
        return sum(jnp.arange(1.0, 1 + B) @ value for term in terms for value in term(out if lazy else out.whole(), noised()).values())

    lazy, whole = jax.jit(lambda weights: [jax.value_and_grad(total)(weights, lazy) for lazy in (True, False)])(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-5), lazy, whole)


def test_what_has_no_meaning_is_refused():
    vqd = processes.MaskReplace(K, schedules.vqd_paper(4))
    for match, make in (
        ("by='token' or by='example'", lambda: losses.masked_ce(absorbing(K), by="batch")),
        ("classes 0..4", lambda: losses.masked_ce(absorbing(K), classes={5: 0.1})),
        ("at least 0", lambda: losses.masked_ce(absorbing(K), classes={0: -0.1})),
        ("has none", lambda: losses.masked_ce(vqd, losses.masked_elbo())),
        ("cap above 0", lambda: losses.masked_elbo(0.0)),
    ):
        with pytest.raises(UserError, match=match):
            make()
