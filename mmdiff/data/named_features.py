"""Features of an image's patches where a config names the network: maps [side, side, channels] beside the latents of the same crop.

    "feature_encoder": {"kind": "dinov2", "path": "", "size": 768}                                           all of a patch's features
    "feature_encoder": {"kind": "dinov2", "path": "", "size": 768, "components": 8, "whiten": True}          their principal components

The components are those of the training images, in a file of the cache: FOLDER/components.json, {"mean", "matrix", "explained", ...}.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import files
from mmdiff.data.named_autoencoders import SquareImages, part_of
from mmdiff.data.named_encoders import PART, NamedEncoder
from mmdiff.encoders.dinov2 import bicubic
from mmdiff.encoders.preprocessing import AUTOENCODER
from mmdiff.errors import UserError

COMPONENTS = "components.json"


class ImagePatches(NamedEncoder):
    r"""Images -> the features y of their patches, float32 [n, side, side, channels], row by row.

    An image is cropped as its autoencoder crops it, then resized so that the network sees `grid` x `grid` patches (REPA, Yu et al. 2025),
    with positions resampled as it does. Of `components` > 0 each y is

        (y - mean) matrix,      matrix = diag(1 / std) V, or with `whiten` diag(1 / std) V diag(lambda)^(-1/2),

    V and lambda the first eigenvectors and eigenvalues of the correlations of y over all patches: the features are standardised and
    projected (ReDi, Kouzelis et al. 2025), and whitened each component has the deviation 1, too. Maps are resized from the grid to `side`
    linearly.

    Args:
      section: kind, path, size (numbers in a feature), and perhaps components and whiten.
      crop: the autoencoder.
      grid, side: patches in a row of the image, and of the result.
      folder: of the cache, which has the components.

    Raises:
      UserError: from `encode`, features of another size, or components that are not there.
    """

    kinds, what = ("dinov2",), "feature encoder"

    def __init__(
        self, section: Mapping[str, Any], crop: SquareImages, grid: int, side: int = 0, folder: str = "", key: str = "feature_encoder",
        modality: str = "features",
    ):
        super().__init__(section, key)
        self.crop, self.grid, self.side, self.folder, self.modalities = crop, grid, side or grid, folder, (modality,)
        self.size, self.components, self.whiten = section["size"], section.get("components", 0), section.get("whiten", False)
        if self.components > self.size:
            raise UserError(f"config.{key}.components is {self.components}, of features of {self.size} numbers: it is at most that.")
        self.channels = self.components or self.size

    @property
    def fitted(self) -> str:
        return COMPONENTS if self.components else ""

    @property
    def fitted_for(self) -> dict[str, Any]:
        return {"components": self.components, "whiten": self.whiten, "grid": self.grid}

    @functools.cached_property
    def function(self) -> Any:
        """(network, its variables, cropped images) -> features of patches, at the size that the network takes."""
        return functools.partial(_patches, self.grid * self.opened.net.patch_size)

    def network(self):
        net, params = super().network()
        return net.clone(position_interpolation="antialiased"), params

    def prepare(self, image):
        return self.opened.preprocessing.normalize(dataclasses.replace(AUTOENCODER, size=self.crop.pixels).pixels(image))

    def encode(self, batch):
        maps = self._maps(batch)
        if self.components:
            mean, matrix = self._projection()
            maps = (maps - mean.astype(np.float32)) @ matrix.astype(np.float32)
        if self.side != self.grid:
            resize = np.asarray(jax.image.resize(np.eye(self.grid, dtype=np.float32), (self.side, self.grid), "linear"))
            maps = np.einsum("oi,pj,nijc->nopc", resize, resize, maps, optimize=True)
        return {self.modalities[0]: maps.astype(np.float32)}

    def _maps(self, batch: np.ndarray) -> np.ndarray:
        """All features of prepared images, [n, grid, grid, size]."""
        found = self.call(self.function, batch, min(PART, part_of(self.crop.pixels)))
        if found.shape[-1] != self.size:
            raise UserError(
                f"the {self.what} {self.path} has features of {found.shape[-1]} numbers, but the config needs {self.size}: set "
                f"config.{self.key}.size, or name another one.")
        return found.reshape(len(batch), self.grid, self.grid, self.size)

    def fit(self, batches: Iterable[np.ndarray]) -> dict[str, Any]:
        """Mean and projection of the features of prepared images, and the share of the standardised features' variance of each component.

        Raises:
          UserError: images whose features have fewer components.
        """
        count, total, products = 0, np.zeros(self.size), np.zeros((self.size, self.size))
        for batch in batches:
            maps = self._maps(batch)
            for part in np.array_split(maps, -(-len(maps) // PART)):
                rows = part.reshape(-1, self.size).astype(np.float64)
                count, total, products = count + len(rows), total + rows.sum(0), products + rows.T @ rows
        mean = total / count
        covariance = products / count - np.outer(mean, mean)
        deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
        deviation[deviation < 1e-6] = np.inf  # a number that is always the same
        values, vectors = np.linalg.eigh(covariance / np.outer(deviation, deviation))
        values, vectors = values[::-1][: self.components], vectors[:, ::-1][:, : self.components]
        if values[-1] < 1e-6:
            raise UserError(
                f"the features of {count // self.grid**2:,} images have {int((values >= 1e-6).sum())} components that vary, and the config "
                f"needs {self.components}: encode more images, or set config.{self.key}.components.")
        largest = vectors[np.abs(vectors).argmax(0), np.arange(self.components)]
        matrix = vectors * np.sign(largest) / deviation[:, None] / (np.sqrt(values) if self.whiten else 1.0)
        found = {"mean": mean, "matrix": matrix, "explained": values / np.isfinite(deviation).sum()}
        return {**self.fitted_for, **{name: array.tolist() for name, array in found.items()}}

    def noted(self) -> dict[str, Any] | None:
        return read_components(self.folder)

    def _projection(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean [size], matrix [size, components]) of the cache. Raises UserError where there are none."""
        stored = self._fitting()
        if stored is None:
            raise UserError(f"{COMPONENTS} of a cache has the components of {self.path}: name the cache's folder by config.data.dir.")
        return np.array(stored["mean"]), np.array(stored["matrix"])

    def _fitting(self) -> dict[str, Any] | None:
        """What is noted, if anything is. Raises UserError unless it is what the config asks for."""
        if (stored := self.noted() if self.components else None) is None:
            return None
        matrix, grid = np.array(stored["matrix"]), stored.get("grid", self.grid)
        if matrix.shape != (self.size, self.components) or (stored["whiten"], grid) != (self.whiten, self.grid):
            has = f"{matrix.shape[1]} components of {len(matrix)} numbers, {'' if stored['whiten'] else 'not '}whitened, of {grid} x {grid}"
            raise UserError(
                f"{files.target(self.folder) / COMPONENTS} has {has} patches, and config.{self.key} asks for {self.components} of "
                f"{self.size}, {'' if self.whiten else 'not '}whitened, of {self.grid} x {self.grid}: name the cache written for it.")
        return stored

    def fingerprint(self):
        network, stored = super().fingerprint(), self._fitting()
        return hashlib.sha256(f"{network} {stored['mean']} {stored['matrix']}".encode()).hexdigest() if network and stored else network


def read_components(folder: str | os.PathLike) -> dict[str, Any] | None:
    """FOLDER/components.json, {"encoder": fingerprint, "mean", "matrix", ...}; None without one. Raises UserError for a damaged one."""
    if not folder:
        return None
    path = files.target(folder) / COMPONENTS
    try:
        found = files.read_json(path)
        mean, matrix = (np.asarray(found[name], np.float64) for name in ("mean", "matrix"))
        if not isinstance(found["encoder"], str) or matrix.ndim != 2 or mean.shape != matrix.shape[:1] or not np.isfinite(matrix).all():
            raise ValueError("a mean and a matrix of finite numbers")
        return {"whiten": False, **found}
    except files.Missing:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what mmdiff cache writes ({error}): write the cache again.") from error


def _patches(side, net, variables, images):
    if images.shape[1] != side:
        rows = jnp.asarray(bicubic(images.shape[1], side, images.shape[1] / side), images.dtype)
        images = jnp.einsum("oi,pj,nijc->nopc", rows, rows, images)
    return net.apply(variables, images)["patches"]
