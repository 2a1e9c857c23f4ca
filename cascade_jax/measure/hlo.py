"""The text of a compiled program, scheduled HLO, as computations, instructions, and the lines that they came from."""

import math
import re
from dataclasses import dataclass, field

_BITS = {"pred": 8, "token": 0, "opaque": 0}
SHAPE = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
OPERAND = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Frame:
    """A line of Python: the file from the package's folder on, where it is of this package."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class Instruction:
    """A line of HLO. `rest` is everything behind the equals sign and the type."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, name: str) -> str:
        """The name that an attribute such as `calls` gives."""
        return re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)[1]

    def number(self, name: str) -> int:
        """The number that an attribute gives; 0 without it."""
        found = re.search(rf"\b{name}=(\d+)", self.rest)
        return int(found[1]) if found else 0


@dataclass
class Module:
    """A program in parts: computations by name, and the tables that lead from an instruction to a line of Python."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""
    files: dict[int, str] = field(default_factory=dict)
    functions: dict[int, str] = field(default_factory=dict)
    locations: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # file, function, line
    stack: dict[int, tuple[int, int]] = field(default_factory=dict)  # location, parent

    def frames(self, number: int, within: str = "cascade_jax/") -> tuple[Frame, ...]:
        """The frames of a stack whose file lies in a folder of that name, innermost first."""
        found = []
        while number in self.stack:
            location, number = self.stack[number]
            file, function, line = self.locations[location]
            _, folder, short = self.files[file].rpartition(within)
            if folder:
                found.append(Frame(short, line, self.functions[function]))
        return tuple(found)


def parse(text: str) -> Module:
    """HLO text as a module.

    Raises:
      ValueError: if there is no entry computation.
    """
    module, current, table = Module(), None, None
    for line in text.splitlines():
        if current is None and line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
        elif current is None and table and line[:1].isdigit():
            _table_row(module, table, line)
        elif head := _COMPUTATION.match(line):
            current, table = module.computations.setdefault(head[2], []), None
            module.entry = head[2] if head[1] else module.entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            current.append(_instruction(line.strip()))
    if not module.entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return module


def size(shape: str, on_chip_free: bool = False) -> int:
    """Bytes of a type such as `bf16[2,8]{1,0}`, or of a tuple's parts together.

    Args:
      on_chip_free: leave out what lies in a memory space of its own, as its layout tells by S(...).
    """
    bits = 0
    for kind, lengths, layout in SHAPE.findall(shape):
        if not (on_chip_free and "S(" in layout):
            bits += _bits(kind) * math.prod(int(n) for n in lengths.split(",") if n)
    return -(-bits // 8)


def dims(shape: str) -> list[int] | None:
    """Dimensions of the first array of a type; None if there is none."""
    found = SHAPE.search(shape)
    return [int(n) for n in found[2].split(",") if n] if found else None


def parts(shape: str) -> list[int]:
    """Sizes of a tuple's arrays but its semaphores."""
    return [size(found[0]) for found in SHAPE.finditer(shape) if found[2]] or [0]


def _table_row(module: Module, table: str, line: str) -> None:
    number, _, rest = line.partition(" ")
    values = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", rest)}
    match table:
        case "FileNames":
            module.files[int(number)] = rest.strip('"')
        case "FunctionNames":
            module.functions[int(number)] = rest.strip('"')
        case "FileLocations":
            module.locations[int(number)] = values["file_name_id"], values["function_name_id"], values["line"]
        case "StackFrames":  # a parent's number is printed one higher than it is, so that 1 is none
            module.stack[int(number)] = values["file_location_id"], values.get("parent_frame_id", 1) - 1


def _instruction(line: str) -> Instruction:
    name, rest = _INSTRUCTION.match(line).groups()
    cut = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:cut], rest[cut:].strip()
    operation = re.match(r"[\w\-]+", rest)[0]
    end = _closing(rest, len(operation))
    return Instruction(name, shape, operation, tuple(OPERAND.findall(rest[:end])), rest, line.startswith("ROOT"))


def _closing(text: str, start: int = 0) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _bits(kind: str) -> int:
    return _BITS[kind] if kind in _BITS else int(re.search(r"\d+", kind)[0])
