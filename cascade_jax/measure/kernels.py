"""What a compiled program does, kernel by kernel: how often each runs, what it moves and computes, where it came from.

    for kernel in kernels(compiled.as_text(), "cuda"):
        ...

In scheduled HLO every instruction of the entry that is not free is one kernel, one after the other. The body of a loop
counts as often as the loop turns, where that is known; otherwise, as in the loop over steps, once.

Bytes are those of the device's memory. Of an operand that a fusion only slices, gathers from or updates in place, that
part counts alone; of what a custom call updates in place nothing does, for its text does not tell how much that is. On
a TPU what lies in its vector or scalar memory does not count.
"""

import collections
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from cascade_jax.measure.hlo import OPERAND, SHAPE, Frame, Instruction, Module, dims, parse, parts, size

PHASES = ("draft", "target", "verify", "commit")
OTHER = "other"
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier", "iota",
    "partition-id", "replica-id", "add-dependency",
}  # fmt: skip
_TINY = 4096  # bytes: a plain operation on less is the scalar core's on a TPU


@dataclass(frozen=True)
class Kernel:
    """A kernel, or a transfer, of a compiled program.

    Attributes:
      name: the instruction's.
      operation: its HLO operation; for custom calls, the target's name.
      times: how often it runs in one run of the program.
      bytes: read and written in device memory, each time.
      flops: of its products of matrices and convolutions, each time.
      phase: one of PHASES, or OTHER.
      shape: the type of what it makes.
      frames: of this package, innermost first.
      collective: the kind of exchange between devices; None for none.
      group: how many devices take part in that.
      exchanged: bytes that a device holds of what it makes.
      launched: whether it costs a launch; a transfer beside the computation does not.
    """

    name: str
    operation: str
    times: int
    bytes: int
    flops: int
    phase: str
    shape: str
    frames: tuple[Frame, ...] = ()
    collective: str | None = None
    group: int = 1
    exchanged: int = 0
    launched: bool = True


def kernels(text: str, platform: str) -> list[Kernel]:
    """The kernels of a program that was compiled for `platform`, "cuda" or "tpu"."""
    module = parse(text)
    return list(_Reader(module, platform == "tpu").kernels(module.entry, 1))


def body(text: str, platform: str) -> list[Kernel]:
    """The kernels of one turn of the entry's outermost loop whose number of turns is open: a decoding step.

    Raises:
      ValueError: if there is no such loop.
    """
    module = parse(text)
    for instruction in _reached(module, module.entry):
        if instruction.operation == "while" and _turns(module, instruction) is None:
            return list(_Reader(module, platform == "tpu").kernels(instruction.attribute("body"), 1))
    raise ValueError("the program has no loop whose number of turns is open")


