"""The HLO text of a compiled program, taken apart: computations of instructions, shapes, groups of devices, places in the source."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # write this operand into the first in place


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(arguments), attributes`; the opcode of a custom call is its target."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def called(self, *attributes: str) -> list[str]:
        """The computations that these attributes name."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.attributes)
        return re.findall(r"%([\w.\-]+)", " ".join(several or one for several, one in found))


class Computation(dict[str, Instruction]):
    """Instructions by name, in order."""

    root: Instruction

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users = {name: [] for name in self}
        for instruction in self.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    @functools.cached_property
    def results(self) -> set[str]:
        """What the root returns or changes in place: itself, or the elements of its tuple."""
        names, waiting = set(), [self.root]
        while waiting:
            instruction = waiting.pop()
            names.add(instruction.name)
            if instruction.opcode in ("tuple", "bitcast"):
                waiting += [self[name] for name in instruction.operands]
            elif instruction.opcode in UPDATES:
                waiting.append(self[instruction.operands[0]])
        return names


# ---- Computations ----


def parse(text: str) -> Iterator[tuple[str, Computation]]:
    """The computations by name, the entry last."""
    computation, entry = Computation(), None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            computation = Computation()
            if header[1]:
                entry = header[2], computation
            else:
                yield header[2], computation
            continue
        assigned = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
        if assigned:
            computation[assigned[2]] = instruction = _instruction(assigned[2], line[assigned.end() :])
            if assigned[1]:
                computation.root = instruction
    yield entry


def _instruction(name: str, text: str) -> Instruction:
    shape = _closed(text) if text.startswith("(") else text[: text.index(" ")]
    opcode, _, rest = text[len(shape) + 1 :].partition("(")
    arguments = _closed("(" + rest)[1:-1]
    attributes = rest[len(arguments) + 1 :]
    if opcode == "custom-call":
        opcode = re.search(r'custom_call_target="([^"]*)"', attributes)[1]
    return Instruction(name, shape, opcode, arguments, attributes)


def _closed(text: str) -> str:
    """The start of a text up to the parenthesis that closes its first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return text[: match.end()]
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def places(text: str) -> dict[str, str]:
    """FILE:FUNCTION by the number of a stack frame, from the tables in front of the computations: each frame's innermost call."""

    def table(name: str) -> dict[str, str]:
        lines = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return dict(re.findall(r"^(\d+) (.*)$", lines[1], re.MULTILINE)) if lines else {}

    files, functions, locations = table("FileNames"), table("FunctionNames"), table("FileLocations")

    def place(location: str) -> str:
        file, function = (re.search(rf"{kind}_name_id=(\d+)", locations[location])[1] for kind in ("file", "function"))
        return f"{files[file]}:{functions[function]}".replace('"', "")

    return {frame: place(re.search(r"file_location_id=(\d+)", entry)[1]) for frame, entry in table("StackFrames").items()}


# ---- Shapes ----


def buffers(shape: str) -> list[tuple[int, list[int], str]]:
    """(bits of an element, lengths, layout) of an array, or of every array in a tuple."""
    found = re.findall(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape)
    return [(_bits(kind), [int(n) for n in re.findall(r"\d+", lengths)], layout) for kind, lengths, layout in found]


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int((re.search(r"\d+", kind) or ["0"])[0])


def size(shape: str) -> int:
    """Bytes of the numbers themselves."""
    return sum(math.prod(lengths) * bits // 8 for bits, lengths, _ in buffers(shape))


def padded(shape: str) -> int:
    """Bytes as laid out."""
    return sum(map(bytes_padded, buffers(shape)))


def memory(shape: str) -> int:
    """Bytes in main memory as laid out; S(1) and the like are other memories."""
    return sum(bytes_padded(buffer) for buffer in buffers(shape) if not re.search(r"S\([1-9]", buffer[2]))


def bytes_padded(buffer: tuple[int, list[int], str]) -> int:
    """A layout "2,1,0:T(8,128)(2,1)" orders the dimensions from the last in memory on, and fills these up to whole tiles."""
    bits, lengths, layout = buffer
    order = re.match(r"[\d,]*", layout)[0].split(",")
    tile = re.search(r"T\(([\d,]+)\)", layout)
    lengths = [lengths[int(axis)] for axis in order if axis] or lengths
    for i, length in enumerate(reversed(tile[1].split(",")) if tile else ()):
        if i < len(lengths):
            lengths[i] += -lengths[i] % int(length)
    return math.prod(lengths) * bits // 8


# ---- Groups ----


def groups(attributes: str, devices: int) -> np.ndarray:
    """The groups in {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), mesh['a'=2,'b'=4] {'a'}, or of source_target_pairs={{0,1},{1,0}}."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if listed:
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return np.array(groups or [range(devices)])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes)
    axes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", mesh[1])}
    ids = np.arange(math.prod(axes.values())) if not mesh[2] else _iota(mesh[2])
    place = dict(zip(axes, np.unravel_index(np.arange(ids.size), tuple(axes.values()))))
    width = 1
    for name, before, part in re.findall(r"([^,:]+)(?::\((\d+)\)(\d+))?", mesh[3]):
        # An axis, or the part of it that is `part` long after `before`: a group's devices differ in this digit alone.
        part = int(part or axes[name])
        stride = axes[name] // (int(before or 1) * part)
        place[name] = place[name] - place[name] // stride % part * stride
        width *= part
    group = np.ravel_multi_index(tuple(place.values()), tuple(axes.values()))
    return ids[np.argsort(group, kind="stable")].reshape(-1, width)


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers from 0, shaped and transposed; or a plain list."""
    shape = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not shape:
        return np.array([int(n) for n in re.findall(r"\d+", text)])
    lengths = [int(n) for n in shape[1].split(",")]
    axes = [int(n) for n in shape[2].split(",")] if shape[2] else range(len(lengths))
    return np.arange(math.prod(lengths)).reshape(lengths).transpose(axes).reshape(-1)
