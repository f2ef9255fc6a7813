"""Communication and memory traffic of a compiled program, from its HLO text (`compiled.as_text()`).

The text lists computations, each a list of instructions; fusions, loops and calls name the computations that they run. All counts are
per device and per run of the program, a loop's body as often as it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip
# Instructions that move no data: they name, group or complete the work of others. Custom calls are listed by their target.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "while", "conditional",
    "call", "opt-barrier", "async-start", "async-update", "add-dependency", "recv", "AllocateBuffer", "ConcatBitcast",
    "AssumeGatherIndicesInBound", "AsyncCollectiveDone",
}  # fmt: skip
SLICES = ("slice", "dynamic-slice", "gather", "slice-start", "dynamic-slice-start")  # read as much as they return
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


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: of a device's operands.
      groups: positions of devices in the mesh, [groups, devices of each]; of a permutation the pairs (source, target).
      times: how often it runs.
      network: over the data-centre network, to the same device of every other slice; without groups.
    """

    kind: str
    bytes: int
    groups: np.ndarray
    times: int
    network: bool = False


class Program:
    """A compiled program.

        program = Program(compiled.as_text())
        program.collectives(), program.traffic()

    Attributes:
      unknown_loops: the loops with an unknown trip count; their bodies are counted once.
    """

    def __init__(self, text: str):
        self._computations = dict(_parse(text))
        self._devices = math.prod(map(int, re.findall(r"(?:replica_count|num_partitions)=(\d+)", text.partition("\n")[0])))
        # The TPU compiler spreads a collective over fusions that compute something else: one starts it, the others repeat it.
        # (Channels do not identify them: different collectives of a program may have the same number.)
        every = [(c, i) for c in self._computations.values() for i in c.values()]
        started = [c[name] for c, i in every if i.opcode == "AsyncCollectiveStart" for name in i.operands]
        names, marks = {i.name for i in started}, {_mark(i) for i in started if _channel(i)}
        self._repeats = {i.name for _, i in every if _mark(i) in marks and i.name not in names}
        self.unknown_loops: list[str] = []
        self._runs = self._count_runs(next(reversed(self._computations)))

    def collectives(self) -> list[Collective]:
        """All collectives, in the order of the text."""
        found = []
        for times, computation, instruction in self._executed(self._runs):
            kind = instruction.opcode.removesuffix("-start")
            network = kind == "send" and re.search(r'megascale_transfer_type="(\w+)"', instruction.attributes)
            if network:
                size = _size(computation[instruction.operands[0]].shape)
                found.append(Collective(network[1].lower().replace("_", "-"), size, np.zeros((0, 0), int), times, network=True))
            elif kind in COLLECTIVES and instruction.name not in self._repeats:
                size = sum(_size(computation[name].shape) for name in instruction.operands)
                found.append(Collective(kind, size, _groups(instruction.attributes, self._devices), times))
        return found

    def traffic(self) -> int:
        """Bytes read from and written to the device's main memory.

        The sum over instructions of their reads and writes, a fusion being one instruction. Buffers in fast memory do not count, slices
        count with their own size, not their source's, and all shapes with their padding.
        """
        fused = {name for c in self._computations.values() for i in c.values() if i.opcode == "fusion" for name in i.called("calls")}
        runs = {name: times for name, times in self._runs.items() if name not in fused}
        return sum(times * self._moved(computation, instruction) for times, computation, instruction in self._executed(runs))

    def _executed(self, runs: dict[str, int]) -> Iterator[tuple[int, Computation, Instruction]]:
        for name, times in runs.items():
            for instruction in self._computations[name].values():
                yield times, self._computations[name], instruction

    # ---- How often ----

    def _count_runs(self, entry: str) -> dict[str, int]:
        """How often each computation runs. (A computation stands above those that call it.)"""
        runs = {entry: 1}
        for name in reversed(self._computations):
            for instruction in self._computations[name].values() if name in runs else ():
                attributes, times = ["calls", "called_computations", "branch_computations", "true_computation", "false_computation"], 1
                if instruction.opcode == "while":
                    attributes, times = ["body"], self._rounds(self._computations[name], instruction)
                elif instruction.opcode == "call":
                    attributes = ["to_apply"]
                for inner in instruction.called(*attributes):
                    runs[inner] = runs.get(inner, 0) + runs[name] * times
        return runs

    def _rounds(self, computation: Computation, loop: Instruction) -> int:
        """How often a while loop's body runs: the compiler says it, or it counts up to a constant."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition, body = (self._computations[loop.called(name)[0]] for name in ("condition", "body"))
        try:
            counter, bound = (condition[name] for name in condition.root.operands)
            if "direction=LT" not in condition.root.attributes:
                raise ValueError
            index = int(re.search(r"index=(\d+)", counter.attributes)[1])
            start = _constant(computation, computation[loop.operands[0]].operands[index])
            steps = [_constant(body, name) for name in body[body.root.operands[index]].operands]
            [step] = [step for step in steps if step is not None]
            return -(-(_constant(condition, bound.name) - start) // step)
        except (KeyError, ValueError, IndexError, TypeError):  # it is no such loop
            self.unknown_loops.append(loop.name)
            return 1

    # ---- Memory traffic ----

    def _moved(self, computation: Computation, instruction: Instruction) -> int:
        opcode, operands = instruction.opcode, [computation[name] for name in instruction.operands]
        if opcode in FREE or opcode.endswith("-done"):
            return 0
        if opcode == "fusion":
            [inner] = (self._computations[name] for name in instruction.called("calls"))
            return sum(self._read(inner, i) for i in inner.values() if i.opcode == "parameter") + self._written(inner, inner.root)
        reads = sum(self._read_by(instruction, operand) for operand in {o.name: o for o in operands}.values())
        if opcode.endswith("-start") or opcode == "send":  # the result holds the operands, too
            return reads + max(0, _memory(instruction.shape) - sum(_memory(operand.shape) for operand in operands))
        return reads + self._written(computation, instruction)

    def _read(self, computation: Computation, buffer: Instruction) -> int:
        """What the instructions of a fused computation read of a buffer."""
        return min(_memory(buffer.shape), sum(self._read_by(user, buffer, computation) for user in computation.users[buffer.name]))

    def _read_by(self, user: Instruction, buffer: Instruction, fused: Computation | None = None) -> int:
        whole = _memory(buffer.shape)
        if user.name in self._repeats or user.opcode in ("tuple", "AsyncCollectiveDone"):
            return 0
        if fused and user.opcode == "bitcast":
            return self._read(fused, user)
        if fused and user.opcode == "fusion":
            [inner] = (self._computations[name] for name in user.called("calls"))
            numbers = [str(k) for k, name in enumerate(user.operands) if name == buffer.name]
            return sum(self._read(inner, i) for i in inner.values() if i.opcode == "parameter" and i.arguments in numbers)
        if user.opcode in SLICES and user.operands[0] == buffer.name:
            return min(whole, sum(map(_bytes_padded, _buffers(user.shape)[1 if user.opcode.endswith("-start") else 0:][:1])))
        if user.opcode in UPDATES and user.operands[0] == buffer.name and (not fused or user.name in fused.results):
            return 0
        return whole

    def _written(self, computation: Computation, result: Instruction) -> int:
        """What is written to make a result, which may be a tuple of some."""
        if not _memory(result.shape):
            return 0
        operands = [computation[name] for name in dict.fromkeys(result.operands)]
        if result.opcode in ("tuple", "bitcast"):
            return sum(self._written(computation, operand) for operand in operands)
        if result.opcode == "AsyncCollectiveStart":
            return sum(_memory(operand.shape) for operand in operands)
        if result.opcode in FREE or result.name in self._repeats:
            return 0
        if result.opcode in UPDATES:
            before = self._written(computation, operands[0]) if operands[0].opcode in UPDATES else 0
            return before + _padded(computation[result.operands[UPDATES[result.opcode]]].shape)
        if result.opcode == "fusion":
            [inner] = (self._computations[name] for name in result.called("calls"))
            return self._written(inner, inner.root)
        return _memory(result.shape)


# ---- The text ----


def _parse(text: str) -> Iterator[tuple[str, Computation]]:
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


def _channel(instruction: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found and found[1]


def _mark(instruction: Instruction) -> tuple[str, str | None, int]:
    """What a collective and its repeats have in common."""
    return instruction.opcode, _channel(instruction), _size(instruction.shape)


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that an instruction copies, or None."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    return int(instruction.arguments) if instruction.opcode == "constant" else None


# ---- Shapes ----


def _buffers(shape: str) -> list[tuple[int, list[int], str]]:
    """(bits of an element, lengths, layout) of an array, or of every array in a tuple."""
    found = re.findall(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape)
    return [(_bits(kind), [int(n) for n in re.findall(r"\d+", lengths)], layout) for kind, lengths, layout in found]


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int((re.search(r"\d+", kind) or ["0"])[0])


def _size(shape: str) -> int:
    """Bytes of the numbers themselves."""
    return sum(math.prod(lengths) * bits // 8 for bits, lengths, _ in _buffers(shape))


def _padded(shape: str) -> int:
    """Bytes as laid out."""
    return sum(map(_bytes_padded, _buffers(shape)))


def _memory(shape: str) -> int:
    """Bytes in main memory as laid out; S(1) and the like are other memories."""
    return sum(_bytes_padded(buffer) for buffer in _buffers(shape) if not re.search(r"S\([1-9]", buffer[2]))


def _bytes_padded(buffer: tuple[int, list[int], str]) -> int:
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


def _groups(attributes: str, devices: int) -> np.ndarray:
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
