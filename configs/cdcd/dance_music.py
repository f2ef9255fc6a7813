"""CDCD from dance to music: 2 s of a moving skeleton, and its genre, to 344 tokens of sound (configs/cdcd/music_tokenizer.py).

    python -m mmdiff train  --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer
    python -m mmdiff cache  --config configs/cdcd/music_tokenizer.py --workdir runs/music_tokenizer --out runs/music_tokens
    python -m mmdiff train  --config configs/cdcd/dance_music.py --workdir runs/dance_music
    python -m mmdiff eval   --config configs/cdcd/dance_music.py --workdir runs/dance_music
    python -m mmdiff sample --config configs/cdcd/dance_music.py --workdir runs/dance_music --given motion=DANCE.pkl --given genre=house

DANCE.pkl is a motion file as AIST++ has it; a wav file is written for each sample. Without a genre it is what the dance suggests.

The dance goes through a small transformer that is trained with the network, four frames a token. Cross-attention sees these tokens and one
for the genre. Not in the paper: their mean modulates the MLPs (config.model.pooled), and the dance's tokens are added to the music at their
time (config.model.aligned): a small network that predicts which 23 ms begin with a beat learns it thus within 100 steps, while by attention
alone it had learnt nothing after 250. The paper's condition, one token for all of it, is config.dance.fused=true with
config.model.aligned=false; config.dance.freeze=true trains none of the encoder but what makes the tokens of its features, as the released
code.

Measured (seed 0, 200 test dances, EMA weights, 40 steps, guidance 1.5): onsets of the samples have F1 0.953 for the known beats, within 50
ms (0.184 for another clip's; the real music 0.968, the tokenizer's reconstructions 0.980); the genre is classified right in 0.950
(reconstructions 1.000). Beat coverage and hit, the published scores, are 0.988, and by chance as well: every second of these clips has a
beat. Fréchet distance 0.187 (reconstructions 0.133, other real clips 0.038). A second of sampling makes 3.6 s of music on one CPU core, 15
s in ten steps. Cost: 2.5M parameters, 51 minutes on one core shared with other work. Guidance, steps and rate were not tuned.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, contrastive, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Labels, network_fingerprint
from mmdiff.data.token_cache import decoder, open_tokens
from mmdiff.processes import Given, Joint, MaskReplace
from mmdiff.projects.dance.dance import DanceMusic
from mmdiff.projects.dance.motion import DanceEncoder, MotionEncoder
from mmdiff.projects.dance.music import MusicForDances
from mmdiff.projects.dance.skeleton import FPS, PARENTS
from mmdiff.projects.dance.sounds import Motion, TokenAudio
from mmdiff.projects.dance.speed import Speed
from mmdiff.projects.dance.styles import GENRES
from mmdiff.training import optim

SECONDS, LENGTH, CODES = 2, 344, 512  # of configs/cdcd/music_tokenizer.py


def get_config():
    return ConfigDict({
        "seed": 0,
        "data": {"source": "tokens", "dir": "runs/music_tokens"},  # or random
        "model": {"width": 128, "depth": 4, "heads": 4, "patch": 4, "mlp_ratio": 4.0, "pooled": True, "aligned": True},
        "dance": {"width": 128, "depth": 2, "heads": 4, "stride": 4, "fused": False, "freeze": False},
        "chain": {"steps": 80, "evidence": True},
        "dropout": {"both": 0.1, "motion": 0.05, "genre": 0.1},
        # The released weights, Step-Intra; see mmdiff.contrastive.cdcd. A contrast of weight 0 is left out.
        "loss": {"auxiliary": 5e-4, "step_intra": 5e-5, "step_inter": 0.0, "sample_intra": 0.0, "sample_inter": 0.0, "count": 10},
        "form": "linear", "temperature": 1.0,  # or weighted or infonce, of all contrasts
        "train": training_config(
            steps=2000, global_batch=32, ema=0.995, learning_rate=2e-3, warmup_steps=100, weight_decay=0.05, clip=1.0,
            eval_every=500, checkpoint_every=250),
        "sample": {"steps": 40, "guidance": 1.5, "top_p": 0.86},  # truncated as released
        "eval": {"clips": 200, "batch": 50},
    })


def build(config):
    data, steps, dance, dropout = config.data, config.chain.steps, config.dance, config.dropout
    music = MaskReplace(CODES, schedules.vqd_released(steps), config.chain.evidence)
    process = Joint(music=music, motion=Given(0.0), genre=Given(null=len(GENRES)))
    encoder = DanceEncoder(
        MotionEncoder(fps=FPS, **nets.options(dance, without=("fused", "freeze"))),
        genres=len(GENRES) + 1, fused=dance.fused, freeze=dance.freeze)
    net = nets.TokenTransformer(
        classes=CODES, grid=(1, LENGTH), modality="music", seconds=SECONDS, context=encoder.conditions, encoder=encoder,
        aligned=SECONDS * FPS // dance.stride if config.model.aligned else 0, **nets.options(config.model, without="aligned"))
    modalities = {
        "music": TokenAudio(LENGTH, CODES, decoder(data.dir)),
        "motion": Motion(SECONDS * FPS, len(PARENTS), PARENTS),
        "genre": Labels(len(GENRES), GENRES, name="genre")}
    noisy = times.importance(steps, "vlb")
    noise_levels = times.mixture(
        (1 - dropout.both - dropout.motion - dropout.genre, times.joint(music=noisy, motion=0.0, genre=0.0)),
        (dropout.both, times.joint(music=noisy, motion=1.0, genre=1.0)),
        (dropout.motion, times.joint(music=noisy, motion=1.0, genre=0.0)),
        (dropout.genre, times.joint(music=noisy, motion=0.0, genre=1.0)))
    terms = contrastive.cdcd(
        music, steps, of="music", given="motion", falling=False, form=contrastive.form(config.form, config.temperature),
        inter_negatives=contrastive.inter(config.loss.count, by="genre"), **config.loss)  # negatives of other clips are of other genres
    metrics = MusicForDances(
        modalities["music"].decode, clips=DanceMusic, training=lambda: DanceMusic("train"), genres=GENRES,
        count=config.eval.clips, batch=config.eval.batch, parents=PARENTS)
    return Experiment(
        process=process, net=net, modalities=modalities,
        loss=losses.diffusion(process, net.apply, noise_levels, terms),
        optimizer=optim.adamw(config.train, optim.all_but(encoder.FROZEN) if dance.freeze else None),
        data=lambda split: open_tokens(data, split, modalities),
        sampler={"transforms": [sampling.only("music", sampling.top_p(config.sample.top_p))]},
        frozen_deps={"tokenizer": lambda: network_fingerprint(data.dir)},
        evaluators=(metrics, Speed(given=("motion", "genre"), seconds=SECONDS, batch=config.eval.batch)))
