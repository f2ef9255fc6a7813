"""`mmdiff eval --samples`: any model's samples against a reference, by a small network in the place of the published ones."""

import dataclasses
import io
import json
import types
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmdiff.__main__ import main
from mmdiff.encoders import preprocessing
from mmdiff.encoders.dinov2 import DINOv2
from mmdiff.errors import UserError
from mmdiff.evals import sample_metrics
from mmdiff.evals.feature_metrics import inception_score, kernel_distance, precision_recall
from mmdiff.evals.frechet import bias, frechet_distance
from mmdiff.evals.image_pairs import psnr, ssim
from mmdiff.evals.image_sets import open_images, open_reference
from mmdiff.evals.sample_metrics import collect, compare


class Halves(nn.Module):
    """Features: means over the upper and the lower half, and their products, with every name that networks have."""

    def features(self, images):
        halves = images.reshape(len(images), 2, -1, 3).mean(2).reshape(len(images), 6)
        both = jnp.concatenate([halves, halves[:, :1] * halves[:, 3:]], -1)
        return {"2048": both, "1280": both, "spatial": both[:, ::2], "logits_unbiased": 5 * both, "logits": 5 * both}


def encoder_of(kind):
    preprocess = preprocessing.Preprocessing(8, "square", divisor=127.5, mean=1.0)
    return types.SimpleNamespace(kind=kind, net=Halves(), params={}, preprocessing=preprocess, fingerprint=f"of {kind}")


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setattr(sample_metrics, "open_network", lambda kind, path: encoder_of(kind))


@pytest.fixture(scope="module")
def images():
    stream = np.random.default_rng(0)
    colours = stream.normal(128, 40, (2, 60, 1, 1, 3)) + stream.normal(0, 30, (2, 60, 16, 16, 3))
    return np.clip(colours, 0, 255).astype(np.uint8)


@pytest.fixture
def files(images, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=images[0], arr_1=np.arange(60) % 10)
    np.savez_compressed(tmp_path / "real.npz", arr_0=images[1])
    return tmp_path


def evaluate(folder, *argv):
    return main(["eval", "--samples", str(folder / "samples.npz"), *argv])


def measured(folder, *argv):
    assert evaluate(folder, "--json", str(folder / "out.json"), *argv) == 0
    return json.loads((folder / "out.json").read_text())


def test_samples_are_measured_by_the_published_definitions(files, images, capsys):
    found = measured(files, "--reference", str(files / "real.npz"), "--network", "inception", "--weights", "x")
    metrics, convention = found["metrics"], found["convention"]
    made, real = (collect(encoder_of("inception"), [part]) for part in images)
    assert metrics["FID"] == pytest.approx(frechet_distance(made.features, real.features), rel=1e-9)
    assert metrics["sFID"] == pytest.approx(frechet_distance(made.features[:, ::2], real.features[:, ::2]), rel=1e-9)
    assert metrics["FID_bias"] == pytest.approx(2 * bias(np.cov(real.features.T.astype(np.float64))) / 60, rel=1e-6)
    assert (metrics["IS"], metrics["IS_std"]) == pytest.approx(inception_score(made.logits), rel=1e-6)
    assert (metrics["precision"], metrics["recall"]) == precision_recall(made.features, real.features)
    assert (metrics["KID"], metrics["KID_std"]) == pytest.approx(kernel_distance(made.features, real.features, 100, 60), rel=1e-6, abs=1e-9)
    known = {
        "network": "inception", "weights": "of inception", "samples": 60, "reference_moments": 60, "reference_images": 60, "k": 3,
        "IS_splits": 10, "KID_subsets": 100, "KID_subset_size": 60, "KID_seed": 2020, "image_size": [16, 16]}  # fmt: skip
    assert known.items() <= convention.items() and convention["preprocessing"]["resize"] == "square"
    assert set(found["definitions"]) == set(metrics) and {"jax", "numpy", "pillow"} <= set(convention["versions"])
    assert "FID " in (out := capsys.readouterr().out) and "60 samples, reference real.npz; inception (2048), weights of inception" in out


def test_the_default_network_measures_no_fid(files):
    found = measured(files, "--reference", str(files / "real.npz"))["metrics"]
    assert set(found) == {f"lite0-{name}" for name in ("FD", "FD_bias", "IS", "IS_std", "precision", "recall", "KID", "KID_std")}


