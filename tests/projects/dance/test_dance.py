import hashlib

import numpy as np
import pytest

from mmdiff.errors import UserError
from mmdiff.projects.dance import beats as scores
from mmdiff.projects.dance import dance
from mmdiff.projects.dance.dance import EDGE, RATE, SONGS, TICK, DanceMusic, DanceMusicBuilder, song
from mmdiff.projects.dance.skeleton import FPS, OFFSETS, PARENTS, joints
from mmdiff.projects.dance.styles import GENRES, STYLES


@pytest.fixture(scope="module")
def train():
    return DanceMusic("train").take(np.arange(200))


@pytest.fixture(scope="module")
def test():
    return DanceMusic("test").take(np.arange(80))


def known(row):
    return row[row >= 0]


def mean_f1(found, clips, tolerance=scores.TOLERANCE):
    return np.mean([scores.f1(some, known(row), tolerance) for some, row in zip(found, clips["beats"])])


@pytest.mark.parametrize("seconds, samples, most", [(2, 44_032, 5), (6, 132_224, 14)])
def test_shapes_and_types(seconds, samples, most):
    clips = DanceMusic("test", seconds).take(np.arange(20))
    assert {name: (array.dtype.name, array.shape) for name, array in clips.items()} == {
        "motion": ("float32", (20, seconds * FPS, 24, 3)),
        "audio": ("float32", (20, samples)),
        "genre": ("int32", (20,)),
        "beats": ("float32", (20, most)),
    }
    assert clips["genre"].tolist() == 2 * list(range(len(GENRES)))
    assert 0.3 < np.abs(clips["audio"]).max(1).min() and np.abs(clips["audio"]).max() <= 1
    np.testing.assert_allclose(clips["motion"][:, :, 0].mean(1), 0, atol=1e-5)
    assert 0.8 < np.abs(clips["motion"]).max() < 1.6
    for number, row in enumerate(clips["beats"]):
        times, period = known(row), song("test", number).period
        assert (row[len(times) :] == -1).all()
        assert times[0] < period + 0.01 and times[0] > EDGE - 0.003 and seconds - EDGE + 0.003 > times[-1] > seconds - period - 0.01
        np.testing.assert_allclose(np.diff(times), period, atol=TICK / RATE + 1e-5)
        np.testing.assert_allclose(times * RATE / TICK, np.rint(times * RATE / TICK), atol=1e-3)


def test_a_clip_is_a_function_of_its_number(test):
    taken = DanceMusic("test", count=43).take(np.array([42, 0, 42]))
    for name, array in taken.items():
        np.testing.assert_array_equal(array, test[name][[42, 0, 42]])
    assert np.abs(test["audio"][0] - test["audio"][40]).max() > 0.1  # the same song, from somewhere else
    with pytest.raises(IndexError):
        DanceMusic("test", count=43).take(np.array([43]))
    audio = np.rint(test["audio"][:4] * dance.LOUDEST).astype(np.int16)
    assert hashlib.sha256(audio.tobytes()).hexdigest()[:16] == "cf7e4d281745bebc"  # as before there was a validation split


def test_splits_share_no_song():
    songs = [song(split, number) for split in SONGS for number in range(SONGS[split])]
    assert len({(piece.period, piece.patterns, piece.notes) for piece in songs}) == len(songs) == 280
    assert len({piece.period for piece in songs}) == 280
    for piece in songs:
        slow, fast = STYLES[piece.genre].tempo
        assert slow <= 60 / piece.period <= fast <= dance.FASTEST
        kick, snare, *_ = piece.patterns
        assert all("X" in (kick[step], snare[step]) for step in (0, 4, 8, 12))


@pytest.mark.slow
def test_onsets_are_the_beats_and_those_of_another_pair_are_not(test):
    test = {name: array[:40] for name, array in test.items()}
    found = scores.times(scores.onsets(test["audio"]))
    assert mean_f1(found, test) > 0.9
    for shift in (7, 10):  # another genre, another song of the genre
        assert mean_f1(found[shift:] + found[:shift], test) < 0.3
    for second in range(2):
        assert np.mean([((times >= second) & (times < second + 1)).any() for times in found]) > 0.97


def frames(motion, reach=10):
    """The height of the pelvis and the mean speed around every frame, [n, frames, features]."""
    speed = np.linalg.norm(np.diff(motion, axis=1, prepend=motion[:, :1]), axis=-1).mean(-1)
    curves = np.stack([motion[:, :, 0, 1], speed], -1)
    curves = (curves - curves.mean(1, keepdims=True)) / curves.std(1, keepdims=True)
    padded = np.pad(curves, ((0, 0), (reach, reach), (0, 0)), mode="edge")
    return np.concatenate([padded[:, k : k + motion.shape[1]] for k in range(2 * reach + 1)], -1)


