import os
import pickle
import pickletools
import shutil

import numpy as np
import pytest
import soundfile

from mmdiff.data.sources import load_all
from mmdiff.errors import UserError
from mmdiff.projects.dance.aist import CODES, Aist, Segments, read_motion, read_wav, write_motion
from mmdiff.projects.dance.dance import RATE, DanceMusic
from mmdiff.projects.dance.skeleton import joints
from mmdiff.projects.dance.styles import GENRES

DANCES = {"train": ["gBR_sBM_cAll_d04_mBR1_ch01", "gHO_sFM_cAll_d20_mHO2_ch03"], "test": ["gJB_sBM_cAll_d09_mJB5_ch02"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in AIST++'s layout: dances of 6 s, with songs of 7 s."""
    folder = tmp_path_factory.mktemp("aist")
    for name in ("motions", "splits", "wav"):
        (folder / name).mkdir()
    source = DanceMusic("test", seconds=6, count=10)
    for split, dances in DANCES.items():
        (folder / "splits" / f"crossmodal_{split}.txt").write_text("\n".join(dances) + "\n")
        for dance in dances:
            index = CODES.index(dance[1:3])
            write_motion(folder / "motions" / f"{dance}.pkl", *source.poses(index))
            audio = source.take(np.array([index]))["audio"][0]
            wav = folder / "wav" / f"{dance.split('_')[4]}.wav"
            soundfile.write(wav, np.concatenate([audio / 2, np.zeros(7 * RATE - len(audio))]), RATE)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "aist")


@pytest.fixture
def segments(tmp_path):
    """A folder in the layout of the published segments of AIST++ and TikTok."""
    rng = np.random.default_rng(0)
    names = {
        "aist": ["gBR_sBM_c01_d04_mBR0_ch02_seg1", "gJB_sBM_c01_d08_mJB5_ch02_seg2", "gPO_sBM_c01_d10_mPO1_ch02_seg10"],
        "tiktok": ["000007_7_188_seg3", "000007_7_188_seg5"],
    }
    for data, found in names.items():
        inner = "test/" if data == "aist" else ""
        for kind, end in (("motion", "npy"), ("video", "npy"), ("audio", "wav")):
            (tmp_path / f"{kind}_s2" / inner).mkdir(parents=True, exist_ok=True)
            root = "./aistplus" if kind == "motion" else "/data/somebody/aistplus"
            lines = [f"{root}/{kind}_s2/{inner}{name}.{end}" for name in found]
            (tmp_path / f"{data}_{kind}_test_segment.txt").write_text("\n".join(lines) + "\n")
            for name in found:
                file = tmp_path / f"{kind}_s2" / inner / f"{name}.{end}"
                if kind == "motion":
                    np.save(file, rng.normal(size=(120, 219)) if data == "aist" else rng.normal(size=60 * 75))
                elif kind == "video":
                    np.save(file, rng.normal(size=(1, 2048)))
                else:
                    soundfile.write(file, rng.uniform(-0.5, 0.5, 2 * RATE), RATE)
    np.save(tmp_path / "test_genre.npy", np.eye(10)[[0, 9, 1]])
    return tmp_path


def test_a_motion_file_is_the_dance_that_was_written(tmp_path):
    source = DanceMusic("train", count=3)
    for index in range(3):
        write_motion(tmp_path / "dance.pkl", *source.poses(index))
        found = read_motion(tmp_path / "dance.pkl")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, source.take(np.array([index]))["motion"][0], atol=1e-5)


