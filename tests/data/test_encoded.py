"""Published encoders in their places: images are cached, models train on what the encoders make of them, and samples are images."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoders
from PIL import Image

from mmdiff import config as configs
from mmdiff import encoded_caches
from mmdiff.__main__ import main
from mmdiff.convert import state_dicts
from mmdiff.convert.weight_writer import write_weights
from mmdiff.data.encoded_modalities import EncodedTexts
from mmdiff.data.latents import LatentSource
from mmdiff.data.loader import batches
from mmdiff.data.named_encoders import ImageVectors, TextStates
from mmdiff.data.named_tokenizers import CaptionIds
from mmdiff.data.order import indices, positions
from mmdiff.data.shards import sample_moments
from mmdiff.data.sources import load_all
from mmdiff.encoders import preprocessing
from mmdiff.encoders.autoencoder_kl import AutoencoderKL
from mmdiff.encoders.clip import CLIPVision
from mmdiff.encoders.dinov2 import DINOv2
from mmdiff.encoders.siglip import SigLIPVision
from mmdiff.encoders.vq_model import VQModel
from mmdiff.errors import UserError
from mmdiff.evals import streaming
from mmdiff.nets.dit import SIZES

DIT, TOKENS = "configs/imagenet256/dit_xl2.py", "configs/cdcd/imagenet256_class.py"
VECTORS = "configs/mtdiffusion/imagenet_representation.py"
VQ = {"block_out_channels": [4, 4], "latent_channels": 4, "num_vq_embeddings": 990, **tiny_encoders.LEVELS}
TRAIN = [
    "--config.train.steps=2", "--config.train.global_batch=2", "--config.train.log_every=1", "--config.train.eval_every=0",
    "--config.train.tensorboard=false", "--config.model.dtype=float32"]


pytestmark = pytest.mark.usefixtures("one_device")  # what is tested knows no mesh; eight simulated devices take longer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes, of different sizes, of the sides that autoencoders of 32 x 32 latents (64 pixels) crop."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for label, size in (("cat", (70, 90)), ("dog", (150, 64))):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def latents(autoencoder, images, tmp_path_factory):
    """A cache that the command has written, in shards of five."""
    out = tmp_path_factory.mktemp("latents") / "cache"
    command = ["cache", "--config", DIT, f"--config.encoder.path={autoencoder[0]}", f"--config.data.images={images}", "--out", str(out)]
    assert main(command) == 0
    return out, command


def run(capsys, *args):
    """(exit status, the last line of stderr) of a command."""
    capsys.readouterr()
    status = main(list(args))
    return status, capsys.readouterr().err.strip().splitlines()[-1:]


def prepared(images, size, split="train"):
    return np.stack([
        np.asarray(preprocessing.Preprocessing(size, "adm").resized(Image.open(path)), np.float32) / 127.5 - 1
        for path in sorted(images.glob(f"{split}/*/*.png"))])


def test_a_cache_holds_moments_of_every_image_and_its_mirror_image(latents, autoencoder, images, capsys):
    (out, command), (_, net, params) = latents, autoencoder
    experiment = build(DIT, f"encoder.path={autoencoder[0]}")
    source = LatentSource(out, "train", experiment.modalities)
    assert len(source) == 12 and len(LatentSource(out, "val", experiment.modalities)) == 2
    found = load_all(source)
    np.testing.assert_array_equal(found["label"], np.repeat([0, 0, 0, 1, 1, 1], 2))
    views = prepared(images, 64)
    views = np.stack([views, views[:, :, ::-1]], 1).reshape(-1, 64, 64, 3)
    mean, logvar = np.split(np.asarray(net.apply({"params": params}, views, method="encode")), 2, axis=-1)
    moments = np.concatenate([(mean - 0.25) * 0.5, np.exp(logvar / 2) * 0.5], -1)
    np.testing.assert_allclose(np.load(out / "train/image-00000.npy"), moments, atol=2e-3, rtol=2e-3)  # float16
    # Each epoch samples latents anew, alike in every process; `take` has the first epoch.
    rows, epochs = np.array([3, 0, 3]), np.array([1, 1, 2])
    drawn = source.take_in_epochs(rows, epochs)["image"]
    np.testing.assert_array_equal(drawn, sample_moments(np.load(out / "train/image-00000.npy").astype(np.float32)[rows], rows, epochs))
    np.testing.assert_array_equal(source.take_in_epochs(rows[1:2], epochs[1:2])["image"], drawn[1:2])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.1
    first, second = itertools.islice(batches(source, 0, 12), 2)  # an epoch each
    by_index = [dict(zip(indices(0, positions(step, 12), 12).tolist(), batch["image"])) for step, batch in enumerate((first, second))]
    np.testing.assert_array_equal(by_index[1][3], drawn[0])
    np.testing.assert_array_equal(by_index[0][3], found["image"][3])
    z = (found["image"] - moments[..., :4]) / moments[..., 4:]
    assert abs(z.mean()) < 0.02 and z.std() == pytest.approx(1, abs=0.02)
    meta = json.loads((out / "train/meta.json").read_text())
    assert meta["encoders"]["image"]["kind"] == "autoencoder_kl" and meta["moments"] == ["image"]
    assert meta["modalities"]["image"]["scale"] == 0.5
    capsys.readouterr()
    assert main(command) == 0 and "nothing to do: " in capsys.readouterr().out


def test_a_cache_continues_where_it_was_interrupted(autoencoder, images, latents, tmp_path, monkeypatch):
    experiment = build(DIT, f"encoder.path={autoencoder[0]}", f"data.images={images}")
    encode, calls = type(experiment.cache.encoders[0]).encode, []

    def interrupted(self, batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(type(experiment.cache.encoders[0]), "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoded_caches.write(experiment.cache, tmp_path / "cache", ["train"], shard=5)
    assert not (tmp_path / "cache/train").exists()
    assert encoded_caches.write(experiment.cache, tmp_path / "cache", ["train"], shard=5)
    assert calls == [5, 5, 5, 2]  # the first shard is not encoded again
    whole, parts = (load_all(LatentSource(folder, "train", experiment.modalities)) for folder in (latents[0], tmp_path / "cache"))
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], atol=2e-3)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["train"]


def test_a_model_of_latents_trains_and_its_samples_are_images(latents, autoencoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "XS", (1, 32, 2))
    (out, _), (folder, net, params) = latents, autoencoder
    use = ["--config", DIT, "--workdir", str(tmp_path / "run"), f"--config.encoder.path={folder}"]
    small = ["--config.model.size=XS", "--config.model.patch=16", f"--config.data.dir={out}"]
    assert main(["train", *use, *TRAIN, *small]) == 0
    assert main(["sample", *use, "--given", "label=dog", "--number", "2", "--steps", "2"]) == 0
    samples = np.load(tmp_path / "run/samples/samples.npz")["image"]
    by_hand = np.asarray(net.apply({"params": params}, jnp.asarray(samples / 0.5 + 0.25), method="decode"))
    shown = np.stack([np.asarray(Image.open(tmp_path / f"run/samples/image/0000{i}.png")) for i in range(2)])
    assert shown.shape == (2, 64, 64, 3)
    assert np.abs(shown - np.rint((np.clip(by_hand, -1, 1) + 1) * 127.5)).max() <= 1  # of a value between two levels
    # As numbered files of a set the same.
    command = ["sample", *use, "--given", "label=dog", "--number", "2", "--steps", "2", "--out", str(tmp_path / "set")]
    assert main([*command, "--format", "png", "--batch", "2"]) == 0
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(tmp_path / f"set/images/00000{i}.png")) for i in range(2)]), shown)
    # An image is given as it is, by its most likely latents.
    experiment = build(DIT, f"encoder.path={folder}")
    photo = experiment.modalities["image"].parse(str(tmp_path / "run/samples/image/00000.png"))
    assert photo.shape == (1, 32, 32, 4)
    # Another autoencoder decodes to something else: it is refused, in training as in use.
    other, *_ = tiny_encoders.autoencoder(tmp_path / "other", seed=1)
    status, said = run(capsys, "sample", *use[:-1], f"--config.encoder.path={other}", "--steps", "2")
    assert status == 2 and "encoded by another network than config.encoder.path" in said[0]
    status, said = run(capsys, "train", *use[:-1], f"--config.encoder.path={other}", *TRAIN, *small)
    assert status == 2 and "encoded by another network than config.encoder.path" in said[0]


def test_what_is_not_there_is_said(images, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    status, said = run(capsys, "cache", "--config", DIT, *out)
    assert status == 2 and "config.encoder.path is empty: name the published autoencoder of the kind autoencoder_kl, a file or" in said[0]
    status, said = run(capsys, "cache", "--config", DIT, *out, "--config.encoder.path=moved")
    assert status == 2 and "no such file: moved: name the published autoencoder where it lies now by --config.encoder.path=" in said[0]
    status, said = run(capsys, "cache", "--config", "digits_joint", *out)
    assert status == 2 and "names no published encoders: give --workdir DIR" in said[0]
    status, said = run(capsys, "cache", "--config", DIT, *out, "--config.encoder.kind=inception")
    assert status == 2 and "config.encoder.kind is 'inception': the autoencoder is one of autoencoder_kl, autoencoder_tiny" in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_does_not_fit_is_said(latents, images, captioned, autoencoder, tmp_path, capsys):
    out, command = latents
    use = ["cache", "--config", DIT, f"--config.encoder.path={autoencoder[0]}"]
    status, said = run(capsys, *use, f"--config.data.images={images / 'train'}", "--out", str(out))
    assert status == 2 and f"{out}/train was written of other images, or by other encoders: remove it" in said[0]
    status, said = run(capsys, *use, f"--config.data.images={images}", "--out", str(images))  # whose folders have these names, too
    assert status == 2 and f"{images} lies in {images}, whose folders are read as classes" in said[0]
    assert {path.name for path in images.iterdir()} == {"train", "val"}
    elsewhere = ["--out", str(tmp_path / "out")]
    status, said = run(capsys, *use, f"--config.data.images={captioned}", "--config.data.set=captioned", *elsewhere)
    assert status == 2 and "have no label, which the config needs: see config.data.set" in said[0]
    status, said = run(capsys, *use, f"--config.data.images={tmp_path / 'none'}", *elsewhere)
    assert status == 2 and f"there is no folder {tmp_path / 'none'}" in said[0]
    status, said = run(capsys, *use, f"--config.data.images={images}", "--split", "test", *elsewhere)
    assert status == 2 and "the set folder has no split 'test'" in said[0]
    wide = tiny_encoders.publish(tmp_path / "wide", AutoencoderKL.from_config({**tiny_encoders.KL, "latent_channels": 3}))[0]
    status, said = run(capsys, *use[:3], f"--config.encoder.path={wide}", f"--config.data.images={images}", *elsewhere)
    assert status == 2 and "latents need the shape [n, 32, 32, 4], got [12, 32, 32, 3]" in said[0]
    _, net, params = autoencoder
    broken = state_dicts.state_dict(params)
    broken["decoder.conv_in.weight"][0, 0, 0, 0] = np.nan  # images would be black
    write_weights(tmp_path / "broken", broken, net.config())
    status, said = run(capsys, *use[:3], f"--config.encoder.path={tmp_path / 'broken'}", f"--config.data.images={images}", *elsewhere)
    assert status == 2 and f"{tmp_path / 'broken'} has values that are not finite, of decoder.conv_in.weight: get" in said[0]
    (images / "val/cat/0.png").rename(tmp_path / "0.png")
    Image.new("RGB", (1, 300)).save(images / "val/cat/0.png")
    status, said = run(capsys, *use, f"--config.data.images={images}", "--split", "val", *elsewhere)
    assert status == 2 and "val/cat/0.png is not encoded (an image of 300 x 1 pixels is too narrow" in said[0]
    assert run(capsys, *use, f"--config.data.images={images}", "--split", "val", "--config.data.max_skipped=1", *elsewhere)[0] == 0
    shutil.rmtree(tmp_path / "out/val")
    (images / "val/cat/0.png").write_bytes(b"no image")
    status, said = run(capsys, *use, f"--config.data.images={images}", "--split", "val", *elsewhere)
    (tmp_path / "0.png").rename(images / "val/cat/0.png")
    assert status == 2 and "val/cat/0.png" in said[0] and "config.data.max_skipped=0" in said[0]
    assert not any(path.suffix == ".json" for path in (tmp_path / "out").rglob("*") if path.name == "meta.json")


@pytest.fixture(scope="module")
def tokens(images, tmp_path_factory):
    """-> (a cache of tokens, the flags for its use, the tokenizer's network and parameters)."""
    folder, net, params = tiny_encoders.publish(tmp_path_factory.mktemp("vq") / "vqgan", VQModel.from_config(VQ))
    use, out = ["--config", TOKENS, f"--config.encoder.path={folder}"], folder.parent / "tokens"
    assert main(["cache", *use, "--out", str(out), f"--config.data.images={images}"]) == 0
    return out, [*use, f"--config.data.dir={out}"], net, params


def test_tokens_of_the_codes_that_are_used_most(tokens, images):
    out, use, net, params = tokens
    ids = np.asarray(net.apply({"params": params}, prepared(images, 32), method="encode"))
    uses = np.bincount(ids.reshape(-1), minlength=990)
    kept = json.loads((out / "codes.json").read_text())["codes"]
    assert len(kept) == 974 and uses[kept].sum() == np.sort(uses)[16:].sum()
    stored = np.load(out / "train/tokens-00000.npy")
    same = np.isin(ids, kept).reshape(6, -1)
    np.testing.assert_array_equal(np.asarray(kept)[stored[::2]][same], ids.reshape(6, -1)[same])
    experiment = build(TOKENS, *(flag.removeprefix("--config.") for flag in use[2:]))
    by_hand = np.asarray(net.apply({"params": params}, jnp.asarray(kept)[stored[:1]].reshape(1, 16, 16), method="decode"))
    shown = experiment.modalities["tokens"].show(stored[:1])
    assert np.abs(shown - np.rint((np.clip(by_hand, -1, 1) + 1) * 127.5)).max() <= 1  # of a value between two levels
    assert len(experiment.train_data()) == 12 and experiment.frozen_deps["tokenizer"]()


def test_codes_of_a_cache_that_was_never_written_are_chosen_again(tokens, images, tmp_path):
    out, use, *_ = tokens
    noted = json.loads((out / "codes.json").read_text())
    (tmp_path / "codes.json").write_text(json.dumps({**noted, "images": "others", "codes": list(range(974))}))
    assert main(["cache", *use[:3], "--out", str(tmp_path), f"--config.data.images={images}", "--split", "val"]) == 0
    assert json.loads((tmp_path / "codes.json").read_text()) == noted
    np.testing.assert_array_equal(np.load(tmp_path / "val/tokens-00000.npy"), np.load(out / "val/tokens-00000.npy"))


@pytest.mark.slow
def test_a_model_of_tokens_trains_and_its_samples_are_images(tokens, tmp_path):
    out, use, net, params = tokens
    kept = json.loads((out / "codes.json").read_text())["codes"]
    small = ["--config.model.width=16", "--config.model.depth=1", "--config.model.heads=2", "--config.chain.steps=4"]
    small += ["--config.loss.step_intra=0", "--config.model.scan=false"]
    use = [*use, "--workdir", str(tmp_path / "run")]
    assert main(["train", *use, *TRAIN, *small]) == 0
    assert main(["sample", *use, "--given", "label=1", "--number", "1", "--steps", "2"]) == 0
    sampled = np.load(tmp_path / "run/samples/samples.npz")["tokens"]
    by_hand = np.asarray(net.apply({"params": params}, jnp.asarray(kept)[sampled].reshape(1, 16, 16), method="decode"))
    shown = np.asarray(Image.open(tmp_path / "run/samples/tokens/00000.png"))
    assert np.abs(shown - np.rint((np.clip(by_hand[0], -1, 1) + 1) * 127.5)).max() <= 1


@pytest.fixture(scope="module")
def vectors(autoencoder, images, tmp_path_factory):
    """-> (a cache of latents and vectors, the flags for its use, the image encoder's network and parameters)."""
    folder, net, params = tiny_encoders.publish(tmp_path_factory.mktemp("vectors") / "clip", CLIPVision.from_config(tiny_encoders.VISION))
    use = ["--config", VECTORS, f"--config.encoder.path={autoencoder[0]}", f"--config.vector_encoder.path={folder}"]
    use, out = [*use, "--config.data.vector=12"], folder.parent / "cache"
    assert main(["cache", *use, "--out", str(out), f"--config.data.images={images}"]) == 0
    return out, [*use, f"--config.data.dir={out}"], net, params


@pytest.mark.slow
def test_vectors_of_images_beside_their_latents(vectors, images):
    out, _, net, params = vectors
    stored = np.load(out / "train/representation-00000.npy").astype(np.float32)
    views = np.stack([
        preprocessing.Preprocessing(16, **preprocessing.CLIP_STATISTICS)(np.asarray(Image.open(path)))
        for path in sorted(images.glob("train/*/*.png"))])
    vectors = np.asarray(net.apply({"params": params}, views).embedding)
    np.testing.assert_allclose(stored[::2], vectors * (12**0.5 / np.linalg.norm(vectors, axis=-1, keepdims=True)), atol=3e-3)


@pytest.mark.parametrize("kind", ["dinov2", pytest.param("siglip_vision", marks=pytest.mark.slow)])
def test_vectors_of_other_image_encoders(kind, images, tmp_path):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    net = DINOv2.from_config(sizes) if kind == "dinov2" else SigLIPVision.from_config(sizes | {"intermediate_size": 16})
    folder, net, params = tiny_encoders.publish(tmp_path / "encoder", net)
    vectors = ImageVectors({"kind": kind, "path": str(folder)}, 12)
    photo = Image.open(next(images.glob("val/*/*.png"))).convert("RGB")
    view = vectors.prepare(photo)
    np.testing.assert_array_equal(view, (preprocessing.DINOV2 if kind == "dinov2" else preprocessing.SIGLIP)(photo))
    found = net.apply({"params": params}, view[None])
    by_hand = np.asarray(found["cls"] if kind == "dinov2" else found.pooled)
    np.testing.assert_allclose(vectors.encode(view[None])["representation"], by_hand * (12**0.5 / np.linalg.norm(by_hand)), atol=1e-4)
    plain = ImageVectors({"kind": kind, "path": str(folder)}, 12, normalized=False)
    np.testing.assert_allclose(plain.encode(view[None])["representation"], by_hand, atol=1e-4)
    assert plain.fingerprint() != vectors.fingerprint()  # a cache is of one or the other
    with pytest.raises(UserError, match="has vectors of 12 numbers, but the config needs 16"):
        ImageVectors({"kind": kind, "path": str(folder)}, 16).encode(view[None])


@pytest.mark.slow
def test_a_model_of_vectors_takes_images(vectors, images, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "XS", (1, 32, 2))
    use, small = [*vectors[1], "--workdir", str(tmp_path / "run")], ["--config.model.size=XS", "--config.model.patch=16"]
    assert main(["train", *use, *TRAIN, *small]) == 0
    photo = next(images.glob("val/*/*.png"))
    assert main(["sample", *use, "--given", f"representation={photo}", "--steps", "2", "--number", "1"]) == 0
    assert Image.open(tmp_path / "run/samples/image/00000.png").size == (64, 64)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    for split in ("train", "val"):
        (folder / split).mkdir()
        for number, caption in enumerate(("a red cat", "two dogs", "a red cat")):
            Image.new("RGB", (20, 30), (90 * number, 0, 0)).save(folder / split / f"{number}.png")
            (folder / split / f"{number}.txt").write_text(caption)
    return folder


def _reduced_and_scaled(folder, decoder):
    """UniDiffuser's layer makes fewer numbers of each state; a vector has the length of its dimensions' root."""
    section, rng = {"kind": "clip_text", "path": str(folder)}, np.random.default_rng(0)
    weight, bias = rng.normal(size=(3, 16)).astype(np.float32), np.float32([1, 2, 3])
    write_weights(decoder, {"module.encode_prefix.weight": weight, "module.encode_prefix.bias": bias})
    plain, reduced = TextStates(section, vector="one"), TextStates(section | {"reduce": str(decoder)}, vector="one", scaled=True)
    found, other = (encoder.encode(["a cat", "dogs"]) for encoder in (plain, reduced))
    np.testing.assert_allclose(other["text"], found["text"] @ weight.T + bias, atol=1e-5)
    np.testing.assert_allclose(other["one"], 4 * found["one"], atol=1e-5)
    assert {*TextStates(section, modality="", vector="one").encode(["a cat"])} == {"one"}
    assert len({plain.fingerprint(), reduced.fingerprint()}) == 2
    with pytest.raises(UserError, match="has no layer encode_prefix for states of 16 numbers: name UniDiffuser's text decoder"):
        TextStates(section | {"reduce": str(folder)}).encode(["a cat"])
    with pytest.raises(UserError, match="config.text_encoder.reduce is of CLIP's states, and config.text_encoder.kind is 't5'"):
        TextStates({"kind": "t5", "path": "", "reduce": "a"})


def _ids(folder):
    """Ids are those of the published tokenizer, of the length and with the padding of the model; nothing is opened before it is needed."""
    section = {"kind": "clip_text", "path": str(folder), "size": 514, "length": 9}
    ids, absent = CaptionIds(section), CaptionIds(section | {"path": ""})
    found = ids.encode(["a cat", "many more letters"])["text"]
    assert found[0].tolist() == [512, 320, 66, 64, 339, 513, 0, 0, 0] and found[1, -1] == ids.opened.end == 513
    assert ids.tokenizer.decode(found) == ["a cat", "many mor"]
    assert ids.fingerprint() != CaptionIds(section | {"length": 10}).fingerprint() and absent.fingerprint() is None
    for wrong, why in ((absent, "config.tokenizer.path is empty"), (CaptionIds(section | {"size": 9}), "has 514 ids: set --config.token")):
        with pytest.raises(UserError, match=why):
            wrong.encode(["a cat"])


def test_sentences_are_encoded_when_they_are_taken(tmp_path, monkeypatch):
    folder, *_ = tiny_encoders.clip_text(tmp_path / "clip", 16)
    (tmp_path / "prompts.txt").write_text("a red cat\n\ntwo dogs\nthree\n")
    text = EncodedTexts(16, "text", 77, encoder=TextStates({"kind": "clip_text", "path": str(folder)}))
    lazy = text.lazily(str(tmp_path / "prompts.txt"))
    assert len(lazy) == 3 and text.lazily("three").shape == (1, 77, 16)
    whole = text.parse(str(tmp_path / "prompts.txt"))
    np.testing.assert_array_equal(lazy[np.array([2, 0])], whole[[2, 0]])
    _reduced_and_scaled(folder, tmp_path / "decoder")
    _ids(folder)
    monkeypatch.setattr(TextStates, "encode", lambda self, lines: {"text": np.full((len(lines), 77, 16), len(lines[0]), np.float32)})
    echo = streaming.stream(lambda params, keys, given: given, None, jax.random.key(0), {"text": lazy}, 3, 2)
    assert [found["text"][:, 0, 0].tolist() for _, found in echo] == [[9, 9], [5]]  # a batch at a time: its first sentence's length


def test_states_and_vectors_of_captions(captioned, autoencoder, tmp_path):
    folder, net, params, tokenizer = tiny_encoders.clip_text(tmp_path / "clip", 768)
    use = [f"--config.encoder.path={autoencoder[0]}", f"--config.text_encoder.path={folder}", "--config.data.size=4"]
    command = ["cache", "--config", "configs/diffdis/sd_scale.py", *use, "--out", str(tmp_path / "cache")]
    assert main([*command, f"--config.data.images={captioned}"]) == 0
    experiment = build("configs/diffdis/sd_scale.py", *(flag.removeprefix("--config.") for flag in use), f"data.dir={tmp_path / 'cache'}")
    found, texts = load_all(experiment.train_data()), ["a red cat", "two dogs", "a red cat"]
    assert {name: array.shape for name, array in found.items()} == {"image": (3, 4, 4, 4), "text": (3, 77, 768), "query": (3, 768)}
    by_hand = net.apply({"params": params}, tokenizer.encode(texts))
    lengths = [2 + len(text.replace(" ", "")) for text in texts]  # start, a byte each, end
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found["text"][row, :length], by_hand.tokens[row, :length], atol=5e-3)
        assert not found["text"][row, length:].any()
    vectors = np.asarray(by_hand.embedding)
    np.testing.assert_allclose(found["query"], vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-3)
    text = experiment.modalities["text"]
    given = text.parse("two dogs")
    np.testing.assert_allclose(given[0], found["text"][1], atol=5e-3)
    assert text.show(given) == ["two dogs"] and text.show(found["text"]) is None
    # CDCD's are normalised, of all positions, and padded with 0.
    coco = build("configs/cdcd/coco_text.py", f"text_encoder.path={tiny_encoders.clip_text(tmp_path / 'b32', 512)[0]}")
    states = coco.modalities["text"].parse("two dogs")
    assert states.shape == (1, 77, 512) and np.abs(np.linalg.norm(states, axis=-1) - 1).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("config", ["configs/cdcd/coco_text.py", "configs/diffdis/sd_scale.py"])
