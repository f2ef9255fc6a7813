"""What follows from the parts that a config states."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mmdiff import Experiment, schedules
from mmdiff.data import ArraySource, Images, Labels, published
from mmdiff.errors import UserError
from mmdiff.processes import Gaussian, Given, Joint, velocity

MODALITIES = {"image": Images(2, 2), "label": Labels(3), "extra": Labels(5)}
PROCESS = Joint(image=Gaussian(schedules.flow(), velocity), label=Given(null=3))


class Net:
    """Predicts a velocity that is the label, or 10 where it is absent."""

    def init(self, key, x, t):
        return {"params": {"scale": jnp.ones(()) * (x["image"].shape == (1, 2, 2, 1))}}

    def apply(self, params, x, t):
        value = jnp.where(x["label"] == 3, 10.0, x["label"])[:, None, None, None] * params["params"]["scale"]
        return {"image": jnp.broadcast_to(value, x["image"].shape)}


def experiment(**parts):
    parts = {"process": PROCESS, "net": Net(), "modalities": MODALITIES, "loss": None, "optimizer": None, **parts}
    return Experiment(**parts)


def sampled(one, guidance, **options):
    keys = jax.random.split(jax.random.key(0), 2)
    params = one.init(jax.random.key(1))
    noise = PROCESS.prior(jax.random.split(jax.random.key(2), 2), one.shape)["image"]
    given = {"label": jnp.array([1, 2])}
    return one.sample(params, keys, given, steps=1, guidance=guidance, start={"image": noise}, **options)["image"] - noise


def test_shape_init_apply_and_sampler_follow():
    one = experiment()
    assert one.shape == {"image": (2, 2, 1), "label": ()}  # of the process alone
    assert float(one.init(jax.random.key(0))["params"]["scale"]) == 1
    # One step of the flow subtracts the velocity; guidance drops the condition: 10 + 2 (label - 10).
    assert sampled(one, 1.0)[:, 0, 0, 0].tolist() == pytest.approx([-1, -2], abs=1e-5)
    assert sampled(one, 2.0)[:, 0, 0, 0].tolist() == pytest.approx([8, 6], abs=1e-5)


def test_what_is_given_stays_and_what_is_set_to_none_follows_anew():
    one = experiment(sample="own", data={"train": 1}.get)
    assert one.sample == "own"
    other = dataclasses.replace(one, sample=None, sampler={"drop": ()})
    assert sampled(other, 2.0)[:, 0, 0, 0].tolist() == pytest.approx([-1, -2], abs=1e-5)  # nothing to drop


def test_splits_follow_from_the_data():
    one = experiment(data=lambda split: split)
    assert [one.train_data(), one.validation_data(), one.test_data()] == ["train", "validation", "test"]
    assert one.on_validation().test_data() == "validation" and one.on_validation().split == "validation"


def test_a_published_set_has_its_own_splits():
    data = published(lambda split: ArraySource({"label": jnp.arange(9) + 100 * (split == "val")}), 3)
    assert len(data("train")) == 9 and data("validation").take([0, 1, 2])["label"].tolist() == [100, 103, 106]
    assert data("test").take([2])["label"].tolist() == [106]


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="the process has the modality 'label'"):
        experiment(modalities={"image": Images(2, 2)})
    nothing = experiment(process=Joint(image=Given(0.0), label=Given(3)))
    with pytest.raises(UserError, match="samples nothing"):
        nothing.sample(None, None, {}, steps=1, guidance=1.0)