def test_scaling_and_keypoints(tmp_path):
    rotations, place = DanceMusic("train").poses(0)
    stored = {"smpl_poses": rotations, "smpl_trans": 93.0 * place, "smpl_scaling": np.array([93.0]), "smpl_loss": 0.5}
    (tmp_path / "scaled.pkl").write_bytes(pickle.dumps(stored))
    write_motion(tmp_path / "dance.pkl", rotations, place)
    np.testing.assert_allclose(read_motion(tmp_path / "scaled.pkl"), read_motion(tmp_path / "dance.pkl"), atol=1e-6)
    points = np.random.default_rng(0).normal(size=(20, 17, 3))
    (tmp_path / "points.pkl").write_bytes(pickle.dumps({"keypoints3d": 100 * points + 7}))
    np.testing.assert_allclose(read_motion(tmp_path / "points.pkl"), points - points[:, 0].mean(0), atol=1e-6)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_way_to_pickle_arrays_is_read(protocol, tmp_path):
    rotations, place = DanceMusic("train").poses(0)
    stored = {"smpl_poses": rotations.reshape(-1, 72).astype(np.float32), "smpl_trans": place, "smpl_scaling": np.float64(1)}
    data = pickle.dumps(stored, protocol)
    (tmp_path / "new.pkl").write_bytes(data)
    found = read_motion(tmp_path / "new.pkl")
    np.testing.assert_allclose(found, read_motion(tmp_path / "new.pkl"))
    expected = joints(rotations) + place[:, None]
    np.testing.assert_allclose(found, expected - expected[:, 0].mean(0), atol=1e-5)
    if protocol < 4:  # names are lines in these; numpy 1's modules had other names
        assert any("numpy" in str(argument) for _, argument, _ in pickletools.genops(data))
        (tmp_path / "old.pkl").write_bytes(data.replace(b"numpy._core.", b"numpy.core."))
        np.testing.assert_array_equal(read_motion(tmp_path / "old.pkl"), found)


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_program_hides_in_a_motion_file(tmp_path):
    evil = Evil()
    evil.path = str(tmp_path / "made")
    for stored in (evil, {"smpl_poses": evil}, {"smpl_poses": np.array([evil], object)}):
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(stored))
        with pytest.raises(UserError, match="no AIST.. motion file.*mkdir"):
            read_motion(tmp_path / "evil.pkl")
    assert not (tmp_path / "made").exists()
    (tmp_path / "evil.pkl").write_bytes(b"cnumpy\nload\n.")
    with pytest.raises(UserError, match="asks for numpy.load"):
        read_motion(tmp_path / "evil.pkl")


@pytest.mark.parametrize(
    "stored, said",
    [
        ({"smpl_poses": np.zeros((5, 70))}, r"not \[5, 70\]"),
        ({"smpl_poses": np.zeros((5, 72)), "smpl_trans": np.zeros((4, 3))}, r"\[4, 3\]"),
        ({"smpl_poses": np.full((5, 72), np.nan)}, "not finite"),
        ({"keypoints3d": np.zeros((5, 18, 3))}, r"\[5, 18, 3\]"),
        ({"camera": np.zeros(3)}, "neither smpl_poses nor keypoints3d: it holds camera"),
        ([1, 2], "no AIST"),
    ],
)
def test_wrong_motion_files(stored, said, tmp_path):
    (tmp_path / "dance.pkl").write_bytes(pickle.dumps(stored))
    with pytest.raises(UserError, match=said):
        read_motion(tmp_path / "dance.pkl")
    with pytest.raises(UserError, match="no such file"):
        read_motion(tmp_path / "gone.pkl")


@pytest.mark.parametrize("kind", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT", "stereo"])
def test_wav_files(kind, tmp_path):
    audio = np.sin(np.arange(1000) / 10).astype(np.float32) * 0.9
    stored = np.stack([audio, np.zeros_like(audio)], 1) if kind == "stereo" else audio
    soundfile.write(tmp_path / "a.wav", stored, RATE, None if kind == "stereo" else kind)
    found = read_wav(tmp_path / "a.wav")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, audio / (2 if kind == "stereo" else 1), atol=0.01 if kind == "PCM_U8" else 1e-4)


