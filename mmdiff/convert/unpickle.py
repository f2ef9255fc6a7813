"""The values in a pickle, by an interpreter of our own that imports nothing and calls nothing that a pickle names.

A pickle is a program. Its plain values (numbers, texts, lists, tuples, dictionaries) are built here; a class or function that it names is
looked up in the caller's table of inert counterparts and otherwise is an `Unknown`, whatever the pickle does with it. Python's own
unpickler is not used: even when it may look up nothing, some bytes make it fill the memory (memo numbers), hash nested tuples for ever or
overflow the stack.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

OPERATIONS = 600_000  # a tensor has some 35
HOSTILE_MODULES = frozenset((
    "os", "posix", "nt", "subprocess", "commands", "sys", "socket", "importlib", "runpy", "shutil", "pty", "ctypes", "code", "codeop",
    "marshal", "webbrowser", "pickle", "_pickle", "platform", "pdb", "timeit", "cProfile", "profile", "pip", "ensurepip"))  # fmt: skip
HOSTILE_BUILTINS = frozenset(("eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint", "apply"))


class Damaged(ValueError):
    """What a pickle is that cannot be read: the end of a sentence."""


class Unknown:
    """A class or function that is not known, what it would have returned, or an instance of it."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Known:
    """A class or function of the caller's table: `call` is what stands for it."""

    __slots__ = ("name", "call")

    def __init__(self, name: str, call: Callable[..., Any]):
        self.name, self.call = name, call


class Attributes(dict):
    """An instance whose attributes are wanted, as a dictionary."""


_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Unknown("builtins.set")}  # fmt: skip
_VALUES = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"))  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FROM_MARK: dict[str, Callable[[list], Any]] = {"TUPLE": tuple, "LIST": list, "FROZENSET": lambda _: Unknown("builtins.frozenset")}


