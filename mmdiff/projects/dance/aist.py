"""Dances with their music as they are published: AIST++, and the 2-s segments of AIST++ and of TikTok that D2M-GAN and CDCD use.

`Aist` reads AIST++ (https://google.github.io/aistplusplus_dataset) with the music of the AIST database, in one folder:

    DIR/motions/gBR_sBM_cAll_d04_mBR0_ch01.pkl   smpl_poses [frames, 72] in radians, smpl_trans [frames, 3], smpl_scaling [1], at 60 fps
    DIR/splits/crossmodal_train.txt              names of dances, as above; also val and test. The splits share no song.
    DIR/wav/mBR0.wav                             the song that a dance's name says; the dance begins with it

`Segments` reads the segments (https://github.com/L-YeZhu/D2M-GAN; TikTok's names begin with tiktok, and it has no genres):

    DIR/aist_audio_test_segment.txt              a path per segment, of which ".../audio_s2/test/gBR_..._seg1.wav" the part from audio_s2 on
    DIR/aist_motion_test_segment.txt             counts; motion_s2/ and video_s2/ alike, in the same order; "_s6" before ".txt" for 6 s
    DIR/audio_s2/test/gBR_sBM_c01_d04_mBR0_ch02_seg1.wav
    DIR/motion_s2/test/gBR_sBM_c01_d04_mBR0_ch02_seg1.npy   AIST++: [120, 219] (24 rotation matrices and a place); TikTok: [60, 75], 30 fps
    DIR/video_s2/test/gBR_sBM_c01_d04_mBR0_ch02_seg1.npy    2,048 features of the video, optional
    DIR/test_genre.npy                           one-hot [n, 10], in the order of `GENRES`

Music is mono wav at 22,050 Hz; `ffmpeg -i IN -ar 22050 -ac 1 OUT.wav` makes it of any music or video.
"""

from __future__ import annotations

import functools
import os
import pathlib
import pickle
import re
from collections.abc import Sequence

import numpy as np

from mmdiff import files
from mmdiff.data import media
from mmdiff.data.arrays import read_array, read_pickled_arrays
from mmdiff.data.sources import check_range, digest, sizes
from mmdiff.errors import UserError
from mmdiff.projects.dance.dance import RATE, TICK
from mmdiff.projects.dance.skeleton import FPS, centred, joints

CODES = ("BR", "PO", "LO", "MH", "LH", "HO", "WA", "KR", "JS", "JB")  # in the order of `styles.GENRES`
SPLITS = ("train", "val", "test")
LOUD = 0.95  # the largest sample of a clip,
SILENCE = 1e-3  # unless none is larger than this (-60 dB, 33 steps of 16 bits): dither is not music
NAME = re.compile(rf"g({'|'.join(CODES)})_s[A-Z]+_c(?:All|\d+)_d\d+_(m[A-Z]+\d+)_ch\d+(?:_seg\d+)?")
# frames in a second and numbers in a frame
SEGMENTS = {"aist": (60, 219), "tiktok": (30, 75)}
CONVERT = f"make one with ffmpeg -i IN -ar {RATE} -ac 1 OUT.wav"
CACHED = 16  # dances and songs that are kept in memory


