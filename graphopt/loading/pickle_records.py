"""A pickle read as data: its opcodes become records, no object of a class is built and nothing is called.

`pickletools.genops` takes a pickle apart. The opcodes interpreted here are those that `torch.save` writes; text,
numbers, tuples, lists and dictionaries become themselves, and what would name, call or change an object becomes a
record of that. Every value takes at least one byte of the file, values that are shared stay shared, and the number of
opcodes is bounded, so that reading costs what the file costs.

`torch.save` writes protocol 2 unless it is asked for another. Those write the same with other opcodes; the ones for
calls by keyword and for buffers outside the file are none that a model needs.
"""

from __future__ import annotations

import io
import pickletools
import struct
from dataclasses import dataclass, field
from typing import Any

from graphopt.errors import first_line
from graphopt.loading.refusal import DamagedError, HostileError

PROTOCOLS = (2, 3, 4, 5)
MAX_OPCODES = 2_500_000  # a tensor takes some 25: 100,000 tensors
_KEYS = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names."""

    name: str  # "torch.nn.modules.linear.Linear"


@dataclass(eq=False, slots=True)
class Made:
    """What a pickle wants made: a call's result or an instance, and what it then does to it.

    Attributes:
        maker: what is called, or whose instance it is.
        arguments: of the call.
        instance: whether it is an instance made without its constructor.
        items: of a dictionary of a class of its own.
        appended: to a list of a class of its own.
        state: attributes it is given, None for none.
    """

    maker: Global
    arguments: tuple[Any, ...]
    instance: bool
    items: list[tuple[Any, Any]] = field(default_factory=list)
    appended: list[Any] = field(default_factory=list)
    state: Any = None


@dataclass(eq=False, slots=True)
class Stored:
    """What lies outside the pickle: bytes of a tensor, by the parts of their persistent id."""

    key: tuple[Any, ...]


class _Mark:
    """What lies below a tuple or a row of items on the stack."""


_MARK = _Mark()


def read_records(stream: io.BytesIO) -> tuple[Any, list[Stored]]:
    """Read the pickle that starts where `stream` stands, up to its end.

    Returns:
        Its value: plain data, and `Global`, `Made` and `Stored` for the rest. And all of `Stored` in it.

    Raises:
        HostileError: it asks for what a file of `torch.save` never does.
        DamagedError: it is cut off, or no pickle.
    """
    reader = _Reader()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise HostileError(f"its pickle has more than {MAX_OPCODES} steps, more than any model's")
            action = _ACTIONS.get(opcode.name)
            if action is None:
                raise HostileError(f"its pickle uses `{opcode.name}`, which torch.save never writes")
            action(reader, argument)
    except (ValueError, IndexError, OverflowError, MemoryError, struct.error) as err:
        raise DamagedError(f"its pickle is damaged ({first_line(err)})") from err
    return reader.result(), reader.outside


class _Reader:
    """The stack and the memo of an unpickler."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.outside: list[Stored] = []

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise DamagedError("its pickle ends before its value is complete")
        return self._stack[0]

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise DamagedError("its pickle takes a value that is not there")
        return self._stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                values = self._stack[index + 1 :]
                del self._stack[index:]
                return values
        raise DamagedError("its pickle takes values that are not there")

    def tuple(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def put(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self._memo[index] = value

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise DamagedError("its pickle refers to a value that is not there")
        self.push(self._memo[index])

    def protocol(self, version: int) -> None:
        if version not in PROTOCOLS:
            raise HostileError(f"its pickle is of protocol {version}; torch.save writes {PROTOCOLS[0]}")

    def named(self, text: str) -> None:
        self.name(*text.split(" ", 1))

    def named_on_the_stack(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def name(self, module: Any, name: Any = None) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise DamagedError("its pickle names a class or function by something other than text")
        self.push(Global(f"{_RENAMED.get(module, module)}.{name}"))

    def stored(self, _: None) -> None:
        match self.pop():
            case ("module", Global() as cls, *_):  # the older format, which brings the source of the class along
                self.push(cls)
            case tuple() as key:
                self.outside.append(Stored(key))
                self.push(self.outside[-1])
            case _:
                raise DamagedError("its pickle names stored bytes by something other than a tuple")

    def make(self, *, instance: bool) -> None:
        arguments, maker = self.pop(), self.pop()
        if not isinstance(maker, Global) or not isinstance(arguments, tuple):
            raise HostileError("its pickle calls what is no named class or function")
        self.push(Made(maker, arguments, instance))

    def state(self, _: None) -> None:
        state, target = self.pop(), self.pop()
        if not isinstance(target, Made) or target.state is not None or state is None:
            raise HostileError("its pickle changes what it did not make, or twice")
        target.state = state
        self.push(target)

    def memoize(self, _: None) -> None:
        self.put(len(self._memo))

    def collect(self, kind: str) -> None:
        """Write a set as a call that makes it of a list, as protocol 2 does."""
        values = self.pop_to_mark()
        if kind == "set":
            target = self.pop()
            if not isinstance(target, Made) or target.maker != _SET or [*map(type, target.arguments)] != [list]:
                raise HostileError("its pickle adds to what is no set")
            target.arguments[0].extend(values)
            self.push(target)
        else:
            self.push(Made(Global(f"builtins.{kind}"), (values,), instance=False))

    def append(self, values: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, list | Made):
            raise HostileError("its pickle appends to what is no list")
        (target if isinstance(target, list) else target.appended).extend(values)
        self.push(target)

    def set_items(self, values: list[Any]) -> None:
        target = self.pop()
        if len(values) % 2:
            raise DamagedError("its pickle has a key without a value")
        pairs = list(zip(values[::2], values[1::2], strict=True))
        for key, _ in pairs:
            if not is_key(key):
                raise HostileError(f"its pickle has a {type(key).__name__} as a key, not text or a number")
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, Made):
            target.items.extend(pairs)
        else:
            raise HostileError("its pickle puts items into what is no dictionary")
        self.push(target)


def is_key(value: Any) -> bool:
    """Whether a value is hashed at once: the hash of a tuple of shared tuples takes time without end."""
    return isinstance(value, _KEYS) or (
        isinstance(value, tuple) and len(value) < 100 and all(isinstance(item, _KEYS) for item in value)
    )


_RENAMED = {"__builtin__": "builtins"}  # by protocol 2
_SET = Global("builtins.set")
_PLAIN = """
    BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
"""
_ACTIONS: dict[str, Any] = {
    "PROTO": _Reader.protocol,
    "FRAME": lambda reader, _: None,
    "STOP": lambda reader, _: None,
    "MARK": lambda reader, _: reader.push(_MARK),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    **dict.fromkeys(_PLAIN.split(), _Reader.push),
    "BYTEARRAY8": lambda reader, value: reader.push(bytes(value)),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.pop_to_mark())),
    "TUPLE1": lambda reader, _: reader.tuple(1),
    "TUPLE2": lambda reader, _: reader.tuple(2),
    "TUPLE3": lambda reader, _: reader.tuple(3),
    "EMPTY_SET": lambda reader, _: reader.push(Made(_SET, ([],), instance=False)),
    "ADDITEMS": lambda reader, _: reader.collect("set"),
    "FROZENSET": lambda reader, _: reader.collect("frozenset"),
    "MEMOIZE": _Reader.memoize,
    "BINPUT": _Reader.put,
    "LONG_BINPUT": _Reader.put,
    "BINGET": _Reader.get,
    "LONG_BINGET": _Reader.get,
    "GLOBAL": _Reader.named,
    "STACK_GLOBAL": _Reader.named_on_the_stack,
    "BINPERSID": _Reader.stored,
    "REDUCE": lambda reader, _: reader.make(instance=False),
    "NEWOBJ": lambda reader, _: reader.make(instance=True),
    "BUILD": _Reader.state,
    "APPEND": lambda reader, _: reader.append([reader.pop()]),
    "APPENDS": lambda reader, _: reader.append(reader.pop_to_mark()),
    "SETITEM": lambda reader, _: reader.set_items([reader.pop(), reader.pop()][::-1]),
    "SETITEMS": lambda reader, _: reader.set_items(reader.pop_to_mark()),
}
