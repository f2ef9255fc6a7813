"""CLIP's scores of images and captions, by towers with random weights."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from mmdiff.__main__ import main
from mmdiff.data import named_encoders
from mmdiff.encoders import preprocessing
from mmdiff.encoders.clip import CLIPText, CLIPVision
from mmdiff.errors import UserError
from mmdiff.evals import clip_scores

SIZES = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=4)


class Letters:
    """A letter is a token; 98 begins and 99 ends a text."""

    end, rules, padding = 99, "", 0

    def encode(self, texts):
        ids = np.zeros((len(texts), 24), np.int32)
        for row, text in zip(ids, texts):
            letters = [98, *(1 + ord(letter) % 90 for letter in text)][:23]
            row[: len(letters) + 1] = [*letters, 99]
        return ids


@functools.cache
def towers():
    text = CLIPText(vocab_size=100, max_position_embeddings=24, eos_token_id=99, **SIZES)
    vision = CLIPVision(image_size=16, patch_size=8, **SIZES)
    params = [jax.jit(net.init)(jax.random.key(i), *net.example_inputs())["params"] for i, net in enumerate((text, vision))]
    preprocess = dataclasses.replace(preprocessing.CLIP, size=16)
    made = [types.SimpleNamespace(net=net, params=of, preprocessing=preprocess) for net, of in zip((text, vision), params)]
    return dict(zip(("clip_text", "clip_vision"), made))


@pytest.fixture(autouse=True)
def small_clip(monkeypatch):
    monkeypatch.setattr(named_encoders, "_opened", lambda kind, path: towers()[kind])
    monkeypatch.setattr(named_encoders.TextStates, "tokenizer", Letters())


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 20, 16, 3), np.uint8)


def vectors(images, captions):
    image, text = towers()["clip_vision"], towers()["clip_text"]
    pictures = image.net.apply({"params": image.params}, np.stack([image.preprocessing(each) for each in images])).embedding
    texts = text.net.apply({"params": text.params}, Letters().encode(captions)).embedding
    return [np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (pictures, texts)]


CAPTIONS = ["a cat", "two dogs", "red", "a very long caption of something", "", "blue sky"]


def test_scores_are_cosines_of_the_projected_vectors(images):
    metrics, definitions = clip_scores.clip_metrics([images[:4], images[4:]], CAPTIONS, "folder/ViT-B-32")
    pictures, texts = vectors(images, CAPTIONS)
    assert metrics["CLIP_cosine"] == pytest.approx(100 * np.maximum((pictures * texts).sum(1), 0).mean(), rel=1e-5)
    _, prefixed = vectors(images, ["A photo depicts " + caption for caption in CAPTIONS])
    assert metrics["CLIPScore"] == pytest.approx(2.5 * np.maximum((pictures * prefixed).sum(1), 0).mean(), rel=1e-5)
    assert "ViT-B-32; 6 samples" in definitions["CLIPScore"]
    with pytest.raises(UserError, match="there are 5 captions and 6 images"):
        clip_scores.clip_metrics([images], CAPTIONS[:5], "x")


def test_the_command_takes_captions(images, tmp_path, monkeypatch, capsys):
    from mmdiff.evals import sample_metrics

    monkeypatch.setattr(sample_metrics, "open_network", lambda kind, path: None)
    monkeypatch.setattr(sample_metrics, "measure_files", lambda *args: ({"lite0-FD": 1.0}, {}, {
        "samples": 6, "network": "x", "features": "y", "weights": "z", "preprocessing": {"resize": "", "kernel": "", "size": 1}}))
    np.savez(tmp_path / "samples.npz", arr_0=images)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    argv = ["eval", "--samples", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "samples.npz")]
    assert main([*argv, "--captions", str(tmp_path / "captions.txt"), "--clip", "x"]) == 0
    metrics = dict(line.split() for line in capsys.readouterr().out.splitlines()[:3])
    assert float(metrics["CLIPScore"]) == pytest.approx(clip_scores.clip_metrics([images], CAPTIONS, "x")[0]["CLIPScore"], abs=1e-4)
    (tmp_path / "captions.txt").write_text("one\n")
    for more, words in ((["--captions", str(tmp_path / "captions.txt"), "--clip", "x"], "has 1 lines for 6 samples"),
                        (["--clip", "x"], "--captions FILE and --clip DIR go together"),
                        (["--captions", str(tmp_path / "none.txt"), "--clip", "x"], "no such file")):  # fmt: skip
        assert main([*argv, *more]) == 2
        assert words in capsys.readouterr().err
