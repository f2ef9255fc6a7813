"""Images and texts as vectors in one diffusion: latents, CLIP's vector of the image, CLIP's states of the text (UniDiffuser), on COCO.

    ENCODERS="--config.encoder.path=weights/sd-vae-ft-ema --config.vector_encoder.path=weights/clip-vit-base-patch32"
    ENCODERS="$ENCODERS --config.text_encoder.path=weights/clip-vit-large-patch14"
    ENCODERS="$ENCODERS --config.text_encoder.reduce=weights/unidiffuser-v1/text_decoder"
    USE="--config configs/joint/coco_vectors.py --workdir runs/vectors $ENCODERS"
    python -m mmdiff cache  --config configs/joint/coco_vectors.py --out latents/coco_vectors $ENCODERS --config.data.images=coco
    python -m mmdiff train  $USE --config.data.dir=latents/coco_vectors
    python -m mmdiff sample $USE --given text="a cat on a red sofa" --guidance 4                    # images of a text
    python -m mmdiff sample $USE --absent text --absent vision                                      # images alone
    python -m mmdiff eval   $USE --split validation                                                 # to choose guidance and steps
    python -m mmdiff eval   $USE                                                                    # retrieval, both ways
    python -m mmdiff.data.prompts coco_captions coco prompts.txt 30000                              # for FID-30k and the CLIP score:
    python -m mmdiff sample $USE --given text=prompts.txt --number 30000 --format npz --out runs/vectors/30k
    python -m mmdiff eval   --samples runs/vectors/30k/samples.npz --reference coco/val2014 --size 256 --network inception \\
        --weights weights/pt_inception-2015-12-05-6726825d.pth --captions prompts.txt --clip weights/clip-vit-large-patch14

Data: `coco` holds dataset_coco.json (Karpathy's splits), train2014, val2014 and, for the prompts, annotations (the official archives); the
cache has an example for each of 566,435 training captions, 27 KiB each. --config.data.set=flickr30k or captioned (tar shards, CC3M) is
another set. For FID-30k cache and train with --config.data.set=coco_captions: Karpathy's training split has 30,504 images of val2014, of
which the prompts are. config.data.source=random makes all up and needs nothing.

UniDiffuser's forms of data (Bao et al. 2023): latents of Stable Diffusion's autoencoder, the vector of OpenAI's CLIP ViT-B/32 of the image,
and the 77 states of CLIP ViT-L/14 of the text, of which the linear layer of UniDiffuser's published text decoder makes 64 numbers each (the
folder text_decoder of "thu-ml/unidiffuser-v1", whose page states its licence; weights/clip-vit-*: "openai/clip-vit-...", MIT, with a
statement of use). weights/sd-vae-ft-ema: "stabilityai/sd-vae-ft-ema" (MIT).
Without that file, --config.text.kind=vector --config.text.size=768 takes CLIP's one vector of the text. Vectors have the length sqrt(size).
Every modality has a time of its own; guidance is of every modality by all others (`each`); 50 steps of DPM-Solver++(2M).

Not UniDiffuser's: an MMDiT of XL size for its U-ViT, flow matching for its noise schedule, separate times for the latents and the vector of
an image, which share one there, shares of times that are conditional, weights of the losses, and COCO for LAION-5B. Its text decoder, a
GPT-2, is not part of mmdiff: a text is found among others (retrieval), not written; coco_tokens.py writes.

For orientation, FID by 30,000 prompts of val2014 at 256 pixels, theirs: U-ViT-S/2, of text to image alone and trained on COCO, 5.48; the
published UniDiffuser, zero-shot, 9.71 (recalled). This has not been trained here.
Cost: see configs/joint/README.md.
"""

import optax
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Autoencoder, EncodedCache, EncodedLatents, EncodedTexts, EncodedVectors, ImageVectors, TextStates, published
from mmdiff.data.image_datasets import test_split
from mmdiff.data.latents import open_source
from mmdiff.errors import UserError
from mmdiff.evals.captioned_images import BeliefRetrieval, retrievals
from mmdiff.evals.sampled_images import evaluators_of
from mmdiff.processes import Gaussian, Joint, velocity
from mmdiff.training import optim

