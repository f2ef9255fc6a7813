"""Layouts of published weights: how they name and order what a network of this library has under its own names.

    params = load(DIT, net, abstract, weights, "DiT-XL-2-256x256.pt")
    arrays = state_dict(DIT, net, params)             # bit for bit what was loaded

`convert.published_dit`, `convert.diffusers_dit` and `convert.vq_diffusion` have the layouts themselves.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax
import numpy as np

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor, stack
from mmdiff.errors import UserError

Weights = Mapping[str, Tensor]
Path = tuple[str, ...]
BLOCK = r"block_\d+"


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layout of the weights of a network.

    Attributes:
      names: our modules, "blocks/attention/qkv", and the published ones, "blocks.#.attn.qkv"; `#` counts the blocks.
      read: `(weights, net) -> weights` under the published keys, with our order of rows and columns; it drops what is recomputed.
      write: its inverse, None for a part.
      part: the network begins as the published one and has more: what has no name is left out.
    """

    names: Mapping[str, str]
    read: Callable[[Weights, Any], dict[str, Tensor]]
    write: Callable[[Weights, Any], dict[str, Tensor]] | None
    part: bool = False


def load(
    layout: Layout, net: Any, abstract: Any, weights: Weights, name: str, place: Callable[[Path, Tensor, Any], Any] | None = None
) -> Any:
    """Parameters of `net` from published weights, leaf by leaf.

    Args:
      abstract: the parameters' shapes, as `jax.eval_shape` of `net.init` gives them (without the collection's name); of a layout of
        a `part` the others have no value.
      weights: of the file; `name` says which, in errors.
      place: (our path, tensor, abstract leaf) -> array, as in `state_dicts.load_params`.

    Raises:
      UserError: missing or unexpected keys, other shapes, or what `layout.read` refuses.
    """
    if layout.part:
        flat = flax.traverse_util.flatten_dict(abstract)
        abstract = flax.traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if _module(path) in layout.names})
    ours = {_published(layout, path): path for path in flax.traverse_util.flatten_dict(abstract)}
    try:
        read = layout.read(weights, net)
    except UserError:
        raise
    except (IndexError, ValueError, ZeroDivisionError) as error:  # an axis that is not there, or is empty
        raise UserError(f"{name} has an array with other axes than such weights have: it is damaged, or of another network.") from error
    found = state_dicts.load_params(
        _renamed(layout, abstract), read, name,
        place=None if place is None else lambda path, tensor, leaf: place(ours[path], tensor, leaf))
    return flax.traverse_util.unflatten_dict({ours[path]: leaf for path, leaf in flax.traverse_util.flatten_dict(found).items()})


def tensors(layout: Layout, net: Any, params: Any) -> dict[str, Tensor]:
    """The published state dict of parameters, read on demand.

    Raises:
      UserError: the network has what the layout has no place for.
    """
    return layout.write(state_dicts.tensors(_renamed(layout, params)), net)


def state_dict(layout: Layout, net: Any, params: Any) -> dict[str, np.ndarray]:
    """As `tensors`, contiguous arrays."""
    return {key: np.asarray(tensor.read(), order="C") for key, tensor in tensors(layout, net, params).items()}


def _renamed(layout: Layout, tree: Any) -> Any:
    flat = flax.traverse_util.flatten_dict(tree)
    return flax.traverse_util.unflatten_dict({_published(layout, path): leaf for path, leaf in flat.items()})


def _published(layout: Layout, path: Path) -> Path:
    """Our path -> (the published module, the leaf): of scanned blocks with `#`, of single ones (block_3) with their number.

    The blocks of a divided stack, "from_4/blocks", are the published ones from the fifth on.
    """
    module, section = _module(path), re.fullmatch(r"from_(\d+)", path[0])
    if module not in layout.names:
        raise UserError(f"the published layout has no place for the parameters {'/'.join(path)}, which the network of the config has.")
    first = int(section[1]) if section else 0
    block = next((part.removeprefix("block_") for part in path if re.fullmatch(BLOCK, part)), None)
    return layout.names[module].replace("#", f"#{first or ''}" if block is None else str(first + int(block))), path[-1]


def _module(path: Path) -> str:
    names = path[1:-1] if re.fullmatch(r"from_\d+", path[0]) else path[:-1]
    return "/".join("blocks" if re.fullmatch(BLOCK, name) else name for name in names)


# ---- What layouts are made of ----


def each(weights: Weights, rules: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    """Tensors by key, changed by the rule whose regular expression is the whole key."""

    def changed(key, tensor):
        rule = next((rule for pattern, rule in rules.items() if re.fullmatch(pattern, key)), None)
        return tensor if rule is None else rule(tensor)

    return {key: changed(key, tensor) for key, tensor in weights.items()}


def regrouped(tensor: Tensor, first: int, second: int) -> Tensor:
    """Rows in order (first, second, rest) -> (second, first, rest): the parts q, k, v of all heads to the q, k, v of each head, or back."""

    def function(array):
        return array.reshape(first, second, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    return tensor.map(function)


def joined(tensors: list[Tensor]) -> Tensor:
    """Equal parts along the first axis as one: the inverse of `split`. Raises UserError for parts that are not equal."""
    if len(shapes := dict.fromkeys(tensor.shape for tensor in tensors)) > 1:
        listed = " and ".join(str(list(shape)) for shape in shapes)
        raise UserError(f"weights that are one product or table here have the shapes {listed}: they are of another network or size.")
    return stack(tensors).reshape(len(tensors) * tensors[0].shape[0], *tensors[0].shape[1:])


def renamed(weights: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Tensors whose key begins with a name (`#` stands for a number), under the new name; others keep their keys."""
    patterns = [(re.compile("^" + re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), new) for old, new in names.items()]

    def name(key):
        for pattern, new in patterns:
            if match := pattern.match(key):
                return new.replace("#", match[1] if match.groups() else "#") + key[match.end() :]
        return key

    return {name(key): tensor for key, tensor in weights.items()}
