"""Importance-sampled times: what is drawn, what is learnt from it, and that the training keeps it."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mmdiff import losses, processes, schedules, times
from mmdiff.data.sources import ArraySource
from mmdiff.errors import UserError
from mmdiff.experiment import Experiment
from mmdiff.processes import Given, Joint
from mmdiff.training import checkpoints, loop, metrics_logger, sharding
from mmdiff.training.step import init_state, make_step

T, K, B = 8, 4, 32
KEY, INDEX = jax.random.key(0), jnp.arange(20_000, dtype=jnp.uint32)
SOURCE = times.Importance(T, "vlb")
LEARNT = {"square": jnp.asarray([9.0, 4.0, 1.0, 0.25, 0.04, 0.01, 0.0, 16.0]), "count": jnp.full(T, 11)}
TIMES = times.joint(tokens=times.importance(T, "vlb"), label=times.constant(0.0))
PROCESS = Joint(tokens=processes.MaskReplace(K, schedules.vqd_paper(T)), label=Given(null=3))
TOKENS = PROCESS.parts["tokens"]
TERMS = {
    "vlb": (1.0, losses.on("tokens", losses.vlb(TOKENS, T))),
    "aux": (0.1, losses.on("tokens", losses.auxiliary(TOKENS, T))),
}


def network(params, x, t):
    return {"tokens": jax.nn.one_hot(x["tokens"], K + 1) @ params["w"] + t["tokens"][:, None, None] * params["time"]}


def init(key):
    return {"w": jax.random.normal(key, (K + 1, K)), "time": jnp.arange(float(K))}


def batch(step=0, size=B):
    index = np.arange(step * size, (step + 1) * size, dtype=np.uint32)
    rng = np.random.default_rng(step)
    return {"tokens": rng.integers(0, K, (size, 5)).astype(np.int32), "label": rng.integers(0, 3, size).astype(np.int32), "index": index}


def loss_of(rule=TIMES, terms=TERMS):
    return losses.diffusion(PROCESS, network, rule, terms)


def probabilities(stats):
    size = np.sqrt(np.asarray(stats["square"], np.float64) + 1e-10) + 1e-4
    size[0] = size[1]
    return size / size.sum()


# ------------------------------------------------------------------------------------------------------------------ the rule


def test_probabilities_are_uniform_until_every_time_is_known():
    np.testing.assert_array_equal(SOURCE.density(SOURCE.init()), np.ones(T))
    np.testing.assert_array_equal(SOURCE.density({**LEARNT, "count": LEARNT["count"].at[5].set(10)}), np.ones(T))
    got = SOURCE.density(LEARNT) / T
    np.testing.assert_allclose(got, probabilities(LEARNT), rtol=1e-6)
    assert got[0] == got[1] and float(got.min()) > 0  # t = 1/T is drawn as often as 2/T; none is forgotten


def test_updates():
    """H <- 0.9 H + 0.1 mean l^2 over all draws of a time, n counts them; a time that was not drawn stays."""
    place = jnp.asarray([2, 5, 2, -1, 2])
    seen = SOURCE.observe(place, jnp.asarray([1.0, 3.0, 2.0, 100.0, 3.0]))
    after = SOURCE.update(LEARNT, seen)
    expected = np.asarray(LEARNT["square"], np.float64)
    expected[2], expected[5] = 0.9 * 1 + 0.1 * (1 + 4 + 9) / 3, 0.9 * 0.01 + 0.1 * 9
    np.testing.assert_allclose(after["square"], expected, rtol=1e-6)
    np.testing.assert_array_equal(after["count"], [11, 11, 14, 11, 11, 12, 11, 11])
    assert after["count"].dtype == jnp.int32
    # Sums over parts of the batch add up.
    parts = [SOURCE.observe(place[part], jnp.asarray([1.0, 3.0, 2.0, 100.0, 3.0])[part]) for part in (slice(0, 2), slice(2, 5))]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(jnp.add, *parts), seen)


def test_draws_follow_the_probabilities_and_weights_undo_them():
    t, weight, place = times.importance(T, "vlb").sample(KEY, INDEX, LEARNT)
    p = probabilities(LEARNT)
    np.testing.assert_allclose(t, (np.asarray(place) + 1) / T, rtol=1e-6)
    np.testing.assert_allclose(weight, 1 / (T * p[place]), rtol=1e-5)
    count = np.bincount(place, minlength=T)
    assert (np.abs(count - len(place) * p) < 4 * np.sqrt(len(place) * p) + 1).all()
    # Of any function of t the weighted mean is the plain one: exactly over p, and of the draws.
    values = np.linspace(1, 2, T) ** 3
    np.testing.assert_allclose(p @ (values / (T * p)), values.mean(), rtol=1e-12)
    drawn = np.asarray(weight) * values[place]
    deviation = (values**2 / (T**2 * p)).sum() - values.mean() ** 2  # exact: that of the draws lacks the rarest time
    assert abs(drawn.mean() - values.mean()) < 4 * (deviation / len(drawn)) ** 0.5


def test_rare_times_are_sampled_as_often_as_they_should():
    """Gumbel noise of 23 bits never draws them, and what they would weigh, thousands of times the rest, is missing from the mean."""
    rule = times.importance(1000, "vlb")
    stats = {"square": jnp.zeros(1000).at[500].set(1.3e7), "count": jnp.full(1000, 11)}
    chance, number = 1 - float(rule.source.density(stats)[500]) / 1000, 2**20
    count = jax.jit(lambda key: (rule.sample(key, jnp.arange(number), stats).place != 500).sum())
    assert abs(int(count(KEY)) - number * chance) < 4 * (number * chance) ** 0.5 and 20 < number * chance < 50


@pytest.mark.slow
def test_combinations_hand_on_weights_and_statistics():
    rule = times.importance(T, "vlb")
    mixed = times.mixture(
        (0.5, times.joint(tokens=rule, label=times.constant(0.0))),
        (0.3, times.joint(tokens=rule, label=times.constant(1.0))),
        (0.2, times.joint(tokens=times.constant(1.0), label=times.constant(0.0))),
    )
    t, weight, place = mixed.sample(KEY, INDEX, LEARNT)
    other, p = np.asarray(place) < 0, probabilities(LEARNT)
    assert abs(other.mean() - 0.2) < 0.02 and (t["tokens"][other] == 1).all() and (weight[other] == 1).all()
    np.testing.assert_allclose(t["tokens"][~other], (np.asarray(place)[~other] + 1) / T, rtol=1e-6)
    np.testing.assert_allclose(weight[~other], 1 / (T * p[place[~other]]), rtol=1e-5)
    assert abs(float((t["label"] == 1).mean()) - 0.3) < 0.02
    for label in (0, 1):  # either way by the same probabilities
        own = np.asarray(place)[~other & (np.asarray(t["label"]) == label)]
        assert (np.abs(np.bincount(own, minlength=T) - len(own) * p) < 4.5 * np.sqrt(len(own) * p) + 1).all()
    together = times.shared("a", "b", times=rule).sample(KEY, INDEX, LEARNT)
    np.testing.assert_array_equal(together.t["a"], together.t["b"])
    np.testing.assert_array_equal(together.place, rule.sample(KEY, INDEX, LEARNT).place)
    assert not isinstance(times.joint(a=times.uniform()), times.Adaptive)


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(UserError, match="at least two steps"):
        times.importance(1, "vlb")
    with pytest.raises(UserError, match="only one modality"):
        times.joint(a=times.importance(T, "vlb"), b=times.importance(T, "vlb"))
    with pytest.raises(UserError, match="of one kind only"):
        times.mixture((0.5, times.importance(T, "vlb")), (0.5, times.importance(T, "other")))
    with pytest.raises(UserError, match="by the term 'vlb', but the loss has the terms \\['x'\\]"):
        loss_of(terms={"x": TERMS["aux"]})


# ------------------------------------------------------------------------------------------------------------------ the loss


@functools.cache
def measured():
    """(value, (metrics, seen))."""
    return jax.jit(loss_of().evaluate)


@pytest.mark.slow
def test_the_loss_is_weighted_and_tells_what_the_named_term_was():
    params, data, p = init(KEY), batch(), probabilities(LEARNT)
    value, (metrics, seen) = measured()(params, data, KEY, LEARNT)
    np.testing.assert_allclose(value, metrics["loss/vlb"] + 0.1 * metrics["loss/aux"], rtol=1e-6)
    # The same by hand: an example alone is a batch, whose values are its own.
    square, vlb = np.zeros(T), []
    for b in range(B):
        _, (own, one) = measured()(params, {name: array[b : b + 1] for name, array in data.items()}, KEY, LEARNT)
        place = int(one["count"].argmax())
        vlb.append(float(own["loss/vlb"]))
        square[place] += (vlb[-1] * T * p[place]) ** 2  # without its weight
    np.testing.assert_allclose(seen["square"], square, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/vlb"], np.mean(vlb), rtol=1e-5)
    assert seen["count"].sum() == B


@pytest.mark.slow
def test_importance_sampling_changes_the_noise_and_not_the_mean():
    params, data = init(KEY), batch()

    def values(stats):
        each = [float(measured()(params, data, jax.random.key(seed), stats)[0]) for seed in range(200)]
        return np.mean(each), np.std(each) / len(each) ** 0.5

    (uniform, error), (learnt, other) = values(SOURCE.init()), values(LEARNT)
    assert learnt != uniform and abs(learnt - uniform) < 4 * (error**2 + other**2) ** 0.5


def test_a_loss_without_the_statistics_is_that_of_a_beginning():
    params, data = init(KEY), batch()
    value, metrics = jax.jit(loss_of())(params, data, KEY)
    np.testing.assert_allclose(value, measured()(params, data, KEY, SOURCE.init())[0], rtol=1e-6)
    assert set(metrics) == {"loss/vlb", "loss/aux"}


def test_combined_losses_keep_their_statistics_apart():
    plain = losses.diffusion(PROCESS, network, times.joint(tokens=times.on_grid(T), label=times.constant(0.0)), TERMS)
    both = losses.combine(a=(1.0, loss_of()), b=(0.5, plain), c=(2.0, loss_of()))
    params = init(KEY)
    stats = both.init(params)
    assert set(stats) == {"a", "c"} and losses.combine(b=(1.0, plain)).init(params) is None
    told = {"a": SOURCE.observe(jnp.asarray([1]), jnp.ones(1)), "c": SOURCE.observe(jnp.asarray([2, 2]), jnp.ones(2))}
    _, (metrics, seen) = jax.eval_shape(both.evaluate, params, batch(), KEY, stats)
    assert jax.tree.map(jnp.shape, seen) == jax.tree.map(jnp.shape, told) and not [name for name in metrics if "stats" in name]
    after = both.update({**stats, "c": LEARNT}, told)
    assert int(after["a"]["count"].sum()) == 1 and int(after["c"]["count"].sum()) == 2 + 11 * T


# -------------------------------------------------------------------------------------------------------------- the training


@functools.cache
def program(microbatches=1, devices=1):
    mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    optimizer, loss = optax.adam(1e-2), loss_of()
    abstract = sharding.abstract_state(init, optimizer, mesh, (), loss)
    compiled = sharding.lower_step(make_step(loss, optimizer, microbatches=microbatches), abstract, batch(), mesh).compile()
    return mesh, abstract, compiled, lambda: sharding.init_sharded_state(init, optimizer, KEY, mesh, (), loss)


def trained(steps, **options):
    mesh, _, compiled, start = program(**options)
    state = start()
    for i in range(steps):
        state, metrics = compiled(state, sharding.shard_batch(batch(i), mesh))
    return jax.device_get(state.replace(key=jax.random.key_data(state.key))), jax.device_get(metrics)


@pytest.mark.slow
def test_the_state_learns_what_the_loss_was():
    """The first step, with the statistics from the loss itself; later every draw is counted and times are no longer uniform."""
    state = init_state(init, optax.adam(1e-2), KEY, loss_of())
    _, (_, seen) = measured()(state.params, batch(), jax.random.fold_in(state.key, 0), SOURCE.init())
    expected = SOURCE.update(SOURCE.init(), seen)
    after, metrics = trained(1)
    np.testing.assert_allclose(after.stats["loss"]["square"], expected["square"], rtol=1e-5)
    np.testing.assert_array_equal(after.stats["loss"]["count"], expected["count"])
    assert metrics["skipped"] == 0
    late, _ = trained(12)
    assert int(late.stats["loss"]["count"].sum()) == 12 * B and late.stats["loss"]["count"].min() > 10
    assert float(np.ptp(SOURCE.density(late.stats["loss"]))) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"microbatches": 4}, {"devices": 8}, {"devices": 2, "microbatches": 2}], ids=str)
def test_statistics_are_those_of_the_global_batch(options):
    (one, metrics), (other, same) = trained(12), trained(12, **options)
    np.testing.assert_array_equal(one.stats["loss"]["count"], other.stats["loss"]["count"])
    np.testing.assert_allclose(one.stats["loss"]["square"], other.stats["loss"]["square"], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), (one.params, metrics), (other.params, same))


def test_a_skipped_step_teaches_nothing():
    mesh, _, compiled, start = program()
    state, _ = compiled(start(), sharding.shard_batch(batch(), mesh))
    before = jax.device_get(state.stats)
    poisoned = state.replace(params={**state.params, "time": jnp.full(K, math.nan)})
    after = jax.device_get(compiled(poisoned, sharding.shard_batch(batch(1), mesh))[0].stats)
    jax.tree.map(np.testing.assert_array_equal, before["loss"], after["loss"])
    assert after["skipped"] == before["skipped"] + 1


@pytest.mark.slow
def test_a_run_that_continues_is_bit_equal(tmp_path):
    """Through the training loop, from a step on at which times are drawn by the statistics."""
    data = ArraySource({"tokens": batch(0, 40)["tokens"], "label": batch(0, 40)["label"]})
    experiment = Experiment(
        process=PROCESS, init=init, apply=network, loss=loss_of(), optimizer=optax.adam(1e-2), train_data=lambda: data,
        validation_data=lambda: data, test_data=lambda: data, shape={"tokens": (5,), "label": ()}, sample=None, modalities={}, rules=(),
    )
    config = tiny.get_config()
    config.train.update({"global_batch": B, "eval_every": 16, "checkpoint_every": 12})

    def run(workdir, steps):
        config.train.steps = steps
        state = loop.train(experiment, config, tmp_path / workdir)
        rows = [json.loads(line) for line in (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()]
        values = [{name: value for name, value in row.items() if name not in metrics_logger.TIMING} for row in rows]
        return jax.device_get(state.replace(key=jax.random.key_data(state.key))), values

    (whole, told), (part, _), (rest, again) = run("whole", 16), run("parts", 12), run("parts", 16)
    assert part.stats["loss"]["count"].min() > 10 and int(rest.stats["loss"]["count"].sum()) == 16 * B
    jax.tree.map(np.testing.assert_array_equal, whole, rest)
    assert [row for row in again if row["step"] == 16] == [row for row in told if row["step"] == 16]
    assert "val/loss/vlb" in told[-1] and not [name for row in told for name in row if "stats" in name]


def test_a_checkpoint_without_statistics_is_refused(tmp_path):
    mesh, abstract, _, _ = program()
    with checkpoints.Checkpoints(tmp_path, keep=1) as saved:
        saved.save(sharding.init_sharded_state(init, optax.adam(1e-2), KEY, mesh, ()), {}, {"metrics": {}})
    with checkpoints.Checkpoints(tmp_path, keep=1) as saved:
        with pytest.raises(UserError, match="of another network, optimizer or loss: state/state/stats/loss/count is absent there"):
            saved.restore(abstract, {})


def test_a_loss_without_statistics_has_none():
    plain = losses.diffusion(PROCESS, network, times.joint(tokens=times.on_grid(T), label=times.constant(0.0)), TERMS)
    assert set(init_state(init, optax.adam(1e-2), KEY, plain).stats) == {"skipped"}