TOKENS = 77  # of CLIP's text tower


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "autoencoder_kl", "path": ""},
        "vector_encoder": {"kind": "clip_vision", "path": ""},
        "text_encoder": {"kind": "clip_text", "path": "", "tokenizer": "", "reduce": ""},  # the tokenizer lies where the weights do
        "data": {  # source: or random; size of the latents; vector: of the image's
            "source": "latents", "dir": "", "set": "coco_karpathy", "images": "", "max_skipped": 0, "size": 32, "vector": 512},
        "text": {"kind": "states", "size": 64},  # or vector
        "model": {"size": "XL", "patch": 2, "qk_norm": True, "dtype": "bfloat16", "remat": "auto", "scan": True},
        # Shares of the training times: all noisy; the image's two given the text; the text given these; each alone.
        "times": {
            "joint": 0.4, "image_given_text": 0.3, "text_given_image": 0.15, "image_alone": 0.05, "vision_alone": 0.05, "text_alone": 0.05},
        "weights": {"image": 1.0, "vision": 0.5, "text": 0.5},  # of squared errors per dimension
        "train": training_config(
            steps=250_000, global_batch=1024, ema=0.9999, eval_every=10_000, checkpoint_every=2_000, log_every=100, sample_every=10_000,
            learning_rate=2e-4, warmup_steps=5_000, weight_decay=0.0, clip=1.0),
        "sample": {"steps": 50, "guidance": 4.0},
        "eval": {  # no metrics of samples while kind is ""; likelihood.most=0 leaves it out
            "encoder": {"kind": "", "path": ""}, "reference": "", "most": 5000, "batch": 64, "likelihood": {"most": 100, "draws": 4},
            "in_loop": {"most": 5000, "steps": 50}},
    })


def build(config):
    noisy, flow = times.uniform(), schedules.flow()
    streams, parts = encoded(config)
    process = Joint(**{name: Gaussian(flow, velocity) for name in streams})
    net = nets.MMDiT(streams, shared=True, **nets.options(config.model, without="patch"))
    rules = {
        "joint": {"image": noisy, "vision": noisy, "text": noisy},
        "image_given_text": {"image": noisy, "vision": noisy, "text": 0.0},
        "text_given_image": {"image": 0.0, "vision": 0.0, "text": noisy},
        "image_alone": {"image": noisy, "vision": 1.0, "text": 1.0},
        "vision_alone": {"image": 1.0, "vision": noisy, "text": 1.0},
        "text_alone": {"image": 1.0, "vision": 1.0, "text": noisy}}
    noise_levels = times.mixture(*((config.times[name], times.joint(**rule)) for name, rule in rules.items()))
    parts["evaluators"] += retrievals(config.eval)
    return Experiment(
        process=process, net=net, loss=losses.diffusion(process, net.apply, noise_levels, losses.of_parts(process, **config.weights)),
        sampler={"each": tuple(streams), "transforms": [sampling.only(name, sampling.dpmpp_2m(flow)) for name in streams]}, **parts)


def encoded(config, normalized=True):
    """-> (the streams of a network of the three modalities, what else of the experiment follows from their encoders).

    `normalized`: the image's vector has the length sqrt(size), else the encoder's own.
    """
    data, text = config.data, config.text
    if text.kind not in ("states", "vector"):
        raise UserError(f"config.text.kind is {text.kind!r}: choose states or vector.")
    one, count = text.kind == "vector", None if text.kind == "vector" else TOKENS
    autoencoder = Autoencoder(config.encoder, data.size)
    vision = ImageVectors(config.vector_encoder, data.vector, modality="vision", normalized=normalized)
    captions = TextStates(config.text_encoder, modality="" if one else "text", vector="text" if one else "", scaled=True)
    modalities = {
        "image": EncodedLatents(data.size, data.size, 4, encoder=autoencoder),
        "vision": EncodedVectors(data.vector, "vision", encoder=vision),
        "text": EncodedTexts(text.size, "text", count, encoder=captions)}
    streams = {
        "image": nets.Patches(data.size, data.size, 4, config.model.patch), "vision": nets.Vectors(data.vector),
        "text": nets.Vectors(text.size, count)}
    measured = evaluators_of(config.eval, condition="text")
    beliefs = BeliefRetrieval(target="vision", given=("image", "vision"), most=config.eval.most, batch=config.eval.batch)
    rate = optim.warmup(config.train.learning_rate, config.train.warmup_steps)
    return streams, {
        "modalities": modalities,
        "optimizer": optax.chain(
            optax.clip_by_global_norm(config.train.clip), optax.adamw(rate, b2=0.95, weight_decay=config.train.weight_decay)),
        "data": published(lambda split: open_source(data, split, modalities), test=test_split(data.set)),
        "evaluators": (beliefs, *measured["evaluators"]), "in_loop": measured["in_loop"],
        **EncodedCache(data, modalities, [autoencoder, vision, captions], mirrored=False).for_experiment}  # captions say left and right