def test_a_model_of_captions_trains_and_takes_sentences(config, captioned, autoencoder, tmp_path, monkeypatch):
    """The tokens of GumbelVQ and CLIP's states, as CDCD; latents, CLIP's states and its vector, as DiffDis."""
    monkeypatch.setitem(SIZES, "XS", (2, 32, 4))
    if config.startswith("configs/cdcd"):
        net = VQModel.from_config(VQ | {"num_vq_embeddings": 2900, "quantizer": "gumbel"})
        paths, width = [f"--config.encoder.path={tiny_encoders.publish(tmp_path / 'vq', net)[0]}"], 512
        small = ["model.width=16", "model.depth=1", "model.heads=2", "chain.steps=4", "loss.count=1", "eval.examples=2"]
    else:
        paths, width = [f"--config.encoder.path={autoencoder[0]}", "--config.data.size=4"], 768
        small = ["model.size=XS", "model.shared=1", "model.head_width=16", "model.head_heads=2", "model.head_depth=1"]
    paths += [f"--config.text_encoder.path={tiny_encoders.clip_text(tmp_path / 'clip', width)[0]}"]
    cache = ["cache", "--config", config, *paths, "--out", str(tmp_path / "cache")]
    assert main([*cache, f"--config.data.images={captioned}"]) == 0
    use = ["--config", config, *paths, "--workdir", str(tmp_path / "run")]
    assert main(["train", *use, *TRAIN, f"--config.data.dir={tmp_path / 'cache'}", *(f"--config.{each}" for each in small)]) == 0
    given = ["--given", "text=a blue bird", "--number", "1", "--steps", "2", "--guidance", "2"]
    assert main(["sample", *use, *given]) == 0
    name = "tokens" if config.startswith("configs/cdcd") else "image"
    assert Image.open(tmp_path / f"run/samples/{name}/00000.png").size == ((64, 64) if name == "tokens" else (8, 8))
    (tmp_path / "prompts.txt").write_text("a blue bird\na red cat\ntwo dogs\n")
    given = ["--given", f"text={tmp_path / 'prompts.txt'}", "--number", "3", "--steps", "2", "--guidance", "2"]
    assert main(["sample", *use, *given, "--out", str(tmp_path / "few")]) == 0
    assert main(["sample", *use, *given, "--out", str(tmp_path / "set"), "--format", "png", "--batch", "3"]) == 0
    for i in range(3):
        few, of_set = (np.asarray(Image.open(tmp_path / place)) for place in (f"few/{name}/0000{i}.png", f"set/images/00000{i}.png"))
        np.testing.assert_array_equal(few, of_set)


def build(path, *overrides):
    config, module = configs.load(path, [tuple(each.split("=", 1)) for each in overrides])
    return module.build(config)
