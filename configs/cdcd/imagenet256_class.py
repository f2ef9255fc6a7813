"""CDCD on ImageNet 256x256 given the class: 16x16 tokens of 974 codes, the paper's setting (Zhu et al. 2023).

    VQGAN="--config.encoder.path=weights/vqgan_imagenet_f16_16384.ckpt"
    DATA="--config.data.dir=tokens/imagenet"
    python -m mmdiff cache  --config configs/cdcd/imagenet256_class.py --out tokens/imagenet $VQGAN --config.data.images=imagenet
    python -m mmdiff train  --config configs/cdcd/imagenet256_class.py --workdir runs/imagenet_class $VQGAN $DATA
    python -m mmdiff sample --config configs/cdcd/imagenet256_class.py --workdir runs/imagenet_class --given label=207
    python -m mmdiff aot    --config configs/cdcd/imagenet256_class.py --topology v5e:4x4 --config.data.source=random

The tokenizer is the paper's, taming-transformers' VQGAN with 16,384 codes (vqgan_imagenet_f16_16384, last.ckpt; MIT), of which the 974 that
the training images use most are kept, and all others become the nearest of these; config.encoder.codes=taming_vqvae_974.pt is the authors'
list instead (of VQ-Diffusion's repository), which maps all others to one class and which published weights need. `imagenet` has the
folders train/n01440764 ... and val/n01440764 ... of images; of TFDS, add --config.data.set=imagenet2012. Every training image is encoded
as it is and mirrored. A tokenizer of one's own, of configs/cdcd/images_tokenizer.py, writes such a folder, too:

    SET="--config.data.name=imagenet2012 --config.data.dir=tfds"
    python -m mmdiff train  --config configs/cdcd/images_tokenizer.py --workdir runs/imagenet_tokenizer $SET
    python -m mmdiff cache  --config configs/cdcd/images_tokenizer.py --workdir runs/imagenet_tokenizer --out tokens/imagenet_own

The network is the published one, whose position table has 32 columns for a grid of 16. Its weights, VQ-Diffusion's (100 steps) and CDCD's:

    LIST="--config.encoder.codes=weights/taming_vqvae_974.pt"
    VQD="--config configs/cdcd/imagenet256_class.py --workdir runs/vq_diffusion"
    python -m mmdiff convert $VQD --from imagenet_pretrained.pth --as vq-diffusion --config.chain.steps=100
    python -m mmdiff sample  $VQD $VQGAN $LIST --given label=207

The recipe, as released: Step-Intra with ten negatives, importance-sampled times, auxiliary weight 1e-3; AdamW (0.9, 0.96) with decay
4.5e-2 on every weight, gradients clipped at 0.5 from first to last; a rate of 4.5e-4, reached in 5,000 steps from 3e-6 and halved after
100,000 without progress; batch 192 (released: 24 a GPU; eight GPUs are our guess), 100 epochs. Their average takes 0.99 every 25 steps,
ours the same 0.9996 every step. Sampling takes 80 steps and keeps the likeliest classes of total probability 0.86. Not theirs: labels are
dropped for a tenth of the examples, so that config.sample.guidance can be above 1, and activations are bfloat16.
config.loss.sample_inter=5e-6 with step_intra=0 is Sample-Inter, its negatives being others of the batch.

For orientation, from a paper: VQ-Diffusion, without the contrast but with 100 steps and their tokenizer, has FID 11.89 (Gu et al. 2022;
others who ran its code found about 20). This has not been trained here; its cost is unknown. FID is measured of a set of samples, as in
configs/imagenet256/README.md.

On 16 chips of v5e, by the ahead-of-time report: 517.8M parameters, 13.1 GB a chip of 16.9, 44.8 GB of main memory, of it 73 % the
optimizer's, and a step of 55 ms at least (MFU 83 % at most; 153 ms by the compiler's own time, and 20 ms of links exposed); before
attention and norms were kernels 15.9 GB and 60 ms. config.train.mesh.data=1 with mesh.fsdp=16 splits the state: 1.6 GB a chip, 5.0 GB of
main memory, 45 ms at least, bound by compute (80 ms, and 19 ms of links).
"""

from ml_collections import ConfigDict

from mmdiff import Experiment, contrastive, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import EncodedCache, EncodedTokens, ImageTokens, Labels, published
from mmdiff.data.token_cache import decoder, open_tokens
from mmdiff.processes import Given, Joint, MaskReplace
from mmdiff.training import optim

CLASSES, SIDE, CODES = 1000, 16, 974  # the null label is CLASSES


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "vq_model", "path": "", "codes": ""},  # codes: the published list, see above
        "data": {"source": "tokens", "dir": "", "set": "folder", "images": "", "max_skipped": 0},  # or random; cache reads set, images
        "model": {"width": 512, "depth": 24, "heads": 16, "dtype": "bfloat16", "remat": "auto", "scan": True},
        "chain": {"steps": 80, "evidence": False}, "label_dropout": 0.1,
        # The released weights, Step-Intra; see mmdiff.contrastive.cdcd. A contrast of weight 0 is left out.
        "loss": {"auxiliary": 1e-3, "step_intra": 5e-5, "step_inter": 0.0, "sample_intra": 0.0, "sample_inter": 0.0, "count": 10},
        "form": "linear", "temperature": 1.0,  # or weighted or infonce, of all contrasts
        "train": training_config(
            steps=667_000, global_batch=192, ema=0.9996, eval_every=10_000, checkpoint_every=5_000, log_every=100,
            learning_rate=4.5e-4, warmup_steps=5000, patience=100_000, weight_decay=4.5e-2, clip=0.5),
        "sample": {"steps": 80, "guidance": 1.0, "top_p": 0.86},
        "eval": {"examples": 2048},  # held-out ones whose loss is measured, evenly spread over all of them
    })


def build(config):
    data, steps = config.data, config.chain.steps
    tokens = MaskReplace(CODES, schedules.vqd_released(steps), config.chain.evidence)
    process = Joint(tokens=tokens, label=Given(null=CLASSES))
    net = nets.cdcd("imagenet", labels=CLASSES + 1, times=steps, **nets.options(config.model))
    tokenizer = ImageTokens(config.encoder, SIDE, CODES, data.dir)
    modalities = {
        "tokens": EncodedTokens(SIDE, SIDE, CODES, decode=decoder(data.dir, tokenizer), encoder=tokenizer), "label": Labels(CLASSES)}
    return Experiment(
        process=process, net=net, modalities=modalities,
        loss=losses.diffusion(
            process, net.apply, times.conditional("label", dropout=config.label_dropout, tokens=times.importance(steps, "vlb")),
            contrastive.cdcd(
                tokens, steps, of="tokens", given="label", form=contrastive.form(config.form, config.temperature), **config.loss)),
        optimizer=optim.vq_diffusion(config.train),
        data=published(lambda split: open_tokens(data, split, modalities), config.eval.examples),
        sampler={"transforms": [sampling.only("tokens", sampling.top_p(config.sample.top_p))]},
        **EncodedCache(data, modalities, [tokenizer]).for_experiment)