class _Reader:
    def __init__(self, module: Module, tpu: bool):
        self.module, self.tpu = module, tpu

    def kernels(self, name: str, times: int) -> Iterator[Kernel]:
        shapes, users = {}, collections.defaultdict(list)
        for own in self.module.computations[name]:
            shapes[own.name] = own.shape
            for operand in own.operands:
                users[operand].append(own)
        for own in self.module.computations[name]:
            if own.operation in _FREE or own.operation.endswith("-done"):
                continue
            match own.operation:
                case "while":
                    yield from self.kernels(own.attribute("body"), times * (_turns(self.module, own) or 1))
                case "call":
                    yield from self.kernels(own.attribute("to_apply"), times)
                case "async-start":
                    yield from self.kernels(own.attribute("calls"), times)
                case "conditional":
                    yield from self._dearest_branch(own, times)
                case _ if not self._on_scalar_core(own):
                    yield self._kernel(own, shapes, users, times)

    def _dearest_branch(self, own: Instruction, times: int) -> list[Kernel]:
        found = re.search(r"branch_computations=\{([^}]*)\}", own.rest)
        names = OPERAND.findall(found[1]) if found else []
        names = names or [own.attribute("true_computation"), own.attribute("false_computation")]
        return max((list(self.kernels(name, times)) for name in names), key=lambda made: sum(k.bytes for k in made))

    def _on_scalar_core(self, own: Instruction) -> bool:
        plain = own.operation not in ("fusion", "custom-call") and not own.operation.startswith(COLLECTIVES)
        return self.tpu and plain and size(own.shape) < _TINY

    def _kernel(self, own: Instruction, shapes: dict[str, str], users, times: int) -> Kernel:
        called = self.module.computations[own.attribute("calls")] if own.operation == "fusion" else []
        target = re.search(r'custom_call_target="([^"]+)"', own.rest)
        exchange = next((i for i in [own, *called] if i.operation.removesuffix("-start") in COLLECTIVES), None)
        if called:
            moved = self._fused_bytes(called, own, shapes)
        elif own.operation in ("copy-start", "slice-start", "dynamic-slice-start"):
            moved = min(parts(own.shape)) * (1 if self.tpu else 2)
        elif own.operation in ("slice", "dynamic-slice", "gather"):
            moved = 2 * self._size(own.shape)
        elif own.operation == "dynamic-update-slice":
            moved = 2 * self._size(shapes.get(own.operands[1], ""))
        elif exchange is not None:
            moved = 2 * _exchanged(own)
        else:
            moved = self._moved(own, shapes)
        frame = own.number("stack_frame_id") or next(filter(None, (i.number("stack_frame_id") for i in called)), 0)
        return Kernel(
            name=own.name,
            operation=target[1] if target else own.operation,
            times=times,
            bytes=moved,
            flops=sum(self._flops(i, called) for i in called) if called else self._flops(own, None, shapes),
            phase=next(filter(None, map(_phase, [own, *reversed(called)])), None) or _phase_of_users(own, users),
            shape=re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", own.shape),
            frames=self.module.frames(frame),
            collective=exchange and exchange.operation.removesuffix("-start"),
            group=_group(exchange) if exchange else 1,
            exchanged=_exchanged(exchange) if exchange else 0,
            launched=not (self.tpu and own.operation.endswith("-start")),
        )

    def _size(self, shape: str) -> int:
        return size(shape, self.tpu)

    def _moved(self, own: Instruction, shapes: dict[str, str]) -> int:
        """Bytes of all that an operation reads and writes, without what a custom call updates in place."""
        made = [self._size(found[0]) for found in SHAPE.finditer(own.shape)]
        read = [self._size(shapes.get(name, "")) for name in own.operands]
        aliases = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", own.rest)
        for output, operand in re.findall(r"\{(\d*)\}: \((\d+)", aliases[1] if aliases else ""):
            made[int(output or 0)] = read[int(operand)] = 0
        return sum(made) + sum(read)

    def _fused_bytes(self, called: list[Instruction], own: Instruction, shapes: dict[str, str]) -> int:
        """Bytes that a fusion reads and writes; of what is only sliced, gathered or updated in place, that part."""
        made, uses = {i.name: i for i in called}, collections.defaultdict(list)
        for i in called:
            for place, operand in enumerate(i.operands):
                uses[operand].append((i, place))
        total, outside = 0, lambda i: self._size(shapes.get(own.operands[int(i)], "")) > 0
        for i in called:
            number = i.operation == "parameter" and re.search(r"parameter\((\d+)\)", i.rest)
            if not number or (self.tpu and not outside(number[1])):
                continue
            whole, part, stack = size(i.shape), 0, [i.name]
            while stack:
                for user, place in uses[stack.pop()]:
                    if user.operation in ("bitcast", "reshape"):
                        stack.append(user.name)
                    elif user.operation in ("dynamic-slice", "gather", "slice") and place == 0:
                        part += size(user.shape)
                    elif user.operation not in ("dynamic-update-slice", "scatter") or place:
                        part = whole
            total += min(part, whole)
        root = next(i for i in called if i.root)
        outputs = [made[name] for name in root.operands] if root.operation == "tuple" else [root]
        places = [s[0] for s in SHAPE.finditer(own.shape)]
        for output, place in zip(outputs, places if len(places) == len(outputs) else [own.shape] * len(outputs)):
            if self._size(place) == 0:
                continue
            while output.operation == "bitcast" and output.operands[0] in made:
                output = made[output.operands[0]]
            update = {"dynamic-update-slice": 1, "scatter": 2}.get(output.operation)
            written = output if update is None else made.get(output.operands[update], output)
            total += size(written.shape)
        return total

    def _flops(self, own: Instruction, called: list[Instruction] | None, shapes: dict[str, str] | None = None) -> int:
        """Of one instruction, which in a fusion may itself call a product."""
        if own.operation == "fusion" and called is not None:
            inner = self.module.computations[own.attribute("calls")]
            return sum(self._flops(i, inner) for i in inner)
        if own.operation not in ("dot", "convolution", "custom-call"):
            return 0
        of = shapes if called is None else {i.name: i.shape for i in called}
        operands = [dims(of.get(name, "")) for name in own.operands[:2]]
        if len(operands) < 2 or None in operands:
            return 0
        out = math.prod(dims(own.shape) or [0])
        contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]"?([\d,"]+)', own.rest)
        if contracted:
            axes = [int(n) for n in re.findall(r"\d+", contracted[1])]
            return 2 * out * math.prod(operands[0][axis] for axis in axes if axis < len(operands[0]))
        return 2 * _taps(own, *operands)


