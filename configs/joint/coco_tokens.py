"""Images and texts of COCO by one network: latents by flow matching, captions by absorbing diffusion of tokens (as D-DiT, UniDisc).

    ENCODERS="--config.encoder.path=weights/sd-vae-ft-ema --config.tokenizer.path=weights/clip-vit-large-patch14"
    USE="--config configs/joint/coco_tokens.py --workdir runs/tokens $ENCODERS"
    python -m mmdiff cache  --config configs/joint/coco_tokens.py --out latents/coco_tokens $ENCODERS --config.data.images=coco
    python -m mmdiff train  $USE --config.data.dir=latents/coco_tokens
    python -m mmdiff sample $USE --given text="a cat on a red sofa"                                 # images of a text
    python -m mmdiff sample $USE --given image=photo.jpg                                            # texts of an image
    python -m mmdiff sample $USE                                                                    # pairs
    python -m mmdiff eval   $USE --split validation                                                 # to choose guidance and steps
    python -m mmdiff eval   $USE --config.eval.references=coco                                      # captions (CIDEr) and retrieval
    python -m mmdiff.data.prompts coco_captions coco prompts.txt 30000                              # for FID-30k and the CLIP score:
    python -m mmdiff sample $USE --given text=prompts.txt --number 30000 --format npz --out runs/tokens/30k
    python -m mmdiff eval   --samples runs/tokens/30k/samples.npz --reference coco/val2014 --size 256 --network inception \\
        --weights weights/pt_inception-2015-12-05-6726825d.pth --captions prompts.txt --clip weights/clip-vit-large-patch14

Data: `coco` holds dataset_coco.json (Karpathy's splits), train2014, val2014 and, for the prompts, annotations (the official archives); the
cache has an example for each of 566,435 training captions, 16 KiB each. --config.data.set=flickr30k or captioned (tar shards, CC3M) is
another set. For FID-30k cache and train with --config.data.set=coco_captions: Karpathy's training split has 30,504 images of val2014, of
which the prompts are. config.data.source=random makes all up and needs nothing.

Tokens are the 49,408 of CLIP (any folder or file of its tokenizer), 64 of a caption. T5's, as D-DiT has them: --config.tokenizer.kind=t5
--config.tokenizer.size=32128, with the folder of a T5. Padding is predicted like every id, and weighs a tenth. The cross-entropy of masked
tokens weighs 1/t, at most 5 (UniDisc's cap), by token; the text's loss a fifth of the image's (D-DiT). Logits are computed in chunks.

D-DiT takes two passes a step, an image given its text and a text given its image: two of the shares of `times` here, next to pairs of which
both are noisy, as UniDisc's, and each alone. In half of the texts given an image this is a little noisy, so that the network does not learn
the images by heart. An image takes 64 steps of UniPC, guided by the text; a text is sampled by first hitting, one call for each of its 64
tokens, or (in `eval`) with the most certain token first.

Not theirs: an MMDiT of XL size that begins at random, where D-DiT begins with Stable Diffusion 3's weights, which mmdiff does not read;
UniDisc's images are tokens, too, and the two share one time.

For orientation, FID by 30,000 prompts of val2014 at 256 pixels, theirs: U-ViT-S/2, of text to image alone and trained on COCO, 5.48. This
has not been trained here.
Cost: see configs/joint/README.md.
"""

import optax
from ml_collections import ConfigDict

from mmdiff import Experiment, losses, nets, sampling, schedules, times, training_config
from mmdiff.data import Autoencoder, CaptionIds, EncodedCache, EncodedLatents, Texts, published
from mmdiff.data.image_datasets import test_split
from mmdiff.data.latents import open_source
from mmdiff.evals.captioned_images import CaptionScores, retrievals
from mmdiff.evals.sampled_images import evaluators_of
from mmdiff.processes import Gaussian, Joint, absorbing, velocity
from mmdiff.training import optim


