"""The tokenizer of dance music: 44,032 samples at 22,050 Hz (2 s) as 344 tokens of 512 codes, by a VQ autoencoder with Jukebox's hop.

    python -m mmdiff train  --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer
    python -m mmdiff eval   --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer
    python -m mmdiff sample --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer --given audio=FILE.wav
    python -m mmdiff cache  --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer --out runs/music_tokens

Music of AIST++ and TikTok: --config.data.name=aist (or tiktok) --config.data.dir=DIR, see mmdiff/projects/dance/aist.py.

It learns from crops of half a second. `cache` encodes every clip once, as `music` with `motion`, `genre` and `beats`, for
configs/cdcd/dance_music.py. Jukebox's own codebook is `--config.model.codes=2048 --config.model.code_size=64`; these songs, made from a few
recordings, need fewer codes.

Measured before the validation split (seed 0, 200 held-out clips, EMA weights): waveform error 0.052 (12.8 dB), spectral error 0.280; of the
reconstructions beat F1 0.983 within 50 ms (real clips 0.968, other clips' beats 0.19), genre 1.000 by a classifier that was chosen on such
reconstructions (real 1.000), squared Fréchet distance 0.147; 0.80 of the codes in use, perplexity 91. A second of any clip has an onset, so
coverage and hit are 1.0 whatever is played. Cost: 0.55M parameters, 45 minutes on cores shared with other work (0.27 s a step of one CPU
core); beats and genres are there after 750 steps.
"""

import optax
from ml_collections import ConfigDict

from mmdiff.data.network_cache import CacheWriter
from mmdiff.data.sources import Subset
from mmdiff.errors import UserError
from mmdiff.experiment import Experiment, reconstructing
from mmdiff.nets.audio import AudioAutoencoder, audio_loss
from mmdiff.projects.dance.aist import Segments
from mmdiff.projects.dance.dance import COUNTS, RATE, TICK, DanceMusic
from mmdiff.projects.dance.music import CLASSIFIED, MusicReconstructions
from mmdiff.projects.dance.sounds import Waveforms
from mmdiff.projects.dance.styles import GENRES

SPLITS = {"dance_music": tuple(COUNTS), "aist": ("train", "val", "test"), "tiktok": ("train", "test")}
VALIDATION = {"dance_music": "validation", "aist": "val", "tiktok": "test"}  # TikTok is published without one


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"name": "dance_music", "dir": "", "seconds": 2, "video": False},  # or aist or tiktok; video: cache its features, too
        "model": {
            "hop": 128, "codes": 512, "code_size": 16, "widths": (32, 64, 128), "encoder_blocks": (1, 1, 2), "decoder_blocks": (1, 2, 4)},
        "loss": {"crop": 86 * TICK, "waveform": 1.0, "spectral": 1.0, "windows": (2048, 512, 128), "commitment": 0.25, "revive": 1.0},
        "train": {
            "steps": 2000, "global_batch": 16, "microbatches": 1, "ema": 0.99, "start": "",
            "learning_rate": 2e-3, "warmup_steps": 50, "weight_decay": 1e-4, "clip": 1.0,
            "log_every": 50, "eval_every": 0, "checkpoint_every": 500, "keep": 2, "best": "", "prefetch": 4, "tensorboard": True,
            "mesh": {"slices": 1, "data": -1, "fsdp": 1, "seq": 1, "tensor": 1},
        },
        "sample": {"steps": 1, "guidance": 1.0},
    })


def build(config):
    data, train = config.data, config.train
    if data.name not in SPLITS:
        raise UserError(f"config.data.name is {data.name!r}: choose one of {', '.join(SPLITS)}.")
    samples = data.seconds * RATE // TICK * TICK
    net = AudioAutoencoder(samples, **config.model)

    def clips(split):
        own = data.name == "dance_music"
        return DanceMusic(split, data.seconds) if own else Segments(data.dir, split, data.name, data.seconds, data.video)

    splits = {split: lambda split=split: clips(split) for split in SPLITS[data.name]}

    # The lists of real segments may go genre by genre.
    training = splits["train"] if data.name == "dance_music" else lambda: Subset(splits["train"](), CLASSIFIED * MusicReconstructions.count)
    judged = MusicReconstructions(net, training, () if data.name == "tiktok" else GENRES, config.loss.windows)
    rate = optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, train.warmup_steps, max(train.steps, train.warmup_steps + 1))
    return Experiment(
        **reconstructing(net, "audio"),
        loss=audio_loss(net, **config.loss),
        optimizer=optax.chain(
            optax.clip_by_global_norm(train.clip), optax.adamw(rate, b2=0.99, weight_decay=train.weight_decay)),
        train_data=splits["train"],
        validation_data=splits[VALIDATION[data.name]],
        test_data=splits["test"],
        modalities={name: Waveforms(samples, name=name) for name in ("audio", "reconstruction")},
        evaluators=(judged,),
        cache=CacheWriter(net, splits, image="audio", tokens="music"),
    )
