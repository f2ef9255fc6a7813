"""FID, KID, precision and recall against torch-fidelity, from images in files; and all of them and the Inception Score of arrays."""

import dataclasses

import numpy as np
import pytest
import torch
from originals import features as originals

from mmdiff.evals import sample_metrics
from mmdiff.evals.feature_metrics import inception_score, kernel_distance, precision_recall
from mmdiff.evals.image_sets import open_images, open_reference

LAYER = "64"  # of 72 images, its covariance is whole


def theirs(first, second, size):
    """torch-fidelity's metrics of features, with our names."""
    from torch_fidelity import metric_kid, metric_prc

    options = dict(verbose=False, kid_subset_size=size)
    first, second = torch.as_tensor(first), torch.as_tensor(second)
    prc = metric_prc.prc_features_to_metric(first, second, **options)
    kid = metric_kid.kid_features_to_metric(first.double(), second.double(), **options)
    return {
        "precision": prc["precision"], "recall": prc["recall"],
        "KID": kid["kernel_inception_distance_mean"], "KID_std": kid["kernel_inception_distance_std"]}  # fmt: skip


def their_fid(*sets):
    from torch_fidelity import metric_fid

    statistics = [metric_fid.fid_features_to_statistics(torch.as_tensor(features)) for features in sets]
    return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]


def test_images_in_files(tmp_path, monkeypatch):
    stream = np.random.RandomState(0)
    sets = []
    for name, brightness in (("samples", 200), ("real", 256)):
        colours = stream.random_sample((72, 4, 4, 3)) * brightness
        images = np.clip(np.kron(colours, np.ones((1, 8, 8, 1))) + stream.normal(0, 20, (72, 32, 32, 3)), 0, 255).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
        sets.append(images)
    original = originals._inception([LAYER])[0]
    torch.save(original.state_dict(), tmp_path / "inception.pth")
    with torch.no_grad():
        parts = [[torch.from_numpy(part).permute(0, 3, 1, 2) for part in np.split(images, 9)] for images in sets]
        outputs = [np.concatenate([original(part)[0].numpy() for part in each]) for each in parts]
    expected = theirs(*outputs, 72) | {"FID": their_fid(*outputs)}

    network = dataclasses.replace(sample_metrics.NETWORKS["inception"], features=LAYER, spatial=None, logits=None)  # no more layers run
    monkeypatch.setitem(sample_metrics.NETWORKS, "inception", network)
    encoder = sample_metrics.open_network("inception", str(tmp_path / "inception.pth"))
    samples, reference = open_images(tmp_path / "samples.npz"), open_reference(tmp_path / "real.npz")
    found = sample_metrics.measure_files(samples, reference, encoder)[0]
    for name, value in expected.items():
        print(name, found[name], value)
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("width", [16, 2048])
def test_features_and_logits_of_known_laws(width):
    from torch_fidelity import metric_isc

    stream = np.random.RandomState(1)
    first, second = (np.float32(np.abs(stream.normal(size=(400, width)) * np.linspace(0.1, 1, width) + shift)) for shift in (0.0, 0.05))
    logits = np.float32(stream.normal(size=(403, 50)) * 3)
    score = metric_isc.isc_features_to_metric(torch.as_tensor(logits))
    expected = theirs(first, second, 150) | {"IS": score["inception_score_mean"], "IS_std": score["inception_score_std"]}
    kid = kernel_distance(first, second, 100, 150)
    found = dict(zip(("precision", "recall"), precision_recall(first, second))) | {"KID": kid[0], "KID_std": kid[1]}
    found |= dict(zip(("IS", "IS_std"), inception_score(logits)))
    for name, value in found.items():
        print(width, name, value, expected[name])
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-6)

