"""What is seen of pictures of emoji that were sampled as tokens, by a model that knows them, and by one that confuses the tones."""

import types

import jax
import ml_collections
import numpy as np
import pytest

from mmdiff.data.sources import ArraySource, load_all
from mmdiff.data.token_modalities import Texts, TokenImages
from mmdiff.errors import UserError
from mmdiff.projects.emoji.captioned_emoji import CaptionedEmoji, ReconstructedEmoji
from mmdiff.projects.emoji.emoji import SPLITS, emoji_source, emoji_tokenizer
from tests.small_sets import emoji

CONFIG = ml_collections.ConfigDict({"sample": {"steps": 2, "guidance": 1.5}})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(emoji(tmp_path_factory.mktemp("emoji") / "emoji64.tar"))


def experiment(file, shift=0):
    """Of one token, which is the number of a picture; samples have that of a caption, or of one `shift` captions on."""
    found = {split: load_all(emoji_source(split, file)) for split in SPLITS}
    texts, images = (np.concatenate([each[name] for each in found.values()]) for name in ("text", "image"))
    start, caches = 0, {}
    for split, each in found.items():
        caches[split] = ArraySource({"tokens": np.arange(start, start + len(each["text"]))[:, None], "text": each["text"]})
        start += len(each["text"])

    def sample(params, keys, given, *, steps, guidance, absent=()):
        assert (steps, guidance, absent) == (2, 1.5, ())
        place = (given["text"][:, None] == texts[None]).all(-1).argmax(1)
        return {"tokens": ((place + shift) % len(texts))[:, None], "text": given["text"]}

    tokens = TokenImages(1, 1, len(texts), decode=lambda ids: images[ids[:, 0]])
    return types.SimpleNamespace(
        sample=sample, split="test", modalities={"tokens": tokens, "text": Texts(emoji_tokenizer(file))},
        apply=lambda params, x, t: {"reconstruction": x["image"]}, test_data=lambda: caches["test"], train_data=lambda: caches["train"])


def test_what_is_seen_of_samples_and_of_reconstructions(file):
    measured = CaptionedEmoji(file, "tokens", most=40, category_classifier_steps=2, batch=16)
    found, confused = (
        measured(experiment(file, shift), {}, CONFIG, jax.random.key(0), 0) for shift in (0, 1))
    tones = {f"sampled_tone{kind}": 1.0 for kind in ("", "_real", "_reconstructed")}
    assert {name: found.metrics[name] for name in tones} == tones
    assert found.metrics["sampled_category"] == found.metrics["sampled_category_reconstructed"]
    assert confused.metrics["sampled_tone"] < 0.5 and confused.metrics["sampled_tone_reconstructed"] == 1
    assert set(found.definitions) == set(found.metrics) and len(found.figures) == 2
    lossless = ReconstructedEmoji(file, most=40, category_classifier_steps=2)(experiment(file), {}, CONFIG, jax.random.key(0), 0).metrics
    assert lossless["reconstructed_tone"] == lossless["reconstructed_tone_real"] == 1
    assert lossless["reconstructed_category"] == lossless["reconstructed_category_real"] == found.metrics["sampled_category_real"]
    plain = ReconstructedEmoji(file, most=40, category_classifier_steps=0)
    assert set(plain(experiment(file), {}, CONFIG, jax.random.key(0), 0).metrics) == {"reconstructed_tone", "reconstructed_tone_real"}


def test_reconstructions_that_are_not_finite_are_refused(file):
    diverged = types.SimpleNamespace(**{**vars(experiment(file)), "apply": lambda params, x, t: {"reconstruction": x["image"] * np.nan}})
    with pytest.raises(UserError, match="reconstructions: .* hold values that are not finite"):
        ReconstructedEmoji(file, most=40, category_classifier_steps=0)(diverged, {}, CONFIG, jax.random.key(0), 0)


def test_tokens_of_other_pictures_are_refused(file):
    tokens = experiment(file)
    for other in (lambda: ArraySource({name: array[:-1] for name, array in tokens.train_data().arrays.items()}),
                  lambda: ArraySource({name: array[::-1] for name, array in tokens.train_data().arrays.items()})):
        changed = types.SimpleNamespace(**{**vars(tokens), "train_data": other})
        with pytest.raises(UserError, match="the tokens are of other pictures than those in .*emoji64.tar"):
            CaptionedEmoji(file, "tokens", category_classifier_steps=0).reconstructed(changed)
