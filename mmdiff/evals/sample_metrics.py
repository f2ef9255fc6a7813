"""FID and its kin: samples against a reference, by the features of one published network, with the convention that a value depends on.

Names say the network: FID, sFID, IS, precision, recall and KID are of Inception's features, FD-DINOv2 and DINOv2-... of DINOv2's, and
lite0-FD and lite0-... of EfficientNet-Lite0's, whose weights a package brings (the extra `features`). Values of two networks, two counts or
two ways of resizing are not comparable.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mmdiff import __version__, console, hosts
from mmdiff.encoders.efficientnet_lite0 import installed_weights
from mmdiff.encoders.published_networks import Encoder, open_encoder
from mmdiff.errors import UserError
from mmdiff.evals.feature_metrics import SEED, inception_score, kernel_distance, precision_recall
from mmdiff.evals.frechet import Moments, bias, squared_distance
from mmdiff.evals.image_features import features_of
from mmdiff.evals.image_pairs import psnr, ssim
from mmdiff.evals.image_sets import ImageSet, Statistics, write_statistics
from mmdiff.evals.streaming import count_of

K, SPLITS, SUBSETS, SUBSET = 3, 10, 100, 1000
AT_ONCE, AT_ONCE_CPU = 64, 8  # images on each device: on a CPU Inception takes 0.2 GB for each
DEFAULT = "efficientnet_lite0"


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """Which outputs of a network are measured, and what the metrics are called: `distance`, and others behind `prefix`.

    `resize`, if any, replaces that of the network's own preprocessing; `missing` says where its weights are; `called` names the features of
    a network that has several sizes.
    """

    features: str
    distance: str
    prefix: str
    logits: str | None = None
    spatial: str | None = None
    resize: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    missing: str = ""
    called: str = ""

    @property
    def outputs(self) -> list[str]:
        return [name for name in (self.features, self.spatial, self.logits) if name]


NETWORKS = {
    "inception": FeatureNetwork(
        "2048", "FID", "", "logits_unbiased", "spatial",
        missing="pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or torch-fidelity's weights-inception-2015-12-05-6726825d.pth"),
    "efficientnet_lite0": FeatureNetwork("1280", "lite0-FD", "lite0-", "logits"),
    "dinov2": FeatureNetwork(  # dgm-eval resizes the whole image, by Pillow's bicubic kernel on 8 bits
        "cls", "FD-DINOv2", "DINOv2-", resize={"resize": "square", "shortest": 0},
        called="cls of {net.num_hidden_layers} layers, {net.hidden_size}",
        missing="dinov2_vitl14_pretrain.pth for tables, or the folder of transformers' facebook/dinov2-large"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collected:
    """What is kept of a set of images: moments by "mu" and "mu_s", how many each counts (None: unknown), features and logits or None."""

    moments: Mapping[str, tuple[np.ndarray, np.ndarray]]
    counts: Mapping[str, int | None]
    features: np.ndarray | None = None
    logits: np.ndarray | None = None


def open_network(kind: str = DEFAULT, path: str = "") -> Encoder:
    """A network of NETWORKS with the preprocessing of its metric. Raises UserError: another kind, no weights, as `open_encoder`."""
    if kind not in NETWORKS:
        raise UserError(f"features are measured by the networks {', '.join(NETWORKS)}, not {kind!r}.")
    if not path and kind != DEFAULT:
        raise UserError(f"the weights of {kind} do not come with a package: give the path of {NETWORKS[kind].missing}.")
    encoder = open_encoder(kind, path or installed_weights())
    return dataclasses.replace(encoder, preprocessing=dataclasses.replace(encoder.preprocessing, **NETWORKS[kind].resize))


def convention(encoder: Encoder) -> dict[str, Any]:
    """What features depend on, as JSON values: the network, its weights, how images are resized, and versions."""
    versions = {"mmdiff": __version__, **{name: importlib.metadata.version(name) for name in ("jax", "numpy", "pillow")}}
    resize = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(encoder.preprocessing).items()}
    features = NETWORKS[encoder.kind].called.format(net=encoder.net) or NETWORKS[encoder.kind].features
    return {
        "network": encoder.kind, "weights": encoder.fingerprint, "features": features, "preprocessing": resize, "precision": "float32",
        "versions": versions}  # fmt: skip


def collect(encoder: Encoder, batches: Iterable[np.ndarray], keep: bool = True) -> Collected:
    """The features of images uint8 [n, H, W, 3] that come some at a time; moments in float64; features and logits are kept or not.

    Of several processes each gives the images of its part (`hosts.part`), and gets what all have found.

    Raises:
      UserError: fewer than two images.
    """
    network = NETWORKS[encoder.kind]
    features = features_of(encoder, network.outputs, _at_once())
    names = {"mu": network.features, "mu_s": network.spatial}
    sums, kept = {mean: Moments() for mean, name in names.items() if name}, {network.features: [], network.logits: []}
    for images in batches:
        found = features(images)
        for mean, moments in sums.items():
            moments.add(found[names[mean]])
        for name in kept if keep else ():
            if name:
                kept[name].append(found[name])
    if jax.process_count() > 1:
        sums = {mean: moments.of_all() for mean, moments in sums.items()}
    total = sums["mu"].count
    if total < 2:
        raise UserError(f"{total} image{'s' * (total != 1)} cannot be measured: two or more make a covariance.")
    empty = np.zeros((0, 0), np.float32)  # of a process without images
    arrays = {name: hosts.joined(np.concatenate(parts) if parts else empty) for name, parts in kept.items() if keep and name}
    moments = {mean: (found.mean, found.covariance) for mean, found in sums.items()}
    return Collected(moments, dict.fromkeys(sums, total), arrays.get(network.features), arrays.get(network.logits))


def compare(kind: str, samples: Collected, reference: Collected) -> tuple[dict[str, float], dict[str, str], dict[str, Any]]:
    """-> (metrics, their definitions, settings). What a reference of statistics alone does not allow is left out."""
    network, metrics, texts = NETWORKS[kind], {}, {}
    n, prefix = samples.counts["mu"], network.prefix

    def found(name, value, text):
        metrics[name], texts[name] = value, text

    for mean, name in (("mu", network.distance), ("mu_s", f"s{network.distance}")):
        if mean in samples.moments and mean in reference.moments:
            (m1, c1), (m2, c2) = samples.moments[mean], reference.moments[mean]
            _same_length(m1, m2, kind)
            others = reference.counts.get(mean)
            of = f"{n:,} samples, {others:,} reference images" if others else f"{n:,} samples, stored statistics"
            found(name, squared_distance(m1, c1, m2, c2), f"squared Fréchet distance of {kind}'s features; {of}")
            if mean == "mu":
                count_bias = bias(c2)
                both = count_bias / n + (count_bias / others if others else 0.0)
                found(f"{name}_bias", both, "by how much at least these counts raise it (K / n of each set): compare equal counts only")
    settings: dict[str, Any] = {"samples": n, "reference_moments": reference.counts.get("mu")}
    if samples.logits is not None and n >= SPLITS:
        mean, std = inception_score(samples.logits, SPLITS)
        found(f"{prefix}IS", mean, f"Inception Score by {kind}, the mean of {SPLITS} splits, shuffled; {n:,} samples")
        found(f"{prefix}IS_std", std, "its standard deviation over the splits")
        settings |= {"IS_splits": SPLITS, "IS_seed": SEED}
    if samples.features is None or reference.features is None:
        return metrics, texts, settings
    m = len(reference.features)
    settings["reference_images"] = m
    if min(n, m) > K:
        precision, recall = precision_recall(samples.features, reference.features, K)
        of = f"by balls to the {K}rd neighbour among {kind}'s features; {n:,} samples, {m:,} reference images"
        found(f"{prefix}precision", precision, f"share of samples on the reference's manifold {of}")
        found(f"{prefix}recall", recall, f"share of reference images on the samples' manifold {of}")
        settings["k"] = K
    size = min(SUBSET, n, m)
    value, std = kernel_distance(samples.features, reference.features, SUBSETS, size)
    found(f"{prefix}KID", value, f"unbiased squared MMD, cubic kernel, {kind}'s features; mean of {SUBSETS} subsets of {size:,}")
    found(f"{prefix}KID_std", std, "its standard deviation over the subsets")
    settings |= {"KID_subsets": SUBSETS, "KID_subset_size": size, "KID_seed": SEED}
    return metrics, texts, settings


def of_reference(encoder: Encoder, images: ImageSet | None, statistics: Statistics | None) -> Collected:
    """What a reference gives: moments of its statistics where there are some, everything else of its images.

    Raises:
      UserError: statistics of another network, other weights or another way of resizing.
    """
    found = collect(encoder, batches(images)) if images else Collected({}, {})
    if statistics is None:
        return found
    here, there = convention(encoder), statistics.convention
    if not there and encoder.kind != "inception":
        raise UserError(f"{statistics.path} does not say whose features it describes: such files are of Inception (--network inception).")
    for name in ("network", "weights", "preprocessing"):
        if there and there.get(name) != here[name]:
            other = f"{name} {there.get(name)}, here {here[name]}"
            raise UserError(f"{statistics.path} has statistics of another convention ({other}): make them again, or choose its network.")
    counts = {**found.counts, **dict.fromkeys(statistics.moments, statistics.count)}
    return Collected({**found.moments, **statistics.moments}, counts, found.features)


def _at_once() -> int:
    return AT_ONCE_CPU if jax.default_backend() == "cpu" else AT_ONCE


def batches(images: ImageSet) -> Iterator[np.ndarray]:
    """This process's part of the images of a set, as many at a time as its devices take, with the progress shown; two or more."""
    if images.count < 2:
        raise UserError(f"{images.path} has {images.count} image: two or more can be measured.")
    size, mine = _at_once() * jax.local_device_count(), hosts.part(images.count)
    turns = range(count_of(len(mine), size))
    for _, part in zip(console.progress(turns, "batch") if hosts.is_first() else turns, images.read(size, mine)):
        yield part