def test_wrong_wav_files(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 48_000)
    with pytest.raises(UserError, match="48,000 samples a second, not 22,050.*ffmpeg"):
        read_wav(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_text("no sound")
    with pytest.raises(UserError, match="b.wav cannot be read as a wav file"):
        read_wav(tmp_path / "b.wav")
    with pytest.raises(UserError, match="no such file"):
        read_wav(tmp_path / "c.wav")


def test_aist(folder):
    source = Aist(folder, "train")
    assert len(source) == 6
    clips = load_all(source)
    assert clips["motion"].shape == (6, 120, 24, 3) and clips["motion"].dtype == np.float32
    assert clips["audio"].shape == (6, 44_032) and clips["audio"].dtype == np.float32
    assert clips["genre"].tolist() == [0, 0, 0, 5, 5, 5] and GENRES[5] == "house"
    real = DanceMusic("test", seconds=6).take(np.array([0, 5]))
    for clip, (song, second) in enumerate((song, second) for song in (0, 1) for second in (0, 2, 4)):
        motion = real["motion"][song, 60 * second : 60 * second + 120]
        np.testing.assert_allclose(clips["motion"][clip], motion - motion[:, 0].mean(0), atol=1e-5)
        audio = real["audio"][song, RATE * second : RATE * second + 44_032]
        np.testing.assert_allclose(clips["audio"][clip][: len(audio)], 0.95 * audio / np.abs(audio).max(), atol=2e-3)
    np.testing.assert_array_equal(source.take(np.array([4, 0, 4]))["audio"], clips["audio"][[4, 0, 4]])
    assert len(Aist(folder, "test", seconds=6)) == 1
    with pytest.raises(IndexError):
        source.take(np.array([6]))


def test_aist_that_is_not_whole(folder):
    with pytest.raises(UserError, match="no split 'valid'"):
        Aist(folder, "valid")
    with pytest.raises(UserError, match="no such file: .*crossmodal_val.txt"):
        Aist(folder, "val")
    with pytest.raises(UserError, match="no dance of 8 s"):
        Aist(folder, "test", seconds=8)
    (folder / "splits" / "crossmodal_val.txt").write_text("dance7\n")
    with pytest.raises(UserError, match="dance7 is not the name of an AIST"):
        Aist(folder, "val")
    soundfile.write(folder / "wav" / "mJB9.wav", np.zeros(RATE * 3), RATE)
    (folder / "splits" / "crossmodal_val.txt").write_text("gJB_sBM_cAll_d09_mJB9_ch02\n")
    with pytest.raises(UserError, match="no such file: .*mJB9_ch02.pkl"):
        Aist(folder, "val")
    shutil.copy(folder / "motions" / f"{DANCES['test'][0]}.pkl", folder / "motions" / "gJB_sBM_cAll_d09_mJB9_ch02.pkl")
    with pytest.raises(UserError, match="mJB9.wav lasts 3.0 s, but .* dances 6.0 s"):
        Aist(folder, "val")
    (folder / "wav" / "mJB5.wav").unlink()
    with pytest.raises(UserError, match="no such file: .*mJB5.wav"):
        Aist(folder, "test")


def test_segments(segments):
    source = Segments(segments, "test", video=True)
    clips = load_all(source)
    assert {name: (array.dtype.name, array.shape) for name, array in clips.items()} == {
        "motion": ("float32", (3, 120, 73, 3)),
        "audio": ("float32", (3, 44_032)),
        "genre": ("int32", (3,)),
        "video": ("float32", (3, 2048)),
    }
    assert clips["genre"].tolist() == [0, 9, 1]
    stored = np.load(segments / "motion_s2" / "test" / "gJB_sBM_c01_d08_mJB5_ch02_seg2.npy")
    np.testing.assert_allclose(clips["motion"][1].reshape(120, 219), stored, rtol=1e-6)
    np.testing.assert_allclose(np.abs(clips["audio"]).max(1), 0.95, rtol=1e-3)
    assert set(load_all(Segments(segments, "test"))) == {"motion", "audio", "genre"}


def test_tiktok(segments):
    clips = load_all(Segments(segments, "test", data="tiktok", video=True))
    assert clips["motion"].shape == (2, 60, 25, 3) and clips["audio"].shape == (2, 44_032) and clips["video"].shape == (2, 2048)
    assert "genre" not in clips
    stored = np.load(segments / "motion_s2" / "000007_7_188_seg5.npy")
    np.testing.assert_allclose(clips["motion"][1].ravel(), stored, rtol=1e-6)


def test_segments_that_are_wrong(segments):
    first = segments / "motion_s2" / "test" / "gBR_sBM_c01_d04_mBR0_ch02_seg1.npy"
    motion = np.load(first)
    np.save(first, motion[:60])
    with pytest.raises(UserError, match=r"seg1.npy holds float64 \[60, 219\].*\[120, 219\]"):
        load_all(Segments(segments, "test"))
    np.save(first, motion)
    sound = segments / "audio_s2" / "test" / f"{first.stem}.wav"
    soundfile.write(sound, np.zeros(RATE), RATE)
    with pytest.raises(UserError, match="lasts 1.00 s, not 2"):
        load_all(Segments(segments, "test"))
    soundfile.write(sound, np.zeros(2 * RATE), RATE)
    assert not load_all(Segments(segments, "test"))["audio"][0].any()
    with pytest.raises(UserError, match="choose one of aist, tiktok"):
        Segments(segments, "test", data="youtube")
    with pytest.raises(UserError, match="no such file: .*aist_motion_test_segment_s6.txt"):
        Segments(segments, "test", seconds=6)
    np.save(segments / "test_genre.npy", np.eye(10)[[0, 8, 1]])
    with pytest.raises(UserError, match="row 1 is not the one-hot genre of gJB_"):
        Segments(segments, "test")
    np.save(segments / "test_genre.npy", np.eye(10)[[0, 8]])
    with pytest.raises(UserError, match=r"\[2, 10\]"):
        Segments(segments, "test")
    listed = segments / "aist_audio_test_segment.txt"
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join(lines[::-1]))
    with pytest.raises(UserError, match="lists of motion and audio"):
        Segments(segments, "test")
    listed.write_text("\n".join(lines).replace("audio_s2", "audio_s6"))
    with pytest.raises(UserError, match="in no folder audio_s2"):
        Segments(segments, "test")
    listed.write_text("\n".join(lines))
    sound.unlink()
    with pytest.raises(UserError, match=f"no such file: .*{sound.name}"):
        Segments(segments, "test")
