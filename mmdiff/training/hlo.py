"""Communication, memory traffic and estimated cycles of a compiled program, from its HLO text (`compiled.as_text()`).

The text lists computations, each a list of instructions; fusions, loops and calls name the computations that they run. All counts are
per device and per run of the program, a loop's body as often as it runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mmdiff.training.hlo_text import UPDATES, Computation, Instruction, buffers, bytes_padded, groups, memory, padded, parse, places, size

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


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: of a device's operands.
      groups: positions of devices in the mesh, [groups, devices of each]; of a permutation the pairs (source, target).
      times: how often it runs.
      network: over the data-centre network, to the same device of every other slice; without groups.
      synchronous: nothing runs beside it: it is one instruction, not a start and a later end.
    """

    kind: str
    bytes: int
    groups: np.ndarray
    times: int
    network: bool = False
    synchronous: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """An instruction that is no part of another one.

    Attributes:
      opcode: see `Instruction`.
      times: how often it runs.
      bytes: read from and written to main memory each time.
      cycles: of the chip's clock each time, as the TPU compiler estimates it; None where it does not (copies, collectives, kernels,
        gathers by a chip's sparse cores).
      source: "OP_NAME FILE:FUNCTION" of what it was compiled from, as far as the text says.
    """

    opcode: str
    times: int
    bytes: int
    cycles: int | None
    source: str