def _reached(module: Module, name: str) -> Iterator[Instruction]:
    for own in module.computations[name]:
        yield own
        if own.operation == "call":
            yield from _reached(module, own.attribute("to_apply"))


def _turns(module: Module, own: Instruction) -> int | None:
    """How often a loop turns: as XLA notes, or, on TPUs, as a condition says that counts up to a constant."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', own.rest):
        return int(found[1])
    condition = {i.name: i for i in module.computations[own.attribute("condition")]}
    root = next(i for i in condition.values() if i.root)
    if root.operation != "compare" or "direction=LT" not in root.rest:
        return None
    limit = condition[root.operands[1]]
    found = re.fullmatch(r"constant\((\d+)\).*", limit.rest)
    return int(found[1]) if found else None


def _phase(own: Instruction) -> str | None:
    found = re.search(rf'op_name="[^"]*/({"|".join(PHASES)})/', own.rest)
    return found[1] if found else None


def _phase_of_users(own: Instruction, users: dict[str, list[Instruction]]) -> str:
    """The phase of whatever reads a transfer or copy, which has none of its own, first."""
    seen, queue = {own.name}, collections.deque(users[own.name])
    while queue and len(seen) < 64:
        user = queue.popleft()
        if phase := _phase(user):
            return phase
        if user.name not in seen:
            seen.add(user.name)
            queue.extend(users[user.name])
    return OTHER


def _taps(own: Instruction, image: list[int], kernel: list[int]) -> int:
    """Multiplications of a convolution, those with padding left out: TPUs write many a matrix product as one."""
    labels, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", own.rest), dims(own.shape)
    if not labels or [len(label) for label in labels.groups()] != [len(image), len(kernel), len(out)]:
        return 0
    window = re.search(r"window=\{([^}]*)\}", own.rest)
    given = dict(pair.split("=") for pair in window[1].split()) if window else {}
    setting = lambda name, axis: given[name].split("x")[axis] if name in given else None
    total = out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    for axis in range(len(out) - 2):
        places, taps = (n[label.index(str(axis))] for n, label in ((out, labels[3]), (kernel, labels[2])))
        stride, reach = int(setting("stride", axis) or 1), int(setting("rhs_dilate", axis) or 1)
        gap, low = int(setting("lhs_dilate", axis) or 1), int((setting("pad", axis) or "0_0").split("_")[0])
        last = (image[labels[1].index(str(axis))] - 1) * gap
        starts = range(-low, places * stride - low, stride)
        total *= sum(
            1 for s in starts for k in range(taps) if 0 <= s + k * reach <= last and (s + k * reach) % gap == 0
        )
    return total


def _exchanged(own: Instruction) -> int:
    """Bytes that a device holds of what an exchange makes."""
    if own.operation in ("all-gather-start", "collective-permute-start"):  # their types hold what goes in, too
        return max(parts(own.shape))
    return sum(parts(own.shape))


def _group(own: Instruction) -> int:
    """Devices that exchange with each other, from any of the three ways in which groups are written."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", own.rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", own.rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", own.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", own.rest):
        return max(2, len(found[1].split("},{")))
    return 1
