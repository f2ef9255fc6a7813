"""Parameters of a network whose modules carry the published names, from and to a published state dict.

A frozen published network is written with its published names: linen's path, joined by dots, is the key. Only the last part differs:

    .../kernel [in, out]          <-> ....weight [out, in]
    .../kernel [h, w, in, out]    <-> ....weight [out, in, h, w]
    .../scale, .../embedding      <-> ....weight
    anything else (bias, class_embedding, running_mean, ...) <-> the same name and layout

A module whose name has `#` for the number of a layer is a scan over layers: its parameters lie on the first axis, its keys count 0, 1, ...;
with `#4` they count 4, 5, ...
Other published layouts are renamed to this one before (see each network's `canonical`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax
import numpy as np

from mmdiff.convert.tensors import Tensor, is_float, stack
from mmdiff.errors import UserError

KERNELS = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}  # linen -> PyTorch
WEIGHTS = ("kernel", "scale", "embedding")


def key_of(path: tuple[str, ...]) -> str:
    """The published key of a parameter's path (without the collection)."""
    return ".".join((*path[:-1], "weight" if path[-1] in WEIGHTS else path[-1]))


def numbered(key: str, layer: int) -> str:
    """The key of a layer of a scan, counted from 0 there.

    >>> numbered("blocks.#.proj", 1), numbered("blocks.#4.proj", 1)
    ('blocks.1.proj', 'blocks.5.proj')
    """
    return re.sub(r"#(\d*)", lambda first: str(layer + int(first[1] or 0)), key)


def expected(params: Any) -> dict[str, tuple[int, ...]]:
    """Published keys and shapes of parameters (arrays or `jax.ShapeDtypeStruct`)."""
    found = {}
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        key, shape = key_of(path), tuple(leaf.shape)
        layers, shape = (range(shape[0]), shape[1:]) if "#" in key else ((0,), shape)
        if path[-1] == "kernel":
            shape = tuple(shape[axis] for axis in KERNELS[len(shape)])
        found |= {numbered(key, layer): shape for layer in layers}
    return found


def load_params(
    abstract: Any, weights: Mapping[str, Tensor], name: str, *, ignore: Iterable[str] = (),
    place: Callable[[tuple[str, ...], Tensor, Any], Any] | None = None,
) -> Any:  # fmt: skip
    """Parameters of a network from a state dict in its own layout, leaf by leaf.

    Args:
      abstract: the network's parameters as `jax.eval_shape` of its `init` gives them (without the collection's name).
      weights: key -> tensor.
      name: what the weights are, for errors: a file or folder.
      ignore: ends of keys that are dropped where they occur (buffers).
      place: (path, tensor of the leaf's shape and type, abstract leaf) -> the array; by default NumPy values.

    Raises:
      UserError: missing or unexpected keys, other shapes: the first five and a count; numbers that are no floats, or not finite.
    """
    weights = {key: tensor for key, tensor in weights.items() if not key.endswith(tuple(ignore))}
    shapes = expected(abstract)
    missing = [key for key in shapes if key not in weights]
    if missing:
        raise UserError(f"{name} lacks {_some(missing)}: it holds another network, or one of other sizes.")
    extra = [key for key in weights if key not in shapes]
    if extra:
        raise UserError(f"{name} has {_some(extra)}, which the network has no place for: it holds another network, or one of other sizes.")
    wrong = [f"{key} {list(weights[key].shape)} for {list(shape)}" for key, shape in shapes.items() if weights[key].shape != shape]
    if wrong:
        raise UserError(f"{name} has other shapes than the network: {_some(wrong)}.")
    check_floats({key: weights[key] for key in shapes}, name)
    place = place or (lambda path, tensor, leaf: tensor.read())
    placed = {}
    for path, leaf in flax.traverse_util.flatten_dict(abstract).items():
        tensor = finite(_to_linen(path, leaf, weights), f"{name} has values that are not finite, of {key_of(path)}")
        try:
            placed[path] = place(path, tensor, leaf)
        except UserError:
            raise
        except ValueError as error:  # what a layout has turned or regrouped has other axes in the file
            raise UserError(f"{name} has other axes than such weights, of {key_of(path)}: it is damaged, or of another network.") from error
    return flax.traverse_util.unflatten_dict(placed)


def check_floats(weights: Mapping[str, Tensor], name: str) -> None:
    """Raises UserError for weights that are integers (of a quantised file: their scales are elsewhere), booleans or complex numbers."""
    wrong = [f"{key} ({tensor.dtype})" for key, tensor in weights.items() if not is_float(tensor.dtype)]
    if wrong:
        raise UserError(f"{name} has numbers that are no floats, as weights are: {_some(wrong)}. Get them in float32, not quantised.")


def finite(tensor: Tensor, otherwise: str) -> Tensor:
    """The tensor, of which a part that is read and is not finite raises a UserError."""

    def read(index):
        part = np.asarray(tensor.read_part(index))
        with np.errstate(over="ignore", invalid="ignore"):
            total = part.sum()  # one pass without another array, which a sum that overflows needs, too
        if not np.isfinite(total) and not np.isfinite(part).all():
            raise UserError(f"{otherwise}: get the weights again, in float32.")
        return part

    return Tensor(tensor.shape, tensor.dtype, read)


def state_dict(params: Any) -> dict[str, np.ndarray]:
    """Parameters -> contiguous arrays by published key: the inverse of `load_params`, bit for bit."""
    # In memory order, which some writers store under the shape of a view.
    return {key: np.asarray(tensor.read(), order="C") for key, tensor in tensors(params).items()}


def tensors(params: Any) -> dict[str, Tensor]:
    """As `state_dict`, read on demand: layer by layer from the devices."""
    found = {}
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        key = key_of(path)
        for layer in range(leaf.shape[0]) if "#" in key else (None,):
            found[key if layer is None else numbered(key, layer)] = _published(path, leaf, layer)
    return found


def _published(path, leaf, layer):
    shape = tuple(leaf.shape if layer is None else leaf.shape[1:])
    tensor = Tensor(shape, np.dtype(leaf.dtype), lambda index: np.asarray(leaf if layer is None else leaf[layer])[index])
    return tensor.transpose(*KERNELS[len(shape)]) if path[-1] == "kernel" else tensor


def _to_linen(path, leaf, weights):
    key = key_of(path)
    tensors = [weights[numbered(key, layer)].astype(leaf.dtype) for layer in (range(leaf.shape[0]) if "#" in key else (0,))]
    if path[-1] == "kernel":
        tensors = [tensor.transpose(*np.argsort(KERNELS[tensor.ndim])) for tensor in tensors]
    return stack(tensors) if "#" in key else tensors[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