class Program:
    """A compiled program.

        program = Program(compiled.as_text())
        program.collectives(), program.traffic()

    Attributes:
      unknown_loops: the loops with an unknown trip count; their bodies are counted once.
    """

    def __init__(self, text: str):
        self._computations = dict(parse(text))
        self._devices = math.prod(map(int, re.findall(r"(?:replica_count|num_partitions)=(\d+)", text.partition("\n")[0])))
        # The TPU compiler spreads a collective over fusions that compute something else: one starts it, the others repeat it.
        # (Channels do not identify them: different collectives of a program may have the same number.)
        every = [(c, i) for c in self._computations.values() for i in c.values()]
        started = [c[name] for c, i in every if i.opcode == "AsyncCollectiveStart" for name in i.operands]
        names, marks = {i.name for i in started}, {_mark(i) for i in started if _channel(i)}
        self._repeats = {i.name for _, i in every if _mark(i) in marks and i.name not in names}
        wrapped = {name for _, i in every if i.opcode == "async-start" for name in i.called("calls")}
        self._asynchronous = names | {i.name for name in wrapped for i in self._computations[name].values()}
        self._fused = {name for _, i in every if i.opcode == "fusion" for name in i.called("calls")}
        parts = [(self._computations[name], i) for name in self._fused for i in self._computations[name].values()]
        self._scattered = {i.name for c, i in parts if i.opcode == "all-reduce" and _sliced(c, i)}
        self._places = places(text)
        self.unknown_loops: list[str] = []
        self._runs = self._count_runs(next(reversed(self._computations)))

    def collectives(self) -> list[Collective]:
        """All collectives, in the order of the text."""
        found = []
        for times, computation, instruction in self._executed(self._runs):
            kind = instruction.opcode.removesuffix("-start")
            network = kind == "send" and re.search(r'megascale_transfer_type="(\w+)"', instruction.attributes)
            if network:
                sent = size(computation[instruction.operands[0]].shape)
                found.append(Collective(network[1].lower().replace("_", "-"), sent, np.zeros((0, 0), int), times, network=True))
            elif kind in COLLECTIVES and instruction.name not in self._repeats:
                sent = sum(size(computation[name].shape) for name in instruction.operands)
                synchronous = kind == instruction.opcode and instruction.name not in self._asynchronous
                kind = "reduce-scatter" if instruction.name in self._scattered else kind
                found.append(Collective(kind, sent, groups(instruction.attributes, self._devices), times, synchronous=synchronous))
        return found

    def traffic(self) -> int:
        """Bytes read from and written to the device's main memory.

        The sum over instructions of their reads and writes, a fusion being one instruction. Buffers in fast memory do not count, slices
        count with their own size, not their source's, and all shapes with their padding.
        """
        return sum(work.times * work.bytes for work in self.work())

    def work(self) -> Iterator[Work]:
        """What runs, a fusion as one."""
        runs = {name: times for name, times in self._runs.items() if name not in self._fused}
        for times, computation, instruction in self._executed(runs):
            cycles = re.search(r'"estimated_cycles":"(\d{1,18})"', instruction.attributes)  # 2^63 - 1 is none
            moved = self._moved(computation, instruction)
            yield Work(instruction.opcode, times, moved, cycles and int(cycles[1]), self._source(computation, instruction))

    def _executed(self, runs: dict[str, int]) -> Iterator[tuple[int, Computation, Instruction]]:
        for name, times in runs.items():
            for instruction in self._computations[name].values():
                yield times, self._computations[name], instruction

    def _source(self, computation: Computation, instruction: Instruction) -> str:
        """Its own; of what has none, such as a copy to or from fast memory, that of its first user, or else of what it copies."""

        def follow(instruction: Instruction | None, onward: Callable[[Instruction], Iterable[Instruction]]) -> str:
            while instruction:
                name = re.search(r'op_name="(jit\([^"]*)"', instruction.attributes)
                if name:
                    frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
                    return f"{name[1]} {self._places.get(frame and frame[1], '')}"
                instruction = next(iter(onward(instruction)), None)
            return ""

        return follow(instruction, lambda i: computation.users[i.name]) or follow(instruction, lambda i: map(computation.get, i.operands))

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
            return reads + max(0, memory(instruction.shape) - sum(memory(operand.shape) for operand in operands))
        return reads + self._written(computation, instruction)

    def _read(self, computation: Computation, buffer: Instruction) -> int:
        """What the instructions of a fused computation read of a buffer."""
        return min(memory(buffer.shape), sum(self._read_by(user, buffer, computation) for user in computation.users[buffer.name]))

    def _read_by(self, user: Instruction, buffer: Instruction, fused: Computation | None = None) -> int:
        whole = memory(buffer.shape)
        if user.name in self._repeats or user.opcode in ("tuple", "AsyncCollectiveDone"):
            return 0
        if fused and user.opcode == "bitcast":
            return self._read(fused, user)
        if fused and user.opcode == "fusion":
            [inner] = (self._computations[name] for name in user.called("calls"))
            numbers = [str(k) for k, name in enumerate(user.operands) if name == buffer.name]
            return sum(self._read(inner, i) for i in inner.values() if i.opcode == "parameter" and i.arguments in numbers)
        if user.opcode in SLICES and user.operands[0] == buffer.name:
            return min(whole, sum(map(bytes_padded, buffers(user.shape)[1 if user.opcode.endswith("-start") else 0:][:1])))
        if user.opcode in UPDATES and user.operands[0] == buffer.name and (not fused or user.name in fused.results):
            return 0
        return whole

    def _written(self, computation: Computation, result: Instruction) -> int:
        """What is written to make a result, which may be a tuple of some."""
        if not memory(result.shape):
            return 0
        operands = [computation[name] for name in dict.fromkeys(result.operands)]
        if result.opcode in ("tuple", "bitcast"):
            return sum(self._written(computation, operand) for operand in operands)
        if result.opcode == "AsyncCollectiveStart":
            return sum(memory(operand.shape) for operand in operands)
        if result.opcode in FREE or result.name in self._repeats:
            return 0
        if result.opcode in UPDATES:
            before = self._written(computation, operands[0]) if operands[0].opcode in UPDATES else 0
            return before + padded(computation[result.operands[UPDATES[result.opcode]]].shape)
        if result.opcode == "fusion":
            [inner] = (self._computations[name] for name in result.called("calls"))
            return self._written(inner, inner.root)
        return memory(result.shape)


def _sliced(computation: Computation, sum_: Instruction) -> bool:
    """Whether of a sum only slices are used: in a fusion this is how the TPU compiler writes a reduce-scatter."""
    users = computation.users[sum_.name]
    return bool(users) and all(i.opcode == "dynamic-slice" or i.opcode == "get-tuple-element" and _sliced(computation, i) for i in users)


def _channel(instruction: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found and found[1]


def _mark(instruction: Instruction) -> tuple[str, str | None, int]:
    """What a collective and its repeats have in common."""
    return instruction.opcode, _channel(instruction), size(instruction.shape)


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that an instruction copies, or None."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    return int(instruction.arguments) if instruction.opcode == "constant" else None