def test_the_beats_can_be_seen(train, test):
    from sklearn.linear_model import Ridge

    distance = np.abs(np.arange(120)[:, None] / FPS - np.where(train["beats"] < 0, 9, train["beats"])[:, None])
    near = np.exp(-0.5 * (distance.min(-1) / 0.03) ** 2)
    seen = frames(train["motion"])
    model = Ridge().fit(seen.reshape(-1, seen.shape[-1]), near.ravel())
    curves = model.predict(frames(test["motion"]).reshape(-1, seen.shape[-1])).reshape(-1, 120)
    found = [np.array([k for k in range(120) if y[k] > 0.25 and y[k] == y[max(0, k - 12) : k + 13].max()]) / FPS for y in curves]
    assert mean_f1(found, test) > 0.9
    assert mean_f1(found[7:] + found[:7], test) < 0.3
    errors = [np.abs(some[:, None] - known(row)).min(1) for some, row in zip(found, test["beats"])]
    assert np.median(np.concatenate(errors)) < 0.02


def statistics(motion):
    speed = np.abs(np.diff(motion, axis=1)).mean(1)
    centred = motion - motion[:, :, :1]
    return np.concatenate([part.reshape(len(motion), -1) for part in (centred.mean(1), centred.std(1), speed)], 1)


def test_the_genre_can_be_seen(train, test):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(statistics(train["motion"]), train["genre"])
    assert model.score(statistics(test["motion"]), test["genre"]) >= 0.9


def test_dancers_differ(train):
    for genre in range(len(GENRES)):
        stances = statistics(train["motion"][train["genre"] == genre])[:, :72]
        assert stances.std(0).mean() > 0.02  # metres
        assert np.abs(stances - stances[0])[1:].max(1).min() > 0.05


def test_joints():
    straight = joints(np.zeros((24, 3)))
    for joint, parent in enumerate(PARENTS[1:], 1):
        np.testing.assert_allclose(straight[joint] - straight[parent], OFFSETS[joint], atol=1e-12)
    assert 1.6 < np.ptp(straight[:, 1]) + 0.15 < 1.8  # the top of the head is above its joint
    quarter = np.zeros((24, 3))
    quarter[0, 1] = np.pi / 2  # about the vertical axis, x goes to -z
    np.testing.assert_allclose(joints(quarter), straight[:, [2, 1, 0]] * (1, 1, -1), atol=1e-12)
    bent = np.zeros((24, 3))
    bent[18, 1] = -np.pi / 2  # the left elbow, to the front
    moved = np.abs(joints(bent) - straight).max(-1) > 1e-9
    assert np.flatnonzero(moved).tolist() == [20, 22]
    np.testing.assert_allclose((joints(bent) - joints(bent)[18])[20], (0, 0.01, 0.25), atol=1e-12)
    turned = joints(np.random.default_rng(0).normal(size=(5, 24, 3)))
    lengths = np.linalg.norm(turned[:, 1:] - turned[:, list(PARENTS[1:])], axis=-1)
    np.testing.assert_allclose(lengths, np.broadcast_to(np.linalg.norm(OFFSETS[1:], axis=1), (5, 23)), atol=1e-12)


def test_poses(test):
    source = DanceMusic("test")
    for index in (0, 9):
        rotations, path = source.poses(index)
        motion = joints(rotations) + path[:, None]
        np.testing.assert_allclose(motion[..., 1].min(1), 0, atol=1e-12)  # on the floor
        np.testing.assert_allclose(motion - motion[:, 0].mean(0), test["motion"][index], atol=1e-5)
    with pytest.raises(IndexError):
        source.poses(200)


def test_mistakes():
    with pytest.raises(UserError, match="no split 'val'.*train, validation, test"):
        DanceMusic("val")
    with pytest.raises(UserError, match="0 clips"):
        DanceMusic("train", count=0)
    with pytest.raises(UserError, match="0 s"):
        DanceMusic("train", seconds=0)


def test_the_tfds_builder_holds_the_same_clips(tmp_path, monkeypatch, test):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(dance, "COUNTS", {"train": 3, "validation": 2, "test": 12})
    tfds.disable_progress_bar()
    DanceMusicBuilder(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    stored = tfds.data_source("dance_music", split="test", data_dir=str(tmp_path), download=False)
    assert len(stored) == 12
    for i in (0, 11):
        np.testing.assert_allclose(stored[i]["audio"] / 32_767, test["audio"][i], atol=1e-6)
        for name in ("motion", "genre", "beats"):
            np.testing.assert_array_equal(stored[i][name], test[name][i])
