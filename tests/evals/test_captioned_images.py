"""Retrieval and captions of images with several captions, of networks that are known exactly: their values by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_sets

from mmdiff import schedules
from mmdiff.data import bpe
from mmdiff.data.modalities import Images
from mmdiff.data.sources import ArraySource
from mmdiff.data.token_modalities import Texts
from mmdiff.errors import UserError
from mmdiff.evals.alignment import PairRetrieval
from mmdiff.evals.caption_scores import cider_d
from mmdiff.evals.captioned_images import BeliefRetrieval, CaptionedImages, CaptionScores, LikelihoodRetrieval
from mmdiff.processes import Gaussian, Joint, absorbing, velocity

PLACES = np.array([-1.0, 0.0, 1.0], np.float32)  # of the images
SAID = np.array([-1.0, -1.2, 0.1, 0.9, 1.0, 1.1], np.float32)  # two captions each: the fourth is nearer to the last image than to its own


class Captioned(ArraySource):
    """Examples of which so many in a row are of one image."""

    of_image = 2


def shown(out):
    """An experiment whose network believes what `out(x, t)` says."""
    process = Joint(image=Gaussian(schedules.flow(), velocity), text=Gaussian(schedules.flow(), velocity))

    def apply(params, x, t):
        return {name: (x[name] - hat) / jnp.maximum(t[name], 1e-4)[:, None] for name, hat in out(x, t).items()}

    source = Captioned({"image": np.repeat(PLACES, 2)[:, None], "text": SAID[:, None]})
    return types.SimpleNamespace(process=process, apply=apply, shape={"image": (1,), "text": (1,)}, test_data=lambda: source, split="test")


def test_retrieval_by_beliefs_and_by_likelihood():
    """An image is thought to be where its text says it is, and the other way round."""
    experiment = shown(lambda x, t: {"image": x["text"], "text": x["image"]})
    expected = {"image_to_text_r1": 1.0, "text_to_image_r1": 5 / 6, "image_to_text_r5": 1.0, "text_to_image_r5": 1.0}
    for evaluator, suffix in (
        (BeliefRetrieval(batch=4), ""), (LikelihoodRetrieval(most=10, draws=2, batch=4), "_likelihood"),
    ):
        found = evaluator(experiment, None, None, jax.random.key(0), 0)
        assert {name: found.metrics[f"{name}{suffix}"] for name in expected} == pytest.approx(expected)
        assert len(found.metrics) == 6 and all("3 images with 2 captions each" in text for text in found.definitions.values())


def test_the_first_images_with_all_their_captions():
    source = Captioned({"image": np.arange(6), "text": np.arange(6)})
    data = CaptionedImages.of(source, 2)
    assert data.images["image"].tolist() == [0, 2] and data.texts["text"].tolist() == [0, 1, 2, 3]
    assert data.relevant.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert str(CaptionedImages.of(ArraySource({"image": np.arange(3)}), 9)) == "3 images with 1 caption each"


def test_five_captions_are_searched_by_diffdis_too():
    """An image is aligned with one of its captions; two captions equal one of another image's, and are right for both."""
    queries = np.eye(4)[[0, 1, 2, 3, 3, 0]]
    source = Captioned({"image": np.repeat(np.arange(3), 2), "query": queries})
    found = PairRetrieval(lambda params, key, images, **options: np.eye(4)[[0, 2, 0]][images], count=9)(
        types.SimpleNamespace(test_data=lambda: source), None, None, None, 0)
    assert found.metrics["image_to_text_r1"] == 1.0 and found.settings["candidates"] == 6
    assert found.metrics["text_to_image_r1"] == pytest.approx(np.mean([1, 1 / 3, 1, 2 / 3, 2 / 3, 1]))  # equal scores in any order


@pytest.mark.slow
def test_captions_are_compared_with_those_that_people_wrote(tmp_path):
    """The network reads an image's colour: it says the first caption of the first image of that colour."""
    folder = small_sets.karpathy(tmp_path, (("train", 1), ("test", 4)))
    said = [small_sets.captions(i) for i in range(1, 5)]
    words = bpe.train([caption for captions in said for caption in captions], 20, 400)
    ids = jnp.asarray(words.encode([captions[0] for captions in said]))
    process = Joint(image=Gaussian(schedules.flow(), velocity), text=absorbing(words.size))

    def apply(params, x, t):
        logits = 30.0 * jax.nn.one_hot(ids, words.size)
        return {"image": x["image"], "text": logits[jnp.round(x["image"][:, 0, 0, 0] * 4).astype(int) % 3]}

    class Source(Captioned):
        of_image = 5

    texts = words.encode([caption for captions in said for caption in captions])
    images = np.broadcast_to(np.repeat(np.arange(4, dtype=np.float32) / 4, 5)[:, None, None, None], (20, 4, 4, 1))
    experiment = types.SimpleNamespace(
        process=process, apply=apply, shape={"image": (4, 4, 1), "text": (20,)}, split="test", test_data=lambda: Source(
            {"image": images, "text": texts}), modalities={"image": Images(4, 4, 1), "text": Texts(words)})
    written = [said[i][0] for i in (0, 1, 2, 0)]
    for where in (folder, ""):
        scores = CaptionScores("coco_karpathy", str(where), steps=4, batch=4)
        found = scores(experiment, None, None, jax.random.key(0), 0)
        assert found.metrics["CIDEr-D"] == pytest.approx(cider_d(written, said)[0]) and found.metrics["BLEU-1"] == pytest.approx(1.0)
        assert ("captions that people wrote" in found.definitions["BLEU-4"]) == bool(where)
    (tmp_path / "other").mkdir()
    small_sets.karpathy(tmp_path / "other", (("test", 5),))
    with pytest.raises(UserError, match="the captions of coco_karpathy in .*other are not those of the cache"):
        CaptionScores("coco_karpathy", str(tmp_path / "other"), batch=4)(experiment, None, None, jax.random.key(0), 0)
