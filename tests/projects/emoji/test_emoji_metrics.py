"""What is measured of a model of emoji that knows all pictures and captions by heart."""

import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmdiff import schedules
from mmdiff.data.modalities import Images
from mmdiff.data.sources import load_all
from mmdiff.data.token_modalities import Texts
from mmdiff.processes import Gaussian, Joint, absorbing, velocity
from mmdiff.projects.emoji.emoji import SPLITS, emoji_source, emoji_tokenizer
from mmdiff.projects.emoji.emoji_metrics import EmojiMetrics
from tests.small_sets import emoji

CONFIG = ml_collections.ConfigDict({"sample": {"steps": 2, "guidance": 1.5}})


def experiment(file, split):
    found = [load_all(emoji_source(each, file)) for each in SPLITS]
    images, texts = (jnp.concatenate([each[name] for each in found]) for name in ("image", "text"))
    tokenizer = emoji_tokenizer(file)
    flat = images.reshape(len(images), -1)

    def image_of(text):
        return images[(texts[None] == text[:, None]).sum(-1).argmax(1)]

    def apply(params, x, t):
        place = ((x["image"].reshape(len(x["image"]), 1, -1) - flat) ** 2).sum(-1).argmin(1)
        time = jnp.maximum(t["image"], 1e-3)[:, None, None, None]
        return {"image": (x["image"] - image_of(x["text"])) / time, "text": 50 * jax.nn.one_hot(texts[place], tokenizer.size)}

    def sample(params, keys, given, *, steps, guidance, absent=(), history=False):
        assert (steps, guidance, absent) == (2, 1.5, ())
        text = given.get("text", texts[: len(keys)])
        return {"image": image_of(text), "text": text}

    return types.SimpleNamespace(
        process=Joint(image=Gaussian(schedules.flow(), velocity), text=absorbing(tokenizer.size)), apply=apply, sample=sample, split=split,
        modalities={"image": Images(32, 32, 3), "text": Texts(tokenizer)}, shape={"image": (32, 32, 3), "text": (16,)})


@pytest.mark.slow
def test_what_is_measured_of_a_model_that_knows_everything(tmp_path):
    file = str(emoji(tmp_path / "emoji64.tar"))
    metrics = EmojiMetrics(file, most=40, candidates=8, draws=2, category_classifier_steps=20, batch=16)
    result = metrics(experiment(file, "test"), {}, CONFIG, jax.random.key(0), 0)
    found = dict(result.metrics)
    ones = ("sampled_tone", "sampled_tone_real", "read_tone", "read_name", "read_name_train", "pair_tone", "cycle_name", "image_to_text_r1",
            "text_to_image_r1")
    assert {name: found.pop(name) for name in ones} == dict.fromkeys(ones, 1.0)
    assert found.pop("absent_text_difference") == 0 and found.pop("read_category") == found.pop("read_known") == 0
    assert set(found) == {"sampled_category", "sampled_category_real"} and set(result.definitions) == set(result.metrics)
    assert len(result.figures) == 4 and np.isfinite(list(found.values())).all()