def test_stored_statistics_are_a_reference(files, images, capsys):
    out = str(files / "statistics.npz")
    assert main(["eval", "--samples", str(files / "real.npz"), "--network", "inception", "--write-statistics", out]) == 0
    stored = np.load(out)  # the published evaluator's names: np.load(path)["mu"], ...
    assert stored["mu"].dtype == stored["sigma"].dtype == np.float64
    shapes = {"mu": (9,), "sigma": (9, 9), "mu_s": (5,), "sigma_s": (5, 5)}
    assert {name: stored[name].shape for name in shapes} == shapes
    real = collect(encoder_of("inception"), [images[1]])
    np.testing.assert_allclose(stored["sigma"], np.cov(real.features.T.astype(np.float64)), rtol=1e-6, atol=1e-9)
    direct = measured(files, "--reference", str(files / "real.npz"), "--network", "inception")["metrics"]
    found = measured(files, "--reference", out, "--network", "inception")
    assert found["convention"]["reference_moments"] == 60
    assert set(found["metrics"]) == {"FID", "sFID", "FID_bias", "IS", "IS_std"}
    for name, value in found["metrics"].items():
        assert value == pytest.approx(direct[name], rel=1e-9)
    np.savez(files / "samples.npz", arr_0=images[0][:, ::2, ::2])
    assert evaluate(files, "--reference", out, "--network", "inception") == 2
    assert "statistics.npz has 16 x 16 pixels: crop and resize the reference" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["samples.npz", "images"])
def test_the_folder_of_a_set_of_samples_is_its_images(files, images, form):
    folder = files / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "samples.json").write_text('{"whole": true}')
    Image.new("RGB", (64, 64)).save(folder / "samples.png")  # the grid, which is no sample
    if form == "images":
        for i, image in enumerate(images[0]):
            Image.fromarray(image).save(folder / form / f"{i:06}.png")
    else:
        np.savez(folder / form, arr_0=images[0])
    np.testing.assert_array_equal(np.concatenate(list(open_images(folder, 16).read(25))), images[0])
    found, statistics = open_reference(folder)
    assert (found.count, statistics) == (60, None)
    for settings in ('{"whole": false}', "[1]"):  # killed while numbered files were written
        (folder / "samples.json").write_text(settings)
        with pytest.raises(UserError, match="holds a set of samples that is not whole: run the same mmdiff sample again"):
            open_images(folder, 16)


def test_a_grid_is_no_sample(files, images):
    """Without --format `mmdiff sample` writes its images, and beside them a grid of them."""
    (files / "image").mkdir()
    Image.fromarray(images[0][0]).save(files / "image/00000.png")
    Image.new("RGB", (64, 64)).save(files / "samples.png")
    with pytest.raises(UserError, match="holds a few samples to be looked at: write a set of images, mmdiff sample --format npz"):
        open_images(files, 16)
    assert open_images(files / "image").count == 1


def test_adms_reference_has_statistics_of_all_and_images_of_some(files, images):
    mean, covariance = np.linspace(-1, 1, 9), np.diag(np.linspace(0.1, 1, 9))
    np.savez(files / "adm.npz", arr_0=images[1][:20], mu=mean, sigma=covariance, mu_s=mean[::2], sigma_s=covariance[::2, ::2])
    found = measured(files, "--reference", str(files / "adm.npz"), "--network", "inception")
    made = collect(encoder_of("inception"), [images[0]])
    real = collect(encoder_of("inception"), [images[1][:20]])
    statistics = sample_metrics.Collected({"mu": (mean, covariance)}, {})
    assert found["metrics"]["FID"] == pytest.approx(compare("inception", made, statistics)[0]["FID"])
    assert found["metrics"]["precision"] == precision_recall(made.features, real.features)[0]
    assert found["convention"]["reference_moments"] is None and found["convention"]["reference_images"] == 20


def test_a_file_a_folder_and_any_batches_give_the_same(files, images):
    for i, image in enumerate(images[1]):
        (files / "folder" / "class").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(files / "folder" / "class" / f"{i:03}.png")
    np.save(files / "real.npy", images[1])
    expected = measured(files, "--reference", str(files / "real.npz"))["metrics"]
    for other in ("folder", "real.npy"):
        assert measured(files, "--reference", str(files / other))["metrics"] == expected
    for at_once in (1, 7, 60, 100):
        for path in ("real.npz", "real.npy", "folder"):
            parts = list(open_images(files / path).read(at_once))
            assert max(map(len, parts)) == min(at_once, 60)
            np.testing.assert_array_equal(np.concatenate(parts), images[1])
    wide = files / "wide"
    wide.mkdir()
    Image.fromarray(np.concatenate([images[0][0], images[0][1]], 1)).save(wide / "0.png")
    assert next(open_images(wide, 8).read(1)).shape == (1, 8, 8, 3)


