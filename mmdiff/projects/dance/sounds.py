"""How a person writes and sees sounds and dances: modalities as those of `data.modalities`, which also `write` sounds as files."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import wave
from collections.abc import Callable, Sequence

import numpy as np

from mmdiff import files
from mmdiff.data import media
from mmdiff.data.arrays import read_array
from mmdiff.data.modalities import finite_floats, span
from mmdiff.data.token_modalities import DiscreteModality, decoded
from mmdiff.errors import UserError, import_extra


@dataclasses.dataclass(frozen=True)
class Waveforms:
    """Sound: float32 [n, samples] in [-1, 1], one channel.

    Attributes:
      samples: of an example.
      rate: samples a second.
      name: the modality's name, which is its key in an `.npz` file.
    """

    samples: int
    rate: int = 22_050
    name: str = "audio"

    @property
    def shape(self) -> tuple[int]:
        """The shape of one example."""
        return (self.samples,)

    def parse(self, text: str) -> np.ndarray:
        """The beginning of a sound file (wav, flac, ogg, mp3), or the samples in a `.npy`/`.npz` file: float32 [n, samples].

        Channels are mixed, the rate is converted, and what a sound file lacks is silent.

        Raises:
          UserError: a file that is missing or is neither, or what `check` refuses.
        """
        path = files.expand(text)
        if path.suffix.lower() in files.ARRAY_SUFFIXES:
            return self.check(np.atleast_2d(read_array(path, self.name)))
        sound, rate = media.read_sound(path)
        librosa = import_extra("librosa", "audio")

        sound = librosa.resample(sound.mean(1), orig_sr=rate, target_sr=self.rate)[: self.samples]
        sound = np.clip(sound, -1, 1)  # compressed sound comes back a little louder
        return self.check(np.pad(sound, (0, self.samples - len(sound)))[None])

    def check(self, array) -> np.ndarray:
        """`array` as float32 [n, samples].

        Raises:
          UserError: a wrong shape, values that are not finite or outside [-1, 1].
        """
        array = np.asarray(array)
        if array.ndim != 2 or array.shape[1:] != self.shape or array.dtype.kind != "f":
            raise UserError(f"{self.name}: sounds are floats of the shape [n, {self.samples}], not {array.dtype} {list(array.shape)}.")
        if not array.size or not np.isfinite(array).all() or np.abs(array).max() > 1:
            raise UserError(f"{self.name}: samples must be numbers in [-1, 1], got {span(array)}.")
        return array.astype(np.float32)

    def show(self, array) -> np.ndarray:
        """Spectrograms, low tones at the bottom, black at -60 dB of the loudest: uint8 [n, 128, windows, 1]."""
        librosa = import_extra("librosa", "audio")

        power = librosa.feature.melspectrogram(y=np.asarray(array, np.float32), sr=self.rate, n_fft=1024, hop_length=256)
        power = power / np.maximum(power.max((1, 2), keepdims=True), 1e-12)
        levels = 1 + np.log10(np.maximum(power, 1e-6)) / 6
        return np.rint(255 * levels[:, ::-1, :, None]).astype(np.uint8)

    def write(self, array, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes one wav file per sound, FOLDER/audio_0.wav and so on, by the modality's name; -> their paths."""
        return write_wavs(np.asarray(array), self.rate, folder, self.name)

    def random(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """White noise: float32 [count, samples]."""
        return rng.uniform(-1, 1, (count, *self.shape)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Motion:
    """Dances: float32 [n, frames, joints, 3], in metres from the mean place of joint 0, y up.

    Attributes:
      frames, joints: the size; 120 and SMPL's 24 for 2 s of AIST++.
      parents: the joint that each is linked to in an image, -1 for none; without them joints are dots.
      name: the modality's name, which is its key in an `.npz` file.
    """

    frames: int
    joints: int
    parents: Sequence[int] | None = None
    name: str = "motion"

    SIDE = 64  # pixels of a figure in an image,
    REACH = 1.25  # metres from its centre to its border,
    FIGURES = 6  # and how many make up an image

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one example."""
        return self.frames, self.joints, 3

    def parse(self, text: str) -> np.ndarray:
        """The beginning of the dance in a motion file as AIST++ has it (`.pkl`), or the dances in a `.npy`/`.npz` file.

        Raises:
          UserError: a file that is missing or is neither, a dance that is too short or has other joints.
        """
        path = files.expand(text)
        if path.suffix.lower() in files.ARRAY_SUFFIXES:
            array = read_array(path, self.name)
            if array.ndim == 2 and array.shape == (self.frames, 3 * self.joints):  # a released segment
                array = array.reshape(self.shape)
            return self.check(array[None] if array.ndim == 3 else array)
        from mmdiff.projects.dance import aist, skeleton

        if path.suffix.lower() != ".pkl":
            raise UserError(f"{self.name}: give a dance as a motion file of AIST++ (.pkl) or in a .npy or .npz file, not {path}.")
        motion = aist.read_motion(path)
        if len(motion) < self.frames or motion.shape[1] != self.joints:
            found = f"{len(motion)} frames of {motion.shape[1]} joints"
            raise UserError(f"{path} has {found}, but the model needs {self.frames} (at {skeleton.FPS} a second) of {self.joints}.")
        return skeleton.centred(motion[: self.frames])[None]

    def check(self, array) -> np.ndarray:
        """`array` as float32 [n, frames, joints, 3].

        Raises:
          UserError: a wrong shape or type, or values that are not finite.
        """
        array = np.asarray(array)
        if array.ndim != 4 or array.shape[1:] != self.shape:
            raise UserError(f"{self.name}: dances need the shape [n, {self.frames}, {self.joints}, 3], got {list(array.shape)}.")
        if not finite_floats(array):
            raise UserError(f"{self.name}: dances must be finite floats, got {span(array)}.")
        return array.astype(np.float32)

    def show(self, array) -> np.ndarray:
        """The dancer from the front at some frames, from left to right: uint8 [n, 64, 384, 3]."""
        from PIL import Image, ImageDraw

        array, size = np.nan_to_num(np.asarray(array, np.float64)), (self.FIGURES * self.SIDE, self.SIDE)
        images = []
        for dance in array[:, np.linspace(0, self.frames - 1, self.FIGURES).astype(int)]:
            image = Image.new("RGB", (4 * size[0], 4 * size[1]), "white")  # four times as large: lines have smooth edges
            draw = ImageDraw.Draw(image)
            for number, figure in enumerate(dance):
                x, y = 4 * self.SIDE * (figure[:, :2] * (1, -1) / self.REACH + 1).clip(-1, 3).T / 2
                points = list(zip(x + 4 * self.SIDE * number, y))
                for joint, (right, down) in enumerate(points):
                    if self.parents is not None and self.parents[joint] >= 0:
                        draw.line([points[self.parents[joint]], (right, down)], fill="black", width=6)
                    draw.ellipse([right - 4, down - 4, right + 4, down + 4], fill="crimson")
            images.append(np.asarray(image.resize(size, Image.Resampling.BOX)))
        return np.stack(images)

    def random(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Joints of normal places, 0.3 m from the centre: float32 [count, frames, joints, 3]."""
        return 0.3 * rng.standard_normal((count, *self.shape), np.float32)


@dataclasses.dataclass(frozen=True)
class TokenAudio(DiscreteModality):
    """Sounds as tokens: int32 [n, length] in 0..states-1.

    Attributes:
      length, states: tokens in a sound, and values of a token.
      decode: tokens [n, length] -> sounds [n, samples] in [-1, 1], as of a VQ autoencoder. By default a token is 128 equal samples, 0 being
        -1 and states - 1 being 1.
      rate: samples a second.
      name: the modality's name, which is its key in an `.npz` file.
    """

    length: int
    states: int
    decode: Callable[[np.ndarray], np.ndarray] | None = None
    rate: int = 22_050
    name: str = "music"

    @property
    def shape(self) -> tuple[int]:
        """The shape of one example."""
        return (self.length,)

    def parse(self, text: str) -> np.ndarray:
        """The tokens in a `.npy`/`.npz` file: int32 [n, length].

        Raises:
          UserError: a file that is missing or is neither, or what `check` refuses.
        """
        path = files.expand(text)
        if path.suffix.lower() not in files.ARRAY_SUFFIXES:
            raise UserError(f"{self.name}: give tokens in a .npy or .npz file, integers [n, {self.length}], not {path}.")
        return self.check(np.atleast_2d(read_array(path, self.name)))

    def sounds(self, array) -> np.ndarray:
        """Tokens -> sounds, float32 [n, samples] in [-1, 1]. An id beyond the tokens (a mask) counts as the last of them."""
        found = decoded(array, self.states, self.decode)
        return np.repeat(found, 128, axis=1) if self.decode is None else found

    def show(self, array) -> np.ndarray:
        """Spectrograms, as of `Waveforms`: uint8 [n, 128, windows, 1]."""
        sounds = self.sounds(array)
        return Waveforms(sounds.shape[1], self.rate).show(sounds)

    def write(self, array, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes one wav file per sound, FOLDER/music_0.wav and so on, by the modality's name; -> their paths."""
        return write_wavs(self.sounds(array), self.rate, folder, self.name)


def wav(sound: np.ndarray, rate: int) -> bytes:
    """The bytes of a wav file, 16 bits, one channel, of samples [n] in [-1, 1]; what is beyond is clipped."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes(np.rint(np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def write_wavs(sounds: np.ndarray, rate: int, folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Writes FOLDER/NAME_0.wav and so on; -> their paths."""
    paths = [folder / f"{name}_{number}.wav" for number in range(len(sounds))]
    for path, sound in zip(paths, sounds):
        path.write_bytes(wav(sound, rate))
    return paths