def measure_files(
    samples: ImageSet, reference: tuple[ImageSet | None, Statistics | None], encoder: Encoder, paired: bool = False
) -> tuple[dict[str, float], dict[str, str], dict[str, Any]]:
    """Samples against a reference, as `open_reference` gives it -> (metrics, their definitions, the convention).

    Args:
      paired: sample i reconstructs image i of the reference: PSNR and SSIM, too, and the distance is called rFID (lite0-rFD, ...).

    Raises:
      UserError: images of another size than the reference's; what cannot be paired; see `of_reference`.
    """
    images, statistics = reference
    stated = statistics.convention.get("image_size") if statistics else None  # others' files do not say it
    of_statistics = [(statistics.path, tuple(stated))] if isinstance(stated, list) and len(stated) == 2 else []
    for path, size in [*([(images.path, images.size)] if images else []), *of_statistics]:
        if size != samples.size:
            sizes = [f"{path} has {size[0]} x {size[1]} pixels" for path, size in ((samples.path, samples.size), (path, size))]
            raise UserError(f"{' and '.join(sizes)}: crop and resize the reference as the training data were (--size for folders).")
    if paired and (images is None or images.count != samples.count):
        count = 0 if images is None else images.count
        raise UserError(f"{samples.count:,} samples cannot be paired with {count:,} reference images: sample i is to reconstruct image i.")
    metrics, texts = {}, {}
    if paired:
        originals = images.read(_at_once() * jax.local_device_count(), hosts.part(images.count))
        pairs = [np.stack([psnr(a, b), ssim(a, b)], 1) for a, b in zip(batches(samples), originals)]
        metrics = dict(zip(("PSNR", "SSIM"), hosts.joined(np.concatenate([np.zeros((0, 2)), *pairs])).mean(0).tolist()))
        texts = {"PSNR": f"decibels, of uint8 images, the mean of {samples.count:,} pairs", "SSIM": "Gaussian window of 11 x 11, sigma 1.5"}
    compared = of_reference(encoder, *reference)
    found, definitions, settings = compare(encoder.kind, collect(encoder, batches(samples)), compared)
    if paired:
        name = NETWORKS[encoder.kind].distance
        renamed = name.replace("F", "rF", 1)
        found, definitions = ({key.replace(name, renamed): value for key, value in each.items()} for each in (found, definitions))
    return {**metrics, **found}, {**texts, **definitions}, {**convention(encoder), **settings, "image_size": list(samples.size)}


def store_statistics(path: str, images: ImageSet, encoder: Encoder) -> None:
    """The moments of a set's features in a file that is a reference from then on."""
    found = collect(encoder, batches(images), keep=False)
    if hosts.is_first():
        write_statistics(path, found.moments, {**convention(encoder), "count": images.count, "image_size": list(images.size)})


def _same_length(first: np.ndarray, second: np.ndarray, kind: str) -> None:
    if first.shape != second.shape:
        raise UserError(f"the reference's statistics have {len(second)} features, {kind} has {len(first)}: they are of another network.")