def test_pairs_have_psnr_ssim_and_rfid(files, images):
    found = measured(files, "--reference", str(files / "real.npz"), "--network", "inception", "--paired")["metrics"]
    assert found["PSNR"] == pytest.approx(psnr(*images).mean()) and found["SSIM"] == pytest.approx(ssim(*images).mean())
    assert found["rFID"] == measured(files, "--reference", str(files / "real.npz"), "--network", "inception")["metrics"]["FID"]
    assert {"rFID", "rFID_bias", "srFID"} <= set(found) and "FID" not in found


GOOD = np.zeros((5, 16, 16, 3), np.uint8)
STATISTICS = {"mu": np.zeros(9), "sigma": np.eye(9)}


@pytest.mark.parametrize("samples, reference, words", [
    ({"arr_0": GOOD / 255}, {}, "float64 [5, 16, 16, 3], no uint8 images: store uint8 RGB"),
    ({"arr_0": GOOD[..., 0]}, {}, "holds grey images: uint8 [5, 16, 16]"),
    ({"arr_0": GOOD[..., :1]}, {}, "holds grey images"),
    ({"arr_0": GOOD.transpose(0, 3, 1, 2)}, {}, "no RGB images [n, H, W, 3]: uint8 [5, 3, 16, 16]"),
    ({"arr_0": GOOD[:0]}, {}, "no RGB images [n, H, W, 3]: uint8 [0, 16, 16, 3]"),
    ({"images": GOOD}, {}, "has no entry 'arr_0': it holds images"),
    ({"arr_0": np.asfortranarray(GOOD)}, {}, "Fortran's order"),
    ({"arr_0": np.array([None])}, {}, "no uint8 images"),
    ({"arr_0": GOOD[:1]}, {}, "has 1 image: two or more"),
    ({}, {"images": GOOD}, "has neither images (arr_0) nor statistics (mu, sigma): it holds images"),
    ({}, {"arr_0": GOOD[:, :8, :8]}, "real.npz has 8 x 8 pixels: crop and resize the reference"),
    ({}, {"arr_0": GOOD[:1]}, "real.npz has 1 image: two or more can be measured"),
    ({}, {"mu": np.zeros(9)}, "has mu without sigma"),
    ({}, {"mu": np.zeros(9), "sigma": np.eye(8)}, "float64 [9] and sigma float64 [8, 8]: they must be the mean [d]"),
    ({}, {"mu": np.zeros(9, int), "sigma": np.eye(9)}, "has mu int64"),
    ({}, STATISTICS | {"sigma": np.full((9, 9), np.nan)}, "values in mu or sigma that are not finite"),
    ({}, STATISTICS | {"sigma": np.triu(np.ones((9, 9)))}, "sigma that is not symmetric"),
    ({}, STATISTICS | {"convention": np.array("{")}, "has a convention that cannot be read"),
    ({}, STATISTICS | {"convention": np.array('{"network": "dinov2"}')}, "of another convention (network dinov2, here inception)"),
    ({}, {"mu": np.zeros(7), "sigma": np.eye(7)}, "the reference's statistics have 7 features, inception has 9"),
])  # fmt: skip
def test_bad_files_are_sentences(files, capsys, samples, reference, words):
    for name, arrays in (("samples", samples), ("real", reference)):
        if arrays:
            np.savez(files / f"{name}.npz", **arrays)
    assert evaluate(files, "--reference", str(files / "real.npz"), "--network", "inception") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_damaged_files_are_sentences(files, capsys):
    content = (files / "samples.npz").read_bytes()
    flipped = content[:9000] + bytes([content[9000] ^ 1]) + content[9001:]  # its checksum is wrong
    for damaged in (content[: len(content) // 2], flipped, b"PK", b""):
        (files / "samples.npz").write_bytes(damaged)
        assert evaluate(files, "--reference", str(files / "real.npz")) == 2
        assert "samples.npz is not a NumPy file that can be read" in capsys.readouterr().err
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (9000000, 9000, 9000, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(files / "large.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue())
    with pytest.raises(UserError, match="claims 2,187,000,000,000,000 bytes and has 128"):
        open_images(files / "large.npz")
    np.savez(files / "small.npz", mu=np.zeros(9), sigma=np.eye(9))
    assert main(["eval", "--samples", str(files / "real.npz"), "--reference", str(files / "small.npz")]) == 2
    assert "does not say whose features" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such file"):
        open_reference(files / "absent.npz")
    (files / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_images(files / "empty")
    for i, side in enumerate((16, 8)):
        Image.new("RGB", (side, side)).save(files / "empty" / f"{i}.png")
    with pytest.raises(UserError, match=r"1.png has 8 x 8 pixels, and 0.png 16 x 16: crop all to one size \(--size\)"):
        list(open_images(files / "empty").read(2))


@pytest.mark.parametrize("argv, words", [
    ("eval", "required: --config, --workdir"),
    ("eval --config digits_joint", "required: --workdir"),
    ("eval --config digits_joint --workdir x --reference y", "--reference goes with --samples: give both"),
    ("eval --samples x", "--samples are measured against --reference, or stored by --write-statistics: give one of both"),
    ("eval --samples x --reference y --write-statistics z", "give one of both"),
    ("eval --samples x --write-statistics z --json j", "--json goes with --reference"),
    ("eval --samples x --reference y --workdir z", "--workdir goes with a run, not with --samples: leave it out"),
    ("eval --samples x --reference y --config.seed=1", "--config.KEY=VALUE goes with a run"),
    ("eval --samples x --reference y --network vgg", "invalid choice: 'vgg'"),
    ("eval --samples SAMPLES --reference REAL --paired", "60 samples cannot be paired with 59 reference images"),
    ("eval --samples SAMPLES --reference REAL --size 8", "has images of 16 x 16 pixels: --size 8 crops those of folders only"),
    ("eval --samples SAMPLES --write-statistics SAMPLES", "would overwrite what is measured"),
    ("eval --samples SAMPLES --reference REAL --json REAL", "would overwrite what is measured"),
    ("eval --samples nope://a/b.npz --reference y", "no address"),
])  # fmt: skip
def test_wrong_options_are_sentences(files, images, capsys, argv, words):
    np.savez(files / "real.npz", arr_0=images[1][1:])
    names = {"SAMPLES": str(files / "samples.npz"), "REAL": str(files / "real.npz")}
    assert main([names.get(word, word) for word in argv.split()]) == 2
    assert words in capsys.readouterr().err


def test_dinov2_measures_its_class_token_of_whole_images_resized():
    net = DINOv2(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    preprocess = dataclasses.replace(preprocessing.DINOV2, **sample_metrics.NETWORKS["dinov2"].resize, size=28)
    encoder = types.SimpleNamespace(kind="dinov2", net=net, params=params, preprocessing=preprocess, fingerprint="x")
    images = np.random.default_rng(0).integers(0, 256, (9, 30, 60, 3), np.uint8)
    found = collect(encoder, [images[:4], images[4:]])
    resized = [np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC)) for image in images]  # dgm-eval's
    normal = (np.float32(resized) / 255 - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found.features, net.apply({"params": params}, normal)["cls"], atol=1e-5)
    assert set(found.moments) == {"mu"} and found.logits is None
    assert set(compare("dinov2", found, found)[0]) == {
        "FD-DINOv2", "FD-DINOv2_bias", "DINOv2-precision", "DINOv2-recall", "DINOv2-KID", "DINOv2-KID_std"}  # fmt: skip
    assert sample_metrics.convention(encoder)["features"] == "cls of 1 layers, 8"


@pytest.mark.slow
def test_the_installed_network(monkeypatch, files, images):
    monkeypatch.undo()
    found = measured(files, "--reference", str(files / "samples.npz"))
    assert found["metrics"]["lite0-FD"] == pytest.approx(0, abs=1e-6)
    assert found["metrics"]["lite0-precision"] == found["metrics"]["lite0-recall"] == 1
    assert found["convention"]["preprocessing"]["size"] == 224


def test_weights_that_are_not_there_are_named(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match="the weights of inception do not come with a package: give the path of pt_inception-2015-12-05"):
        sample_metrics.open_network("inception")
    with pytest.raises(UserError, match="features are measured by the networks inception, efficientnet_lite0, dinov2, not 'vgg'"):
        sample_metrics.open_network("vgg")
