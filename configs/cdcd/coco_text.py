"""CDCD on COCO 256x256 given a caption: 32x32 tokens of 2,887 codes, the paper's setting (Zhu et al. 2023).

    ENCODERS="--config.encoder.path=weights/vqgan_gumbel_f8_8192.ckpt --config.text_encoder.path=weights/clip-vit-base-patch32"
    SET="--config.data.set=coco_captions --config.data.images=tfds"
    python -m mmdiff cache  --config configs/cdcd/coco_text.py --out tokens/coco $ENCODERS $SET
    python -m mmdiff train  --config configs/cdcd/coco_text.py --workdir runs/coco_text $ENCODERS --config.data.dir=tokens/coco
    python -m mmdiff sample --config configs/cdcd/coco_text.py --workdir runs/coco_text --given text="a cat on a red sofa"
    python -m mmdiff aot    --config configs/cdcd/coco_text.py --topology v5e:4x4 --config.data.source=random

As in the paper the tokens are those of taming-transformers' VQGAN of OpenImages with 8,192 codes (vqgan_gumbel_f8, last.ckpt; MIT), and the
text is the states of CLIP's frozen tower, each normalised, of all 77 positions: weights/clip-vit-base-patch32 is the folder of
"openai/clip-vit-base-patch32" (MIT, with a statement of use in its card). Of the codes the 2,887 that the training images use most are
kept, and all others become the nearest of these; config.encoder.codes=taming_vqvae_2887.pt is the authors' list instead, which maps all
others to one class and which published weights need. Theirs are sampled where ours are the likeliest. The cache has tokens and states of
every caption: 81 KiB each, 34 GB of COCO.

Without CLIP, --config.text.published=false trains a text encoder of its size (12 layers, 512 wide, 77 tokens, each normalised) with the
network, on the training captions, and both encoders may be one's own:

    OWN="--config.data.name=coco_captions --config.data.dir=tfds"
    python -m mmdiff train  --config configs/cdcd/images_tokenizer.py --workdir runs/coco_tokenizer $OWN
    python -m mmdiff cache  --config configs/cdcd/images_tokenizer.py --workdir runs/coco_tokenizer --out tokens/coco_own
    python -m mmdiff train  --config configs/cdcd/coco_text.py --workdir runs/coco_own --config.data.dir=tokens/coco_own \\
        --config.text.published=false

`mmdiff convert --as vq-diffusion` takes the published networks of VQ-Diffusion and CDCD of these tokens; VQ-Diffusion-B is
config.chain.steps=100 and config.model.depth=19, width=1024, mlp_ratio=4 and conv=false.

The recipe, as released: Step-Intra with ten negatives, importance-sampled times, auxiliary weight 5e-4; AdamW (0.9, 0.96) with decay
4.5e-2 on every weight, gradients clipped at 0.5 from first to last; a rate of 2e-4, reached in 1,000 steps from 3e-6 and halved after
60,000 without progress; batch 32 (released: 4 a GPU; eight GPUs are our guess), 100 epochs of 414,000 captions. Their average takes 0.99
every 25 steps, ours the same 0.9996 every step. Sampling takes 80 steps and keeps the likeliest classes of total probability 0.85. Not
theirs: captions are dropped for a tenth of the examples, so that config.sample.guidance can be above 1, and activations are bfloat16.
config.loss.sample_inter=5e-6 with step_intra=0 is Sample-Inter, its negatives being others of the batch.

For orientation, from a paper: VQ-Diffusion-S, a network of this size without the contrast but with 100 steps, their tokenizer and CLIP,
has FID 30.17 by 30,000 samples (Gu et al. 2022). This has not been trained here; its cost is unknown. FID is measured of a set of samples,
as in configs/imagenet256/README.md.

By the ahead-of-time report, 35.8M parameters: 4 captions a chip of v6e, the batch of 32 on a 2x4, take 1.3 GB of 33.5 and a step of 3.9 ms
at least (6.3 GB of main memory, 25 % of the peak at most; 14 ms by the compiler's own time and links, kernels of attention excepted); one a
chip of 64 v5e (config.train.global_batch=64; or mesh.tensor=2, which splits the heads) 0.8 GB of 16.9 and 3.4 ms (34 %; 16 ms). Before
attention had kernels for TPUs two captions on one v5e moved 42.9 GB, 52 ms at least. With a text encoder of its own, 99.0M parameters, and
without the kernels: 6.8 GB a chip of 16 v5e, 53 ms at least.
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, contrastive, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import EncodedCache, EncodedTexts, EncodedTokens, ImageTokens, Labels, Texts, TextStates, published
from mmdiff.data.token_cache import decoder, open_tokenizer, open_tokens
from mmdiff.processes import Given, Joint, MaskReplace
from mmdiff.training import optim

SIDE, CODES = 32, 2887  # of the grid of tokens
VOCABULARY, LENGTH = 49408, 77  # CLIP's; a cache's tokenizer has at most as many ids


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "vq_model", "path": "", "codes": ""},  # codes: the published list, see above
        "text_encoder": {"kind": "clip_text", "path": "", "tokenizer": ""},  # by default the tokenizer lies where the weights do
        # source: or random; set, images and max_skipped (damaged ones that are left out) are for cache
        "data": {"source": "tokens", "dir": "", "set": "captioned", "images": "", "max_skipped": 0, "classes": 0},
        "model": {
            "width": 192, "depth": 18, "heads": 16, "mlp_ratio": 2.0, "conv": True, "dtype": "bfloat16", "remat": "auto", "scan": True},
        "text": {"published": True, "width": 512, "depth": 12, "heads": 8, "freeze": False},  # depth, heads, freeze: of one's own
        "chain": {"steps": 80, "evidence": False}, "text_dropout": 0.1,
        # The released weights, Step-Intra; see mmdiff.contrastive.cdcd. A contrast of weight 0 is left out.
        "loss": {"auxiliary": 5e-4, "step_intra": 5e-5, "step_inter": 0.0, "sample_intra": 0.0, "sample_inter": 0.0, "count": 10},
        "form": "linear", "temperature": 1.0,  # or weighted or infonce, of all contrasts
        "train": training_config(
            steps=1_294_000, global_batch=32, ema=0.9996, eval_every=10_000, checkpoint_every=5_000, log_every=100,
            learning_rate=2e-4, warmup_steps=1000, patience=60_000, weight_decay=4.5e-2, clip=0.5),
        "sample": {"steps": 80, "guidance": 1.0, "top_p": 0.85},
        "eval": {"examples": 2048},  # held-out ones whose loss is measured, evenly spread over all of them
    })


def build(config):
    data, steps = config.data, config.chain.steps
    tokens = MaskReplace(CODES, schedules.vqd_released(steps), config.chain.evidence)
    process = Joint(tokens=tokens, text=Given(null=0.0 if config.text.published else 0))
    tokenizer = ImageTokens(config.encoder, SIDE, CODES, data.dir)
    encoders, model = [tokenizer], nets.options(config.model)
    if config.text.published:
        clip = TextStates(config.text_encoder, normalize=True, padding=0)
        encoders, text, encoder = [tokenizer, clip], EncodedTexts(config.text.width, "text", LENGTH, encoder=clip), None
    else:
        text, encoder = Texts(open_tokenizer(data, LENGTH)), own_encoder(config.text, model)
    net = nets.cdcd("coco", encoder=encoder, times=steps, **model)
    modalities = {
        "tokens": EncodedTokens(SIDE, SIDE, CODES, decode=decoder(data.dir, tokenizer), encoder=tokenizer), "text": text,
        **({"label": Labels(data.classes)} if data.classes else {})}
    # Negatives of another condition: of another class where there are classes, else of another caption.
    negatives = contrastive.inter(config.loss.count, by="label" if data.classes else "text")
    return Experiment(
        process=process, net=net, modalities=modalities,
        loss=losses.diffusion(
            process, net.apply, times.conditional("text", dropout=config.text_dropout, tokens=times.importance(steps, "vlb")),
            contrastive.cdcd(
                tokens, steps, of="tokens", given="text", inter_negatives=negatives, form=contrastive.form(config.form, config.temperature),
                **config.loss)),
        optimizer=optim.vq_diffusion(config.train, optim.all_but("/encoder/") if encoder and config.text.freeze else None),
        data=published(lambda split: open_tokens(data, split, modalities), config.eval.examples),
        sampler={"transforms": [sampling.only("tokens", sampling.top_p(config.sample.top_p))]},
        **EncodedCache(data, modalities, encoders, mirrored=False).for_experiment)  # captions say left and right


def own_encoder(text, model):
    """A text encoder of the size of CLIP's tower, which is trained with the network."""
    sizes = {name: text[name] for name in ("width", "depth", "heads", "freeze")}
    return nets.TextEncoder(VOCABULARY, LENGTH, normalise=True, **sizes, **{name: model[name] for name in ("dtype", "remat", "scan")})