def get_config():
    return ConfigDict({
        "seed": 0,
        "encoder": {"kind": "autoencoder_kl", "path": ""},
        "tokenizer": {"kind": "clip_text", "path": "", "size": 49408, "length": 64},
        "data": {"source": "latents", "dir": "", "set": "coco_karpathy", "images": "", "max_skipped": 0, "size": 32},  # or random
        "model": {
            "size": "XL", "patch": 2, "qk_norm": True, "logit_chunks": 8, "dtype": "bfloat16", "remat": "auto", "scan": True},
        # Shares of the training times: both noisy; image given text; text given an image, and given one at t up to `reading_noise`; alone.
        "times": {
            "joint": 0.2, "image_given_text": 0.4, "text_given_image": 0.125, "text_given_noisy": 0.125, "image_alone": 0.1,
            "text_alone": 0.05},
        "reading_noise": 0.3,
        "text_weight": 0.2, "padding_weight": 0.1, "cap": 5.0,  # of the text's 1/t
        "train": training_config(
            steps=250_000, global_batch=1024, ema=0.9999, eval_every=10_000, checkpoint_every=2_000, log_every=100, sample_every=10_000,
            learning_rate=2e-4, warmup_steps=5_000, weight_decay=0.0, clip=1.0),
        "sample": {"steps": 64, "guidance": 4.0, "temperature": 1.0},
        "eval": {  # references: the set's folder; no metrics of samples while kind is ""; likelihood.most=0 leaves it out
            "references": "", "encoder": {"kind": "", "path": ""}, "reference": "", "most": 5000, "batch": 64,
            "likelihood": {"most": 100, "draws": 4}, "in_loop": {"most": 5000, "steps": 64}},
    })


def build(config):
    data, shares, measures, noisy = config.data, config.times, config.eval, times.uniform()
    autoencoder, ids = Autoencoder(config.encoder, data.size), CaptionIds(config.tokenizer)
    words = ids.tokenizer
    modalities = {"image": EncodedLatents(data.size, data.size, 4, encoder=autoencoder), "text": Texts(words)}
    process = Joint(image=Gaussian(schedules.flow(), velocity), text=absorbing(words.size))
    image, text = process.parts["image"], process.parts["text"]
    streams = {
        "image": nets.Patches(data.size, data.size, 4, config.model.patch),
        "text": nets.Tokens(words.length, states=words.size + 1, classes=words.size, logit_chunks=config.model.logit_chunks)}
    net = nets.MMDiT(streams, shared=True, **nets.options(config.model, without=("patch", "logit_chunks")))
    noise_levels = times.mixture(
        (shares.joint, times.joint(image=noisy, text=noisy)),
        (shares.image_given_text, times.joint(image=noisy, text=0.0)),
        (shares.text_given_image, times.joint(image=0.0, text=noisy)),
        (shares.text_given_noisy, times.joint(image=times.uniform(0.0, config.reading_noise), text=noisy)),
        (shares.image_alone, times.joint(image=noisy, text=1.0)),
        (shares.text_alone, times.joint(image=1.0, text=noisy)))
    masked = losses.masked_ce(text, losses.masked_elbo(config.cap), {words.padding: config.padding_weight})
    sampled = evaluators_of(measures, condition="text")
    captions = CaptionScores(data.set, measures.references, most=measures.most, batch=measures.batch)
    rate = optim.warmup(config.train.learning_rate, config.train.warmup_steps)
    return Experiment(
        process=process, net=net, modalities=modalities,
        loss=losses.diffusion(process, net.apply, noise_levels, {
            "image": (1.0, losses.on("image", image.loss)), "text": (config.text_weight, losses.on("text", masked))}),
        optimizer=optax.chain(
            optax.clip_by_global_norm(config.train.clip), optax.adamw(rate, b2=0.95, weight_decay=config.train.weight_decay)),
        data=published(lambda split: open_source(data, split, modalities), test=test_split(data.set)),
        sampler={
            "drop": ("text",), "hitting": "text",
            "transforms": [
                sampling.only("image", sampling.unipc(image)), sampling.only("text", sampling.temperature(config.sample.temperature))]},
        evaluators=(captions, *retrievals(measures), *sampled["evaluators"]), in_loop=sampled["in_loop"],
        **EncodedCache(data, modalities, [autoencoder, ids], mirrored=False).for_experiment)  # captions say left and right
