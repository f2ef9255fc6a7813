"""The tokenizer of dance music: 44,032 samples at 22,050 Hz (2 s) as 344 tokens of 512 codes, by a VQ autoencoder with Jukebox's hop.

    python -m mmdiff train  --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer
    python -m mmdiff eval   --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer
    python -m mmdiff sample --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer --given audio=FILE.wav
    python -m mmdiff cache  --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer --out runs/music_tokens

Music of AIST++ and TikTok: --config.data.name=aist (or tiktok) --config.data.dir=DIR, see mmdiff/projects/dance/aist.py.

It learns from crops of half a second. `cache` encodes every clip once, as `music` with `motion`, `genre` and `beats`, for
configs/cdcd/dance_music.py. Jukebox's own codebook is `--config.model.codes=2048 --config.model.code_size=64`; these songs, made from a few
recordings, need fewer codes.

Measured (seed 0, 200 test clips, EMA weights): waveform error 0.051 (12.9 dB), spectral error 0.277; of the reconstructions beat F1 0.980
within 50 ms (real clips 0.968, other clips' beats 0.19), genre 1.000 by a classifier that was chosen on such reconstructions (real 1.000),
squared Fréchet distance 0.133; 0.79 of the codes in use, perplexity 94. A second of any clip has an onset, so coverage and hit are 1.0
whatever is played. Cost: 0.55M parameters, five minutes on one CPU core (117 clips/s); beats and genres are there after 750 steps.
"""

from functools import partial

from ml_collections import ConfigDict

from mmdiff import Experiment, training_config
from mmdiff.data import CacheWriter, Subset, published
from mmdiff.errors import UserError
from mmdiff.experiment import reconstructing
from mmdiff.nets.audio import AudioAutoencoder, audio_loss
from mmdiff.projects.dance.aist import Segments
from mmdiff.projects.dance.dance import COUNTS, RATE, TICK, DanceMusic
from mmdiff.projects.dance.music import CLASSIFIED, MusicReconstructions
from mmdiff.projects.dance.sounds import Waveforms
from mmdiff.projects.dance.styles import GENRES
from mmdiff.training import optim

SPLITS = {"dance_music": tuple(COUNTS), "aist": ("train", "val", "test"), "tiktok": ("train", "test")}
VALIDATION = {"dance_music": "validation", "aist": "val", "tiktok": "test"}  # TikTok is published without one


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"name": "dance_music", "dir": "", "seconds": 2, "video": False},  # or aist or tiktok; video: cache its features, too
        "model": {
            "hop": 128, "codes": 512, "code_size": 16, "widths": (32, 64, 128), "encoder_blocks": (1, 1, 2), "decoder_blocks": (1, 2, 4)},
        "loss": {"crop": 86 * TICK, "waveform": 1.0, "spectral": 1.0, "windows": (2048, 512, 128), "commitment": 0.25, "revive": 1.0},
        "train": training_config(
            steps=2000, global_batch=16, ema=0.99, learning_rate=2e-3, warmup_steps=50, weight_decay=1e-4, clip=1.0,
            eval_every=0, checkpoint_every=500),
        "sample": {"steps": 1, "guidance": 1.0},
    })


def build(config):
    data = config.data
    if data.name not in SPLITS:
        raise UserError(f"config.data.name is {data.name!r}: choose one of {', '.join(SPLITS)}.")
    samples = data.seconds * RATE // TICK * TICK
    net = AudioAutoencoder(samples, **config.model)

    def clips(split):
        synthetic = data.name == "dance_music"
        return DanceMusic(split, data.seconds) if synthetic else Segments(data.dir, split, data.name, data.seconds, data.video)

    def training():  # the lists of real segments may go genre by genre
        return clips("train") if data.name == "dance_music" else Subset(clips("train"), CLASSIFIED * MusicReconstructions.count)

    return Experiment(
        **reconstructing(net, "audio"),
        modalities={name: Waveforms(samples, name=name) for name in ("audio", "reconstruction")},
        loss=audio_loss(net, **config.loss),
        optimizer=optim.adamw(config.train), data=published(clips, validation=VALIDATION[data.name], test="test"),
        evaluators=(MusicReconstructions(net, training, () if data.name == "tiktok" else GENRES, config.loss.windows),),
        cache=CacheWriter(net, {split: partial(clips, split) for split in SPLITS[data.name]}, image="audio", tokens="music"))
