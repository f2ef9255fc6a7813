"""Pairs of scenes: both images show one scene, and each is determined by the other."""

import itertools

import numpy as np
import pytest

from mmdiff.data.sources import load_all
from mmdiff.errors import UserError
from mmdiff.projects.scenes.paired_scenes import DARKEN, GLOW, PALETTE, PairedScenes, day, night
from mmdiff.projects.scenes.scenes import Scenes


@pytest.fixture(scope="module")
def scenes():
    return {other: load_all(PairedScenes("train", other, count=300)) for other in ("segmentation", "night")}


def test_the_scenes_are_the_scenes(scenes):
    plain = load_all(Scenes("train", count=300))
    for other, found in scenes.items():
        assert set(found) == {*plain, other}
        for name, array in plain.items():
            np.testing.assert_array_equal(found[name], array)
        assert len(PairedScenes("held_out", other)) == 2000
        np.testing.assert_array_equal(PairedScenes("train", other, count=9).take(np.array([8, 2]))[other], found[other][[8, 2]])


def test_segmentation_names_the_digit_where_it_is(scenes):
    found = scenes["segmentation"]
    maps = found["segmentation"]
    assert maps.shape == (300, 16, 16) and maps.dtype == np.int32
    for image, pixels, digit in zip(found["image"], maps, found["digit"]):
        assert set(np.unique(pixels)) == {0, digit + 1}
        # The background's colour is that of most pixels without a digit; the digit's are nearer to the digit's than to it.
        behind = np.median(image[pixels == 0], 0)
        front = image[pixels > 0]
        furthest = image.reshape(-1, 3)[np.argmax(((image.reshape(-1, 3) - behind) ** 2).sum(-1))]
        assert (((front - furthest) ** 2).sum(-1) < ((front - behind) ** 2).sum(-1) + 0.02).all()
    assert 0.05 < (maps > 0).mean() < 0.3


def test_classes_have_colours_far_apart():
    assert np.array(PALETTE).shape == (11, 3) and np.array(PALETTE).max() == 255
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(PALETTE, 2)) >= 179


def test_night_is_dark_keeps_the_scene_and_can_be_undone(scenes):
    found = scenes["night"]
    assert found["night"].shape == (300, 16, 16, 3) and found["night"].dtype == np.float32 and np.abs(found["night"]).max() <= 1
    np.testing.assert_array_equal(night(found["image"]), found["night"])
    np.testing.assert_allclose(day(found["night"]), found["image"], atol=1e-5)
    assert found["night"].mean() < found["image"].mean() - 0.1
    assert (found["night"][..., 2] > found["night"][..., :2].max(-1)).mean() > 0.6  # blue
    assert np.linalg.cond(DARKEN) < 3 and (DARKEN.sum(1) + GLOW <= 1).all() and (DARKEN >= 0).all() and (GLOW >= 0).all()
    np.testing.assert_allclose(night(-np.ones(3)), 2 * GLOW - 1, atol=1e-6)
    same = (found["image"][:, 1:] == found["image"][:, :-1]).all(-1)
    np.testing.assert_array_equal((found["night"][:, 1:] == found["night"][:, :-1]).all(-1), same)


def test_there_is_no_other_other():
    with pytest.raises(UserError, match="no second image 'winter': choose segmentation or night"):
        PairedScenes("train", "winter")
