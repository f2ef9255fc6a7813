"""Tensors as PyTorch's pickles describe them: a view of a storage by offset, shape and strides, checked before anything is read."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from mmdiff.convert.tensors import Tensor, stored
from mmdiff.convert.unpickle import Attributes, Damaged, Unknown

_FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
_NUMPY = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
          "complex64", "complex128")  # fmt: skip
DTYPES = {name: np.dtype(name) for name in _NUMPY} | {name: np.dtype(getattr(jnp, name)) for name in ("bfloat16", *_FLOAT8)}
STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32", "Short": "int16",
    "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128"}  # fmt: skip


@dataclasses.dataclass
class Storage:
    """`count` numbers in the file, at `offset` once that is known; dtype None: bytes without a type."""

    key: str
    dtype: np.dtype | None
    count: int
    offset: int = -1

    @property
    def bytes(self) -> int:
        return self.count * (1 if self.dtype is None else self.dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor: numbers of a storage, by strides that are known to lie within it."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self, path: pathlib.Path, file: BinaryIO) -> Tensor:
        """Its values, in the open file that has its storage."""
        start = self.storage.offset + self.offset * self.dtype.itemsize
        dense = tuple(np.cumprod((1, *self.shape[:0:-1]), dtype=object)[::-1]) if self.shape else ()
        if all(size == 1 or stride == own for size, stride, own in zip(self.shape, self.strides, dense, strict=True)):
            return stored(path, file, start, self.dtype, self.shape)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) if math.prod(self.shape) else 0
        flat, bytes_of = stored(path, file, start, self.dtype, (span,)), [stride * self.dtype.itemsize for stride in self.strides]
        return flat.map(lambda numbers: np.lib.stride_tricks.as_strided(numbers, self.shape, bytes_of, writeable=False), self.shape)


def _pairs(pairs: Any = ()) -> dict:
    """OrderedDict(...), of which the keys are texts."""
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise Damaged("its pickle is damaged")
    return dict(pairs)


def _whole(*numbers: Any) -> bool:
    return all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 for number in numbers)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: Any = None) -> View:
    """A tensor as `torch._utils._rebuild_tensor_v2` takes it: offset and strides in numbers of its type."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise Damaged("its pickle is damaged")
    if len(shape) > 32 or not _whole(offset, *shape, *strides):
        raise Damaged("it has a tensor whose shape, strides or offset are no sizes")
    dtype = storage.dtype if dtype is None else dtype
    if dtype is None:
        raise Damaged("it has a tensor without a type")
    count = storage.bytes // dtype.itemsize
    used = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if math.prod(shape) else offset
    if used > count or math.prod(shape) > count:
        raise Damaged(f"it has a tensor of the shape {list(shape)} that reaches beyond its storage of {count:,} numbers")
    return View(storage, dtype, offset, shape, strides)


def _view_with_type(storage, offset, shape, strides, gradient, hooks, dtype, *rest):
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, Unknown) else ""
    if name not in DTYPES:
        raise Damaged(f"it has a tensor of a type that is not read ({name[:40] or 'none'})")
    return _view(storage, offset, shape, strides, dtype=DTYPES[name])


def _parameter(view: Any, *rest: Any) -> Any:
    return view


class Storages:
    """The storages that a pickle refers to, and what the classes in it stand for."""

    def __init__(self):
        self.by_key: dict[str, Storage] = {}
        self.types = {f"{where}.{name}Storage": DTYPES[dtype] for name, dtype in STORAGES.items() for where in ("torch", "torch.cuda")}
        self.types["torch.storage.UntypedStorage"] = None
        self.known = {
            "collections.OrderedDict": _pairs,
            "collections.defaultdict": lambda *_: {},
            "argparse.Namespace": Attributes,
            "torch._utils._rebuild_tensor": _view,
            "torch._utils._rebuild_tensor_v2": _view,
            "torch._utils._rebuild_tensor_v3": _view_with_type,
            "torch._utils._rebuild_parameter": _parameter,
        }

    def refer(self, reference: Any) -> Storage:
        """("storage", class, key, device, count[, view]) -> the storage."""
        if not isinstance(reference, tuple) or reference[:1] != ("storage",) or len(reference) < 5 or reference[5:] not in ((), (None,)):
            raise Damaged("it refers to something other than a tensor's storage")
        kind, key, count = reference[1], reference[2], reference[4]
        if not isinstance(kind, Unknown) or kind.name not in self.types:
            raise Damaged(f"it has tensors of a kind that is not read ({getattr(kind, 'name', 'none')[:60]})")
        if not isinstance(key, str) or not _whole(count):
            raise Damaged("its pickle is damaged")
        found = self.by_key.setdefault(key, Storage(key, self.types[kind.name], count))
        if (found.dtype, found.count) != (self.types[kind.name], count):
            raise Damaged(f"it describes its storage {key[:40]!r} in two ways")
        return found
