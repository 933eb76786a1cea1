"""A pickle machine: reads the opcodes of pickle protocols 0 to 5 and builds inert values, nothing else.

No module is imported and nothing is called: what a pickle asks for by name goes to a `Meaning`, which decides what that
name stands for, or refuses it. Bytes are slices of the file, never copies. Work and memory are bounded by a `Budget`.
"""

import struct
from collections.abc import Callable

from onejump.importers.inert import Budget, Call, Meaning, printable
from onejump.importers.pickle_values import (
    elements,
    integer,
    items_of,
    number_on_line,
    old_text,
    quoted,
    text,
    unsigned,
)
from onejump.types import UserError

MAX_LINE = 4096  # bytes of an argument that ends with a newline
STOP = ord(".")
DAMAGE = (ValueError, TypeError, LookupError, ArithmeticError, struct.error)  # what reading a damaged pickle raises


class Machine:
    """Reads one pickle after another from `data`. `at` is where the next one begins."""

    def __init__(self, data: memoryview, meaning: Meaning, budget: Budget, at: int = 0):
        self.data, self.meaning, self.budget, self.at = data, meaning, budget, at
        self.stack: list = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """The value of the pickle at `at`. Raises UserError if it is damaged or asks for what is refused."""
        self.stack, self.marks, self.memo = [], [], {}
        try:
            while (opcode := self.take(1)[0]) != STOP:
                self.budget.spend(steps=1)
                if (act := OPCODES.get(opcode)) is None:
                    raise ValueError(f"opcode 0x{opcode:02x}")
                act(self)
            return self.pop()
        except UserError:
            raise
        except DAMAGE as error:
            why = f"{printable(error)}, at byte {self.at}"
            raise UserError(f"{self.budget.file}: not a readable pickle ({why}); download it again") from error

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError("it is cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def count(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> bytes:
        text = bytes(self.data[self.at : self.at + MAX_LINE])
        end = text.find(b"\n")
        if end < 0:
            raise ValueError("a line has no end")
        self.at += end + 1
        return text[:end]

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("it takes more than there is")
        return self.stack.pop()

    def top(self) -> object:
        value = self.pop()
        self.stack.append(value)
        return value

    def popped(self, count: int) -> list:
        return [self.pop() for _ in range(count)][::-1]

    def pop_mark(self) -> list:
        """Everything above the last mark."""
        if not self.marks:
            raise ValueError("it takes more than there is")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def find(self, module: object, name: object) -> object:
        if not (isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= MAX_LINE):
            raise ValueError("a name that is not a text")
        return self.meaning.find(module, name)


def set_items(machine: Machine, values: list) -> None:
    target = machine.top()
    new = items_of(values)
    if isinstance(target, Call):
        target.items.extend(new.items())
    elif isinstance(target, dict):
        target.update(new)
    else:
        raise ValueError("items for what is not a dict")


def append(machine: Machine, values: list) -> None:
    target = machine.top()
    if isinstance(target, Call):
        target.items.extend(values)
    elif isinstance(target, list):
        target.extend(values)
    else:
        raise ValueError("elements for what is not a list")


def add(machine: Machine, values: list) -> None:
    target = machine.top()
    if not isinstance(target, set):
        raise ValueError("elements for what is not a set")
    target.update(elements(values))


def call(machine: Machine, function: object, args: object) -> None:
    if not isinstance(args, tuple):
        raise ValueError("arguments that are not a tuple")
    machine.push(machine.meaning.call(function, args))


def new(machine: Machine, cls: object, args: object, kwargs: object = None) -> None:
    if not (isinstance(args, tuple) and isinstance(kwargs, dict | None)):
        raise ValueError("arguments that are not a tuple")
    machine.push(machine.meaning.new(cls, args, kwargs or {}))


def call_marked(machine: Machine) -> None:
    function, *args = machine.pop_mark()
    call(machine, function, tuple(args))


def find_on_lines(machine: Machine) -> object:
    module, name = machine.line(), machine.line()
    return machine.find(module.decode(), name.decode())


def call_on_lines(machine: Machine) -> None:
    function = find_on_lines(machine)
    call(machine, function, tuple(machine.pop_mark()))


def build(machine: Machine) -> None:
    state = machine.pop()
    machine.meaning.build(machine.top(), state)


def frame(machine: Machine) -> None:
    if machine.count(8) > len(machine.data) - machine.at:
        raise ValueError("it is cut short")


def protocol(machine: Machine) -> None:
    if (number := machine.count(1)) > 5:
        raise ValueError(f"protocol {number}")


def remember(machine: Machine, index: int) -> None:
    if not 0 <= index < 1 << 32:
        raise ValueError("a memory of an impossible number")
    machine.memo[index] = machine.top()


def recall(machine: Machine, index: int) -> None:
    if index not in machine.memo:
        raise ValueError("a memory that was never made")
    machine.push(machine.memo[index])


def counted(width: int, value: Callable[[memoryview], object]) -> Callable[[Machine], None]:
    """Pushes a value of as many bytes as the number before it says."""
    return lambda m: m.push(value(m.take(m.count(width))))


def fixed(size: int, value: Callable[[memoryview], object]) -> Callable[[Machine], None]:
    return lambda m: m.push(value(m.take(size)))


def on_line(value: Callable[[bytes], object]) -> Callable[[Machine], None]:
    return lambda m: m.push(value(m.line()))


OPCODES: dict[int, Callable[[Machine], object]] = {
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): fixed(1, unsigned),
    ord("M"): fixed(2, unsigned),
    ord("J"): fixed(4, integer),
    ord("G"): fixed(8, lambda data: struct.unpack(">d", data)[0]),
    0x8A: counted(1, integer),
    0x8B: counted(4, integer),
    ord("I"): on_line(number_on_line),
    ord("L"): on_line(number_on_line),
    ord("F"): on_line(float),
    ord("X"): counted(4, text),
    0x8C: counted(1, text),
    0x8D: counted(8, text),
    ord("T"): counted(4, old_text),
    ord("U"): counted(1, old_text),
    ord("V"): on_line(lambda line: line.decode("raw_unicode_escape")),
    ord("S"): on_line(quoted),
    ord("B"): counted(4, lambda data: data),
    ord("C"): counted(1, lambda data: data),
    0x8E: counted(8, lambda data: data),
    0x96: counted(8, lambda data: data),
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    0x8F: lambda m: m.push(set()),
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("d"): lambda m: m.push(items_of(m.pop_mark())),
    ord("l"): lambda m: m.push(m.pop_mark()),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.push(tuple(m.popped(1))),
    0x86: lambda m: m.push(tuple(m.popped(2))),
    0x87: lambda m: m.push(tuple(m.popped(3))),
    0x91: lambda m: m.push(frozenset(elements(m.pop_mark()))),
    ord("s"): lambda m: set_items(m, m.popped(2)),
    ord("u"): lambda m: set_items(m, m.pop_mark()),
    ord("a"): lambda m: append(m, m.popped(1)),
    ord("e"): lambda m: append(m, m.pop_mark()),
    0x90: lambda m: add(m, m.pop_mark()),
    ord("0"): lambda m: m.popped(1),
    ord("1"): lambda m: m.pop_mark(),
    ord("2"): lambda m: m.push(m.top()),
    ord("p"): lambda m: remember(m, int(m.line())),
    ord("q"): lambda m: remember(m, m.count(1)),
    ord("r"): lambda m: remember(m, m.count(4)),
    0x94: lambda m: remember(m, len(m.memo)),
    ord("g"): lambda m: recall(m, int(m.line())),
    ord("h"): lambda m: recall(m, m.count(1)),
    ord("j"): lambda m: recall(m, m.count(4)),
    ord("c"): lambda m: m.push(find_on_lines(m)),
    0x93: lambda m: m.push(m.find(*m.popped(2))),
    ord("R"): lambda m: call(m, *m.popped(2)),
    0x81: lambda m: new(m, *m.popped(2)),
    0x92: lambda m: new(m, *m.popped(3)),
    ord("o"): call_marked,
    ord("i"): call_on_lines,
    ord("b"): build,
    ord("P"): lambda m: m.push(m.meaning.persistent(m.line().decode())),
    ord("Q"): lambda m: m.push(m.meaning.persistent(m.pop())),
    0x80: protocol,
    0x95: frame,
}