def unpickle(file: BinaryIO, known: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value of the pickle that starts where the file stands; the file stands behind it afterwards.

    Args:
      known: "module.name" -> what is called instead.
      persistent: persistent id -> the value that it stands for.

    Raises:
      Damaged: it is none, too long, wants the shell or the like, or does what the pickle of a checkpoint does not do.
    """
    try:
        return _Machine(known, persistent).run(file)
    except Damaged:
        raise
    except (IndexError, KeyError, AttributeError, TypeError, ValueError, OverflowError, EOFError, MemoryError, RecursionError) as error:
        what = (str(error).splitlines() or [""])[0][:80] if isinstance(error, ValueError) else ""
        raise Damaged(f"its pickle is damaged{f' ({what})' * bool(what)}") from error


class _Machine:
    """The stack, the memo and the count of operations of one pickle."""

    def __init__(self, known, persistent):
        self.known = {name: Known(name, call) for name, call in known.items()}
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.operations = 0

    def run(self, file: BinaryIO) -> Any:
        stack, memo = self.stack, self.memo
        for code, argument, _ in pickletools.genops(file):
            self.charge(1)
            name = code.name
            if name in _VALUES:
                stack.append(argument)
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                self.check(0 <= argument <= OPERATIONS)
                memo[argument] = self.top()
            elif name == "MEMOIZE":
                memo[len(memo)] = self.top()
            elif name == "MARK":
                stack.append(_MARK)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name in _TUPLES:
                stack.append(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
            elif name in _FROM_MARK:
                stack.append(_FROM_MARK[name](self.pop_mark()))
            elif name in ("PROTO", "FRAME"):
                pass
            elif name == "STOP":
                self.check(len(stack) == 1)
                return self.pop()
            else:
                getattr(self, f"do_{name}", self.refuse)(argument)
        raise Damaged("its pickle is cut short")

    def charge(self, operations: int) -> None:
        self.operations += operations
        if self.operations > OPERATIONS:
            raise Damaged(f"its pickle has more than {OPERATIONS:,} operations")

    def check(self, sound: bool) -> None:
        if not sound:
            raise Damaged("its pickle is damaged")

    def refuse(self, _):
        raise Damaged("its pickle does what the pickle of a checkpoint does not do")

    def top(self) -> Any:
        self.check(self.stack[-1] is not _MARK)
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        del self.stack[-1]
        return value

    def pop_mark(self) -> list[Any]:
        start = len(self.stack)
        while self.stack[start - 1] is not _MARK:  # IndexError where there is none
            start -= 1
        items = self.stack[start:]
        del self.stack[start - 1 :]
        return items

    # ------------------------------------------------------------------------------------------------------------------ containers

    def do_POP(self, _):
        self.stack.pop()

    def do_DUP(self, _):
        self.stack.append(self.top())

    def do_DICT(self, _):
        self.stack.append(dict(self.pairs(self.pop_mark())))

    def do_APPEND(self, _):
        self.extend([self.pop()])

    def do_APPENDS(self, _):
        self.extend(self.pop_mark())

    do_ADDITEMS = do_APPENDS

    def extend(self, items):
        if isinstance(target := self.top(), list):
            target.extend(items)
        else:
            self.check(isinstance(target, Unknown))

    def do_SETITEM(self, _):
        value, key = self.pop(), self.pop()
        self.set([key, value])

    def do_SETITEMS(self, _):
        self.set(self.pop_mark())

    def set(self, items):
        if isinstance(target := self.top(), dict):
            target.update(self.pairs(items))
        else:
            self.check(isinstance(target, Unknown))

    def pairs(self, items):
        self.check(len(items) % 2 == 0)
        return [(_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True)]

    # -------------------------------------------------------------------------------------------------------- classes and functions

    def do_GLOBAL(self, argument):
        module, _, name = argument.partition(" ")
        self.name(module, name)

    def do_STACK_GLOBAL(self, _):
        name, module = self.pop(), self.pop()
        self.check(isinstance(name, str) and isinstance(module, str))
        self.name(module, name)

    def name(self, module, name):
        root = module.partition(".")[0]
        if root in HOSTILE_MODULES or (module in ("builtins", "__builtin__") and name.partition(".")[0] in HOSTILE_BUILTINS):
            raise Damaged(f"it would run {module}.{name} when unpickled, which no checkpoint does")
        full = f"{module}.{name}"
        self.stack.append(self.known.get(full) or Unknown(full))

    def call(self, function, arguments):
        if isinstance(function, Unknown):
            return function
        self.check(isinstance(function, Known) and isinstance(arguments, tuple))
        self.charge(sum(len(value) for value in arguments if isinstance(value, (list, dict, tuple))))
        return function.call(*arguments)

    def do_REDUCE(self, _):
        arguments, function = self.pop(), self.pop()
        self.stack.append(self.call(function, arguments))

    do_NEWOBJ = do_REDUCE

    def do_NEWOBJ_EX(self, _):
        self.pop()
        self.do_REDUCE(_)

    def do_OBJ(self, _):
        function, *arguments = self.pop_mark()
        self.stack.append(self.call(function, tuple(arguments)))

    def do_INST(self, argument):
        arguments = self.pop_mark()
        self.do_GLOBAL(argument)
        self.stack.append(self.call(self.pop(), tuple(arguments)))

    def do_BUILD(self, _):
        state = self.pop()
        if isinstance(target := self.top(), Attributes) and isinstance(state, dict):
            self.charge(len(state))
            target.update(state)

    def do_BINPERSID(self, _):
        if self.persistent is None:
            self.refuse(_)
        self.stack.append(self.persistent(self.pop()))


def _key(key: Any) -> Any:
    """A key of a dictionary; what takes long to hash, or has the hash of others on purpose, is another one each time."""
    plain = isinstance(key, (str, bytes, bool, type(None))) or (isinstance(key, int) and abs(key) < 2**32)
    return key if plain else Unknown("a key")
