"""What is measured of music: its beats, its genre to a classifier that heard real clips only, and a Fréchet distance to real clips.

Clips are {"audio": [n, samples], "beats": [n, most], "genre": [n]}. Real dances have no known beats, and the onsets of the real music stand
in for them; some have no genres, and nothing is said of these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from mmdiff.data.network_cache import map_batched, part_of
from mmdiff.data.sources import Source, Subset, load_all
from mmdiff.errors import UserError, import_extra
from mmdiff.evals.evaluator import Clock, EvalResult, Figure, sample_batched
from mmdiff.evals.frechet import frechet_distance
from mmdiff.nets.audio import AudioAutoencoder, spectral_error
from mmdiff.nets.tokenizers import usage
from mmdiff.projects.dance import clip_plots
from mmdiff.projects.dance.beats import RATE, TOLERANCE, beat_scores, onsets, times
from mmdiff.projects.dance.sounds import wav

BANDS = 32
QUIETEST = -30.0  # dB from the clip's loudest
CLASSIFIED = 5  # training clips that the classifier learns from, for each that is measured
FEATURES = f"mean and deviation in time of {BANDS} log-mel bands (not below {QUIETEST:g} dB of the clip's loudest)"


def timbre(audio: np.ndarray) -> np.ndarray:
    """Features that know no tempo, no place in time and no loudness: music [n, samples] -> [n, 64], see `FEATURES`; in 10 dB."""
    librosa = import_extra("librosa", "audio")

    found = []
    for some in np.array_split(np.asarray(audio, np.float32), -(-len(audio) // 50)):
        power = librosa.feature.melspectrogram(y=some, sr=RATE, n_fft=1024, hop_length=512, n_mels=BANDS)
        levels = np.log10(np.maximum(power, 1e-9))
        levels = np.maximum(levels - levels.max((1, 2), keepdims=True), QUIETEST / 10)
        found.append(np.concatenate([levels.mean(-1), levels.std(-1)], -1))
    return np.concatenate(found)


class Listener:
    """Judges music by real clips, and has heard those only: `genre(audio) -> int [n]` by linear discriminants of `timbre`, and `metrics`.

    With shrunk covariances these bear what a tokenizer does to all music alike; an SVM on the same features does not.

    Args:
      clips: what it learns from.
    """

    def __init__(self, clips: Mapping[str, np.ndarray]):
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        self._classify = None
        if "genre" in clips:
            self._classify = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(timbre(clips["audio"]), clips["genre"])

    def genre(self, audio: np.ndarray) -> np.ndarray:
        """The genres it hears."""
        return self._classify.predict(timbre(audio))

    def metrics(self, audio: np.ndarray, real: Mapping[str, np.ndarray], suffix: str = "") -> dict[str, float]:
        """Beats, genre and distance of music for the dances of real clips; names end in `suffix`."""
        features = timbre(audio)
        found = {**beat_scores(audio, real["audio"], real.get("beats")), "frechet_audio": frechet_distance(features, timbre(real["audio"]))}
        if self._classify is not None:
            found["genre_accuracy"] = float((self._classify.predict(features) == real["genre"]).mean())
        return {name + suffix: value for name, value in found.items()}


def heard_before(source: Source, count: int, genres: Sequence[str]) -> dict[str, np.ndarray]:
    """The training clips with which `count` others are compared.

    Where genres are to be learnt, the first `CLASSIFIED` times as many: genres come in turn, and clips at equal distances could miss some
    of them. Else `count`, evenly spread.

    Raises:
      UserError: genres, and clips that have none.
    """
    if not genres:
        return {name: array for name, array in load_all(Subset(source, count)).items() if name != "genre"}
    found = source.take(np.arange(min(CLASSIFIED * count, len(source))))
    if "genre" not in found:
        raise UserError(f"the genres {', '.join(genres)} are to be classified, and the training clips have none.")
    return found


def definitions(count: int, suffix: str = "", what: str = "samples", known: bool = True) -> dict[str, str]:
    """What the `Listener.metrics` of `count` clips are, whose beats are `known` or those of the real music."""
    found = {
        "beat_coverage": f"seconds with an onset, over those of the real music; {count} {what}",
        "beat_hit": f"share of the real music's seconds with an onset in which the {what} have one too",
        "beat_f1": f"F1 of the {what}' onsets for the {'known beats' if known else 'onsets of the real music'}, within "
        f"{1000 * TOLERANCE:g} ms and one to one",
        "genre_accuracy": f"share of the {what} in which linear discriminants learnt from real training clips find the right genre",
        "frechet_audio": f"squared Fréchet distance of the {what} to the real clips; features: {FEATURES}, in 10 dB; of fewer than some "
        "200 clips mostly bias",
    }
    chance = {f"{name}_shuffled": f"{name}{suffix} against other clips' music and beats: the level of chance" for name in list(found)[:3]}
    return {name + suffix: note for name, note in {**found, **chance}.items()}


@dataclasses.dataclass(frozen=True)
class MusicForDances:
    """The metrics and figures of a model that samples music for dances; with each metric that of its tokenizer's reconstructions,
    the ceiling, and that of the real clips.

    Attributes:
      decode: sampled tokens -> music [n, samples], `data.token_cache.decoder(FOLDER)`.
      clips: `split -> source` of the held-out clips' real audio and, as far as known, genre and beats, in the order of the experiment's
        `test_data`; the split is the experiment's, "test" or "validation".
      training: `() -> source` of real training clips with audio and, where there are `genres`, genres that come in turn.
      genres: their names, if there are any.
      given: the modalities of a clip that the model is given.
      sampled: the tokens' name.
      count: clips.
      batch: examples in a call of the sampler.
      parents: the joints' parents, for a figure of the dance from `motion`.
    """

    decode: Callable[[np.ndarray], np.ndarray]
    clips: Callable[[str], Source]
    training: Callable[[], Source]
    genres: Sequence[str]
    given: tuple[str, ...] = ("motion", "genre")
    sampled: str = "music"
    count: int = 200
    batch: int = 50
    parents: Sequence[int] = ()

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        return self.samples(experiment, params, key, int(config.sample.steps), float(config.sample.guidance))

    def samples(self, experiment, params, key, steps: int, guidance: float) -> EvalResult:
        """All of it depends on the sampler."""
        known, clips = experiment.test_data(), self.clips(experiment.split)
        if len(known) != len(clips):
            raise UserError(f"music is measured on the clips sampled for: {len(clips)} real clips do not fit {len(known)} examples.")
        known, real = load_all(Subset(known, self.count)), load_all(Subset(clips, self.count))
        for name in ("genre", "motion"):
            # Made-up dances are computed again, and another processor may round them otherwise.
            if name in known and name in real and not np.allclose(known[name], real[name], rtol=0, atol=1e-4):
                raise UserError(f"music is measured on the clips that are sampled for: the {name} of the real clips is not the examples'.")
        count, clock = len(real["audio"]), Clock()
        clock.start("classifier", "learning the genres from real clips")
        training = heard_before(self.training(), self.count, self.genres)
        listener = Listener(training)
        clock.start("sampling", f"sampling music for {count} dances in {steps} steps")
        given = {name: known[name] for name in self.given}
        sampled = sample_batched(experiment, params, key, given, count, batch=self.batch, steps=steps, guidance=guidance)[self.sampled]
        clock.start("listening", "looking for beats and genres")
        heard = {
            "": np.clip(self.decode(sampled), -1, 1),
            "_reconstructed": np.clip(self.decode(known[self.sampled]), -1, 1),
            "_real": real["audio"],
        }
        metrics, about = {}, {}
        for (suffix, audio), what in zip(heard.items(), ("samples", "reconstructions", "real clips")):
            metrics |= listener.metrics(audio, real, suffix)
            about |= definitions(count, suffix, what, "beats" in real)
        others = np.random.Generator(np.random.Philox(0)).permutation(len(training["audio"]))[:count]  # neighbours can be of one dance
        metrics["frechet_audio_real"] = frechet_distance(training["audio"][others], real["audio"], timbre)
        about["frechet_audio_real"] = f"the same for {count} real training clips: as near as other music gets"
        clock.stop()
        sampler = f"{steps} steps, guidance {guidance:g}"
        shown = {"sampled": heard[""], "reconstructed": heard["_reconstructed"], "real": real["audio"]}
        settings = {
            "sample_steps": steps,
            "guidance": guidance,
            "clips": count,
            "beat_tolerance_seconds": TOLERANCE,
            "classifier": f"linear discriminants of {FEATURES}, learnt from {len(training['audio'])} real clips" if self.genres else "none",
            "frechet_features": FEATURES,
            "evaluation_seconds": clock.seconds,
        }
        return EvalResult(metrics, about, clip_figures(shown, real, self.genres, self.parents, sampler), settings)


@dataclasses.dataclass(frozen=True)
class MusicReconstructions:
    """The metrics and figures of an `AudioAutoencoder` on held-out clips: what its tokens keep is the ceiling for music that is sampled.

    Attributes:
      net: the network.
      training: `() -> source` as of `MusicForDances`.
      genres: their names, if there are any.
      windows: the windows of the spectral error, in samples.
      count: clips.
    """

    net: AudioAutoencoder
    training: Callable[[], Source]
    genres: Sequence[str]
    windows: Sequence[int]
    count: int = 200

    def __call__(self, experiment, params, config, key, step) -> EvalResult:
        clock = Clock()
        clock.start("classifier", "learning the genres from real clips")
        real = load_all(Subset(experiment.test_data(), self.count))
        listener = Listener(heard_before(self.training(), self.count, self.genres))
        count = len(real["audio"])
        clock.start("reconstructions", f"encoding and decoding {count} clips")
        encode, decode = (jax.jit(lambda x, method=method: self.net.apply(params, x, method=method)) for method in ("encode", "decode"))
        ids = map_batched(encode, real["audio"], part_of(self.net))
        audio = map_batched(decode, ids, part_of(self.net))
        share, perplexity = usage(np.bincount(ids.reshape(-1), minlength=self.net.codes))
        lost = float(((audio - real["audio"]) ** 2).sum() / (real["audio"] ** 2).sum())
        error = jax.jit(lambda a, b: spectral_error(a, b, self.windows))
        own = ("genre_accuracy", "beat_f1", "beat_f1_shuffled")
        of_real = {f"{name}_real": value for name, value in listener.metrics(real["audio"], real).items() if name in own}
        metrics = {
            "waveform_error": lost,
            "waveform_snr": -10 * math.log10(max(lost, 1e-12)),
            "spectral_error": float(np.mean([error(audio[i : i + 1], real["audio"][i : i + 1]) for i in range(count)])),
            "codebook_usage": float(share),
            "codebook_perplexity": float(perplexity),
            **listener.metrics(audio, real),
            **of_real,
        }
        clock.stop()
        known = "beats" in real
        about = definitions(count, what="reconstructions", known=known) | definitions(count, "_real", "real clips", known)
        about |= {
            "waveform_error": f"squared error as a share of the music's power; {count} held-out clips",
            "waveform_snr": "the same in decibels",
            "spectral_error": f"mean over clips and windows of {', '.join(map(str, self.windows))} samples of the magnitudes' relative "
            "error plus the mean absolute error of their logarithms",
            "codebook_usage": f"share of the {self.net.codes} codes that occur in the tokens of these clips",
            "codebook_perplexity": "exp(entropy) of the codes' frequencies in them, in nats: as many equally frequent codes say as much",
        }
        shown = clip_figures({"reconstructed": audio, "real": real["audio"]}, real, self.genres)
        settings = {
            "clips": count,
            "beat_tolerance_seconds": TOLERANCE,
            "classifier": f"linear discriminants of {FEATURES}" if self.genres else "none",
            "frechet_features": FEATURES,
            "evaluation_seconds": clock.seconds,
        }
        return EvalResult(metrics, about, shown, settings)


def clip_figures(
    music: Mapping[str, np.ndarray],
    clips: Mapping[str, np.ndarray],
    genres: Sequence[str],
    parents: Sequence[int] = (),
    sampler: str = "",
    count: int = 4,
) -> dict[str, Figure]:
    """A figure with players for each of some clips: dance, waveforms with onsets and known beats, spectrograms.

    Args:
      music: name -> [n, samples], one row of a figure each.
      clips: `genre` and `beats` of the same clips, as far as known, and `motion` [n, frames, joints, 3] where there are `parents`.
      genres: the genres' names, if there are any.
      parents: every joint's parent.
      sampler: words for the caption.
      count: how many figures, of the first clips.
    """
    shown, first = {}, slice(count)
    found = {name: times(onsets(audio[first])) for name, audio in music.items()}
    for i in range(min(count, len(clips["audio"]))):
        rows = {name: (audio[i], found[name][i]) for name, audio in music.items()}
        motion = clips["motion"][i] if len(parents) else None
        beats = clips["beats"][i][clips["beats"][i] >= 0] if "beats" in clips else ()
        shown[f"Clip {i + 1}" + (f": {genres[int(clips['genre'][i])]}" if genres else "")] = Figure(
            clip_plots.music(rows, RATE, beats, motion, parents),
            "The first held-out clips, none chosen. Dots: onsets." + (" Lines: known beats." if len(beats) else "")
            + (f" Sampled in {sampler}." if sampler else ""),
            {name: wav(audio, RATE) for name, (audio, _) in rows.items()},
        )  # fmt: skip
    return shown