class Aist:
    """A `Source` of AIST++'s dances, cut into clips one after another; what is left at the end is left out.

    motion float32 [n, 60 seconds, 24, 3], metres from the clip's mean pelvis; audio float32 [n, samples], whole blocks of 128 samples with
    the peak 0.95; genre int32 [n], by `styles.GENRES`. All dances of the list are used: the paper's 980 for training, which give
    6,632 clips of 2 s.

    Args:
      folder: see the head of this file.
      split: "train", "val" or "test", of the cross-modal split.
      seconds: the length of a clip.

    Raises:
      UserError: an unknown split, names that are not AIST++'s, files that are missing, or of another rate or length.
    """

    def __init__(self, folder: str | os.PathLike, split: str, seconds: int = 2):
        _check_split(split)
        self._folder, self.seconds = files.expand(folder), seconds
        self._dance, self._song = (functools.lru_cache(CACHED)(read) for read in (read_motion, read_wav))
        self._clips: list[tuple[str, int]] = []
        for name in _lines(self._folder / "splits" / f"crossmodal_{split}.txt"):
            heard, seen = len(self._song(self._wav(name))) / RATE, len(self._dance(self._motion(name))) / FPS
            if heard < seen - 0.5:
                raise UserError(f"{self._wav(name)} lasts {heard:.1f} s, but {name} dances {seen:.1f} s to it: take the whole song.")
            self._clips += [(name, number) for number in range(int(min(heard, seen) // seconds))]
        if not self._clips:
            raise UserError(f"the {split} split in {self._folder} has no dance of {seconds} s.")

    def __len__(self):
        return len(self._clips)

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        frames, samples = self.seconds * FPS, self.seconds * RATE
        motion, audio, genre = [], [], []
        for name, number in (self._clips[i] for i in indices):
            motion.append(centred(self._dance(self._motion(name))[number * frames : (number + 1) * frames]))
            audio.append(_loud(self._song(self._wav(name))[number * samples : (number + 1) * samples]))
            genre.append(CODES.index(_parsed(name)[0]))
        return {"motion": np.stack(motion), "audio": np.stack(audio), "genre": np.array(genre, np.int32)}

    def fingerprint(self):
        dances = list(dict.fromkeys(name for name, _ in self._clips))
        paths = [path(name) for name in dances for path in (self._motion, self._wav)]
        return digest(len(self), self._clips, self.seconds, sizes(paths, self._folder))

    def _motion(self, name: str) -> pathlib.Path:
        return self._folder / "motions" / f"{name}.pkl"

    def _wav(self, name: str) -> pathlib.Path:
        return self._folder / "wav" / f"{_parsed(name)[1]}.wav"


class Segments:
    """A `Source` of the published segments of AIST++ or TikTok.

    motion float32 [n, frames, numbers / 3, 3]: [120, 73, 3] for 2 s of AIST++, whose triples are rows of rotation matrices and a place, and
    [60, 25, 3] for TikTok, OpenPose's (x, y, confidence); audio as in `Aist`; for AIST++ genre int32 [n]; where asked for, video
    float32 [n, 2048].

    Args:
      folder: see the head of this file.
      split: "train", "val" or "test"; TikTok has no "val".
      data: "aist" or "tiktok".
      seconds: 2 or 6; TikTok has 2.
      video: whether to read the features of the videos.

    Raises:
      UserError: an unknown split, lists that do not match, files that are missing, or (from `take`) of another rate, length or shape.
    """

    def __init__(self, folder: str | os.PathLike, split: str, data: str = "aist", seconds: int = 2, video: bool = False):
        _check_split(split)
        if data not in SEGMENTS:
            raise UserError(f"there are no segments of {data!r}: choose one of {', '.join(SEGMENTS)}.")
        folder = self._folder = files.expand(folder)
        self.seconds, self._data = seconds, data
        longer = "" if seconds == 2 else f"_s{seconds}"
        self._files: dict[str, list[pathlib.Path]] = {}
        for kind in ("motion", "audio", *["video"] * video):
            list_file, part = folder / f"{data}_{kind}_{split}_segment{longer}.txt", f"{kind}_s{seconds}"
            paths = [pathlib.PurePosixPath(line).parts for line in _lines(list_file)]
            odd = [path for path in paths if part not in path]
            if odd:
                raise UserError(f"{list_file} names {'/'.join(odd[0])}, which is in no folder {part}: take the list for {seconds} s.")
            self._files[kind] = [folder.joinpath(*path[path.index(part) :]) for path in paths]
            for file in self._files[kind]:
                _exists(file)
        names = {kind: [file.stem for file in listed] for kind, listed in self._files.items()}
        for kind, found in names.items():
            if found != names["motion"]:
                raise UserError(f"the lists of motion and {kind} in {folder} name other segments ({split}): take both from one release.")
        if data == "aist":
            self._genre = _genres(folder / f"{split}_genre{longer}.npy", names["motion"])

    def __len__(self):
        return len(self._files["motion"])

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        fps, numbers = SEGMENTS[self._data]
        frames = fps * self.seconds
        paths = {kind: [listed[i] for i in indices] for kind, listed in self._files.items()}
        taken = {
            "motion": np.stack([_numbers(file, (frames, numbers)).reshape(frames, -1, 3) for file in paths["motion"]]),
            "audio": np.stack([_loud(_whole(file, self.seconds)) for file in paths["audio"]]),
        }
        if self._data == "aist":
            taken["genre"] = self._genre[indices]
        if "video" in paths:
            taken["video"] = np.stack([_numbers(file, (2048,)) for file in paths["video"]])
        return taken

    def fingerprint(self):
        paths = [file for kind in sorted(self._files) for file in self._files[kind]]
        return digest(len(self), self._data, self.seconds, sizes(paths, self._folder))


def read_motion(path: str | os.PathLike) -> np.ndarray:
    """The joints of an AIST++ motion file, float32 [frames, joints, 3] in metres from the mean place of joint 0, at 60 fps.

    SMPL's 24, by `skeleton.joints` of smpl_poses, at smpl_trans / smpl_scaling; in a file without these COCO's 17, keypoints3d_optim or
    keypoints3d, taken to be in centimetres. Nothing but arrays is unpickled.

    Raises:
      UserError: a file that is missing, no pickle of arrays, without these entries, or of another shape.
    """
    path = files.expand(path)
    try:
        stored = read_pickled_arrays(path)
    except files.Missing:
        raise _missing(path) from None
    except files.FileError as error:
        raise UserError(f"{path} is no AIST++ motion file, a pickle of arrays (it {error.reason}): copy it again.") from error
    if "smpl_poses" in stored:
        poses = stored["smpl_poses"]
        place, scale = stored.get("smpl_trans", np.zeros((len(poses), 3))), stored.get("smpl_scaling", np.ones(1))
        if poses.size != 72 * len(poses) or place.shape != (len(poses), 3) or scale.size != 1 or not poses.size:
            found = f"{list(poses.shape)}, {list(place.shape)} and {list(scale.shape)}"
            raise UserError(f"{path}: smpl_poses, smpl_trans and smpl_scaling are [frames, 72], [frames, 3] and [1], not {found}.")
        found = joints(poses.reshape(-1, 24, 3)) + (place / scale.reshape(()))[:, None]
    else:
        name = "keypoints3d_optim" if "keypoints3d_optim" in stored else "keypoints3d"
        if name not in stored:
            raise UserError(f"{path} has neither smpl_poses nor keypoints3d: it holds {', '.join(stored) or 'nothing'}.")
        found = stored[name] / 100
        if found.ndim != 3 or found.shape[1:] != (17, 3) or not len(found):
            raise UserError(f"{path}: {name} is [frames, 17, 3], not {list(found.shape)}.")
    if not np.isfinite(found).all():
        raise UserError(f"{path} holds values that are not finite: leave this dance out, as AIST++'s ignore_list.txt does.")
    return centred(found)


def write_motion(path: str | os.PathLike, rotations: np.ndarray, place: np.ndarray) -> None:
    """Writes a motion file as AIST++ has it, from rotation vectors [frames, 24, 3] and the pelvis's path [frames, 3] in metres."""
    stored = {"smpl_poses": rotations.reshape(-1, 72), "smpl_trans": place, "smpl_scaling": np.ones(1)}
    pathlib.Path(path).write_bytes(pickle.dumps(stored))


def read_wav(path: str | os.PathLike) -> np.ndarray:
    """The samples of a wav file, float32 [samples] in [-1, 1], the mean of its channels.

    Raises:
      UserError: a file that is missing, no sound file, or of another rate than 22,050 Hz.
    """
    path = files.expand(path)
    try:
        samples, rate = media.read_sound(path)
    except files.Missing:
        raise _missing(path) from None
    except files.FileError as error:
        raise UserError(f"{path} cannot be read as a wav file (it {error.reason}): {CONVERT}.") from error
    if rate != RATE:
        raise UserError(f"{path} has {rate:,} samples a second, not {RATE:,}: {CONVERT}.")
    return np.clip(samples.mean(1), -1, 1)


def _whole(path: pathlib.Path, seconds: int) -> np.ndarray:
    """The samples of a file that lasts so many seconds, or a few frames of them less or more: padded or cut."""
    samples = read_wav(path)
    if abs(len(samples) - seconds * RATE) > RATE // 10:
        raise UserError(f"{path} lasts {len(samples) / RATE:.2f} s, not {seconds}: cut the segment again.")
    return np.pad(samples, (0, max(0, seconds * RATE - len(samples))))[: seconds * RATE]


def _loud(samples: np.ndarray) -> np.ndarray:
    """Whole blocks of samples, scaled to the peak `LOUD`; silence, that is nothing above `SILENCE`, stays as it is."""
    samples = samples[: len(samples) // TICK * TICK]
    peak = np.abs(samples).max()
    return (samples * (LOUD / peak if peak > SILENCE else 1)).astype(np.float32)


def _numbers(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of a `.npy` file, as many as `shape` has, in that shape, float32."""
    array = read_array(path)
    if array.dtype.kind not in "fiu" or array.size != np.prod(shape) or not np.isfinite(array).all():
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}, but a segment has finite numbers {list(shape)}.")
    return array.reshape(shape).astype(np.float32)


def _genres(path: pathlib.Path, names: Sequence[str]) -> np.ndarray:
    """The genres int32 [n] of a one-hot file [n, 10], which must be those that the names say."""
    _exists(path)
    hot = _numbers(path, (len(names), len(CODES)))
    genre = hot.argmax(1).astype(np.int32)
    said = [CODES.index(_parsed(name)[0]) for name in names]
    wrong = np.flatnonzero((genre != said) | (hot.sum(1) != 1))
    if wrong.size:
        raise UserError(f"{path}: row {wrong[0]} is not the one-hot genre of {names[wrong[0]]}: take it from the release of the lists.")
    return genre


def _parsed(name: str) -> tuple[str, str]:
    """The genre's code and the song of a dance."""
    found = NAME.fullmatch(name)
    if not found:
        raise UserError(f"{name} is not the name of an AIST++ dance, such as gBR_sBM_cAll_d04_mBR0_ch01.")
    return found[1], found[2]


def _lines(path: pathlib.Path) -> list[str]:
    """The lines of a list that are not empty."""
    _exists(path)
    found = files.read_names(path)
    if not found:
        raise UserError(f"{path} is empty: copy it again.")
    return found


def _exists(path: pathlib.Path) -> None:
    try:
        files.open_regular(path).close()
    except files.Missing:
        raise _missing(path) from None


def _missing(path: pathlib.Path) -> UserError:
    return UserError(f"no such file: {path} (the head of mmdiff/projects/dance/aist.py says what a folder of dances holds).")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r} of dances: choose one of {', '.join(SPLITS)}.")
