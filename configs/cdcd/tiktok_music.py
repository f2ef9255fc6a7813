"""CDCD on TikTok Dance-Music, 2 s of dance to music: the network of aist_music.py on dances in the wild, the paper's setting.

    SET="--config.data.name=tiktok --config.data.dir=tiktok --config.model.codes=2048 --config.model.code_size=64"
    python -m mmdiff train  --config configs/cdcd/music_tokenizer.py --workdir runs/tiktok_tokenizer $SET
    python -m mmdiff cache  --config configs/cdcd/music_tokenizer.py --workdir runs/tiktok_tokenizer --out tokens/tiktok
    python -m mmdiff train  --config configs/cdcd/tiktok_music.py --workdir runs/tiktok_music --config.data.dir=tokens/tiktok
    python -m mmdiff eval   --config configs/cdcd/tiktok_music.py --workdir runs/tiktok_music --config.eval.segments=tiktok
    python -m mmdiff sample --config configs/cdcd/tiktok_music.py --workdir runs/tiktok_music --given motion=SEGMENT.npy
    python -m mmdiff aot    --config configs/cdcd/tiktok_music.py --topology v5e:4x4 --config.data.source=random \\
        --config.train.mesh.data=1 --config.train.mesh.fsdp=16

2,384 segments of 392 videos for training and 307 of 53 others for testing, with OpenPose's 25 joints at 30 fps and no genres: negatives
are other segments. Networks, conditions and recipe are those of aist_music.py, and so is what is ours and not the paper's. As released for
this set: T = 100, Step-Intra at 5e-5, batch 96 (released: 12 a GPU; eight GPUs are our guess), 100 epochs.

The paper's metrics for it are not known to us. This has not been trained here. By the ahead-of-time report on 16 chips of v5e: 433.8M
parameters with the dance's encoder, 4.9 GB a chip of 16.9 and a step of 21 ms at least.
"""

from aist_music import build as build
from aist_music import get_config as aist


def get_config():
    config = aist()
    config.data.name = "tiktok"
    config.dance.stride = 2  # at half the frame rate
    config.chain.steps = config.sample.steps = 100
    config.train.update(steps=2_483, global_batch=96)
    return config
