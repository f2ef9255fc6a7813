"""Checkpoints in PyTorch's two forms and safetensors files, assembled byte by byte, sound or not."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np

NUMBERS = np.arange(6, dtype=np.float32).tobytes()
MAGIC = 0x1950A86A20F9469CFC6C


def raw(value):
    """The operations of a plain value, without the frame of a pickle."""
    return pickle.dumps(value, 2)[2:-1]


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def storage(kind="torch FloatStorage", key="0", count=6):
    return b"(" + raw("storage") + named(*kind.split()) + raw(key) + raw("cpu") + raw(count) + b"tQ"


def tensor(offset=0, shape=(2, 3), strides=(3, 1), function="_rebuild_tensor_v2", dtype=b"", of=None):
    """The operations that make a tensor."""
    arguments = (storage() if of is None else of) + raw(offset) + raw(shape) + raw(strides) + raw(False)
    return named("torch._utils", function) + b"(" + arguments + named("collections", "OrderedDict") + b")R" + dtype + b"tR"


def called(module, name, *arguments):
    """The operations that call a function with texts and numbers."""
    return named(module, name) + raw(arguments) + b"R"


def dictionary(**items):
    return b"}(" + b"".join(raw(key) + value for key, value in items.items()) + b"u"


def program(operations):
    return b"\x80\x02" + operations + b"."


SOUND = dictionary(weight=tensor())


def zipped(operations=SOUND, storages=None, *, pickled=None, compressed=(), more=None, top="archive"):
    """The zip form. compressed: names of entries; more: further entries."""
    content = {"data.pkl": program(operations) if pickled is None else pickled, "byteorder": b"little", "version": b"3\n"}
    content |= {f"data/{key}": value for key, value in ({"0": NUMBERS} if storages is None else storages).items()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in (content | (more or {})).items():
            archive.writestr(f"{top}/{name}", value, zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED)
    return file.getvalue()


def older(operations=SOUND, *, magic=MAGIC, little=True, keys=None, count=6, numbers=NUMBERS, pickled=None):
    """The older form."""
    machine = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    start = b"".join(pickle.dumps(value, 2) for value in (magic, 1001, machine))
    keys = keys or ("0",) * (b"Storage" in operations)
    middle = program(operations) if pickled is None else pickled
    return start + middle + pickle.dumps(list(keys), 2) + struct.pack("<q", count) + numbers


def safetensors(header, numbers=NUMBERS, length=None):
    """A safetensors file with a header of any JSON value or of bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
