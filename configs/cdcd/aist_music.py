"""CDCD on AIST++, 2 s (or 6) of dance to music: 344 (1,033) tokens of 2,048 codes, the paper's setting (Zhu et al. 2023).

    SET="--config.data.name=aist --config.data.dir=aist --config.model.codes=2048 --config.model.code_size=64"
    python -m mmdiff train  --config configs/cdcd/music_tokenizer.py --workdir runs/aist_tokenizer $SET
    python -m mmdiff cache  --config configs/cdcd/music_tokenizer.py --workdir runs/aist_tokenizer --out tokens/aist
    python -m mmdiff train  --config configs/cdcd/aist_music.py --workdir runs/aist_music --config.data.dir=tokens/aist
    python -m mmdiff eval   --config configs/cdcd/aist_music.py --workdir runs/aist_music --config.eval.segments=aist
    python -m mmdiff sample --config configs/cdcd/aist_music.py --workdir runs/aist_music --given motion=SEGMENT.npy --given genre=house
    python -m mmdiff aot    --config configs/cdcd/aist_music.py --topology v5e:4x4 --config.data.source=random \\
        --config.train.mesh.data=1 --config.train.mesh.fsdp=16

The head of mmdiff/projects/dance/aist.py says what the folder of segments holds. 6 s: --config.data.seconds=6, for the tokenizer, too;
--config.data.video=true adds the features of the videos. The tokenizer is ours, in place of Jukebox's weights.

The condition is theirs, one token, a Dense of the dance's features together with the genre's and the video's, with an encoder of the dance
of our own; config.dance.fused=false gives cross-attention a token for every four frames, which says when something happens.
config.dance.freeze=true trains neither that encoder nor the genre's table, as the released code.

The recipe, as released: T = 80, Step-Intra with ten negatives (the released file has no weight for it; 5e-5 is TikTok's), an auxiliary loss
that rises from weight 5e-4 on, importance-sampled times; AdamW (0.9, 0.96) with decay 4.5e-2 on every weight, gradients clipped at 0.5 from
first to last; a rate of 2e-4, reached in 1,000 steps from 3e-6 and halved after 60,000 without progress; batch 16 (released: 2 a GPU; eight
GPUs are our guess), 100 epochs of 6,632 segments. Their average takes 0.99 every 25 steps, ours the same 0.9996 every step. Sampling starts
from masks alone, takes 80 steps and keeps the likeliest codes of total probability 0.86. Not theirs: conditions are dropped for a tenth of
the examples, so that config.sample.guidance can be above 1; activations are bfloat16; a segment's tokens are always the same, where theirs
are resampled with a random loudness. config.loss.sample_inter=5e-6 with step_intra=0 is Sample-Inter, its negatives being the music of
other genres in the batch.

For orientation, from the paper as others quote it: beat coverage 0.939 and hit 0.907 for Step-Intra on 2 s. This has not been trained
here. By the ahead-of-time report on 16 chips of v5e: 434.8M parameters with the dance's encoder, 1.3 GB a chip of 16.9 and a step of
20 ms at least, which the links bound: there is one segment a chip.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, contrastive, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Features, Labels, Subset, network_fingerprint, published
from mmdiff.data.token_cache import decoder, open_tokens
from mmdiff.processes import Given, Joint, MaskReplace
from mmdiff.projects.dance.aist import SEGMENTS, Segments
from mmdiff.projects.dance.dance import RATE, TICK
from mmdiff.projects.dance.motion import DanceEncoder, MotionEncoder
from mmdiff.projects.dance.music import CLASSIFIED, MusicForDances
from mmdiff.projects.dance.sounds import Motion, TokenAudio
from mmdiff.projects.dance.styles import GENRES
from mmdiff.training import optim

CODES, VIDEO = 2048, 2048
VALIDATION = {"aist": "val", "tiktok": "test"}  # TikTok is published without a split for validation
NETWORKS = {("aist", 2): "aist_2s", ("aist", 6): "aist", ("tiktok", 2): "tiktok"}


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"source": "tokens", "dir": "", "name": "aist", "seconds": 2, "video": False},  # or random
        "model": {"width": 1024, "depth": 19, "heads": 16, "dtype": "bfloat16", "remat": "auto", "scan": True},
        "dance": {"width": 1024, "depth": 2, "heads": 16, "stride": 4, "fused": True, "freeze": False},
        "chain": {"steps": 80, "evidence": False}, "dropout": 0.1,
        # The released weights, Step-Intra; see mmdiff.contrastive.cdcd. A contrast of weight 0 is left out.
        "loss": {"auxiliary": 5e-4, "step_intra": 5e-5, "step_inter": 0.0, "sample_intra": 0.0, "sample_inter": 0.0, "count": 10},
        "form": "linear", "temperature": 1.0,  # or weighted or infonce, of all contrasts
        "train": training_config(
            steps=41_450, global_batch=16, ema=0.9996, eval_every=2000, log_every=100,
            learning_rate=2e-4, warmup_steps=1000, patience=60_000, weight_decay=4.5e-2, clip=0.5),
        "sample": {"steps": 80, "guidance": 1.0, "top_p": 0.86},
        # Held-out ones that are measured, evenly spread over all of them; segments: their own folder, for the real music.
        "eval": {"examples": 512, "segments": "", "batch": 64},
    })


def build(config):
    data, steps, dance, count = config.data, config.chain.steps, config.dance, config.eval.examples
    fps, numbers = SEGMENTS[data.name]
    genres = GENRES if data.name == "aist" else ()  # TikTok has none
    model = nets.options(config.model)
    computed = {name: model[name] for name in ("dtype", "remat", "scan")}
    motion = MotionEncoder(fps=fps, **nets.options({**dance, **computed}, without=("fused", "freeze")))
    encoder = DanceEncoder(
        motion, genres=len(genres) + 1 if genres else 0, video=data.video, dtype=model["dtype"], fused=dance.fused, freeze=dance.freeze)
    net = nets.cdcd(
        NETWORKS[data.name, data.seconds], modality="music", context=encoder.conditions, encoder=encoder, times=steps, **model)
    modalities = {
        "music": TokenAudio(data.seconds * RATE // TICK, CODES, decoder(data.dir) if data.dir else None),
        "motion": Motion(data.seconds * fps, numbers // 3),
        **({"genre": Labels(len(genres), genres, name="genre")} if genres else {}),
        **({"video": Features(VIDEO, name="video")} if data.video else {})}
    music = MaskReplace(CODES, schedules.vqd_released(steps), config.chain.evidence)
    process = Joint(music=music, **{name: Given(len(genres) if name == "genre" else 0.0) for name in encoder.conditions})
    noise_levels = times.conditional(*encoder.conditions, dropout=config.dropout, music=times.importance(steps, "vlb"))
    terms = contrastive.cdcd(
        music, steps, of="music", given="motion", falling=False, form=contrastive.form(config.form, config.temperature),
        inter_negatives=contrastive.inter(config.loss.count, by="genre" if genres else "motion"), **config.loss)

    def clips(split, count=count):
        split = {"validation": VALIDATION[data.name]}.get(split, split)
        return Subset(Segments(config.eval.segments, split, data.name, data.seconds), count)

    metrics = MusicForDances(
        modalities["music"].decode, clips=clips, training=lambda: clips("train", CLASSIFIED * count), genres=genres,
        given=tuple(encoder.conditions), count=count, batch=config.eval.batch)
    return Experiment(
        process=process, net=net, modalities=modalities,
        loss=losses.diffusion(process, net.apply, noise_levels, terms),
        optimizer=optim.vq_diffusion(config.train, optim.all_but(encoder.FROZEN) if dance.freeze else None),
        data=published(lambda split: open_tokens(data, split, modalities), count, VALIDATION[data.name], "test"),
        sampler={"transforms": [sampling.only("music", sampling.top_p(config.sample.top_p))]},
        frozen_deps={"tokenizer": lambda: network_fingerprint(data.dir)},
        evaluators=(metrics,) if config.eval.segments else ())
