"""A model of time: what kernels must move and compute over what a device can, and what each costs to start.

It is a lower bound with a launch cost, not a measurement. A kernel takes its launch, then the longer of its memory's
and its products' time; an exchange between devices takes a fixed cost and its bytes over the link, sent around a ring.
On a TPU, where transfers run beside the computation, the longer of both is taken for a whole phase.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cascade_jax.measure.devices import Roofline
from cascade_jax.measure.kernels import OTHER, PHASES, Kernel

DEAREST = 10
LARGE = 2_000_000  # bytes from which on a copy is worth a look


@dataclass(frozen=True)
class Cost:
    """What a number of kernels cost together.

    Attributes:
      kernels: how many are launched.
      bytes: moved in the device's memory.
      flops: of products.
      launch: seconds for starting them.
      work: seconds for moving and computing.
      exchange: seconds for exchanges with other devices.
      seconds: all three.
    """

    kernels: int
    bytes: int
    flops: int
    launch: float
    work: float
    exchange: float
    seconds: float


@dataclass(frozen=True)
class Collective:
    """Exchanges of one kind among equally many devices: how often, and the bytes a device holds of what they make."""

    kind: str
    devices: int
    count: int
    bytes: int


@dataclass(frozen=True)
class Copies:
    """Pads, copies and transposes of many bytes, which change no number: how many, and their bytes together."""

    count: int
    bytes: int


@dataclass(frozen=True)
class Dear:
    """Like kernels from one source line.

    Attributes:
      kind: what XLA calls the fusion, or the operation.
      source: "models/transformer.py:110 matmul, from Linear.__call__, FeedForward.__call__"; "" where that is unknown.
      seconds: of all of them together.
    """

    count: int
    kind: str
    shape: str
    phase: str
    source: str
    bytes: int
    flops: int
    seconds: float


def cost(kernels: Iterable[Kernel], roofline: Roofline, beside: bool) -> Cost:
    """Of kernels in a row; `beside` tells whether transfers run beside the computation."""
    launched = moved = flops = 0
    work = memory = products = exchange = 0.0
    for k in kernels:
        launched += k.times * k.launched
        moved += k.times * k.bytes
        flops += k.times * k.flops
        exchange += k.times * exchange_seconds(k, roofline)
        reads, computes = k.bytes / roofline.bandwidth, k.flops / roofline.matmul
        work += k.times * max(reads, computes)
        memory, products = memory + k.times * reads, products + k.times * computes
    work, launch = max(memory, products) if beside else work, launched * roofline.launch
    return Cost(launched, moved, flops, launch, work, exchange, launch + work + exchange)


def by_phase(kernels: Sequence[Kernel], roofline: Roofline, beside: bool) -> dict[str, Cost]:
    """The cost of every phase that has kernels."""
    found = {phase: [] for phase in (*PHASES, OTHER)}
    for k in kernels:
        found.setdefault(k.phase, []).append(k)
    return {phase: cost(own, roofline, beside) for phase, own in found.items() if own}


def total(costs: Iterable[Cost]) -> Cost:
    """Their sum."""
    rows = [dataclasses.astuple(cost) for cost in costs]
    return Cost(*map(sum, zip(*rows))) if rows else Cost(0, 0, 0, 0.0, 0.0, 0.0, 0.0)


def exchange_seconds(kernel: Kernel, roofline: Roofline) -> float:
    """Of one exchange between devices; 0 for what is none."""
    if kernel.collective is None or kernel.group < 2:
        return 0.0
    others = kernel.group - 1
    rounds = {
        "all-reduce": 2 * others / kernel.group,
        "reduce-scatter": others,  # of what is left on each
        "collective-permute": 1,
        "collective-broadcast": 1,
    }
    return roofline.exchange + rounds.get(kernel.collective, others / kernel.group) * kernel.exchanged / roofline.link


def collectives(kernels: Iterable[Kernel]) -> list[Collective]:
    """The exchanges, by kind."""
    found = collections.defaultdict(lambda: [0, 0])
    for k in kernels:
        if k.collective is not None:
            found[k.collective, k.group][0] += k.times
            found[k.collective, k.group][1] += k.times * k.exchanged
    return [Collective(*kind, *sums) for kind, sums in sorted(found.items())]


def copies(kernels: Iterable[Kernel]) -> Copies:
    """The large ones among kernels; a transfer beside the computation is none."""
    kinds = re.compile(r"pad|copy|transpose")
    found = [k for k in kernels if k.launched and not k.flops and k.bytes >= LARGE and kinds.search(k.name)]
    return Copies(sum(k.times for k in found), sum(k.times * k.bytes for k in found))


def dearest(kernels: Iterable[Kernel], roofline: Roofline, most: int = DEAREST) -> list[Dear]:
    """The kernels that take most time together, like ones from one line as one, dearest first."""
    alike = collections.defaultdict(list)
    for k in kernels:
        kind = re.sub(r"[._\d]+$", "", k.name) if k.operation == "fusion" else k.operation
        alike[kind, k.shape, k.phase, k.bytes, k.flops, k.frames[:3]].append(k)
    rows = []
    for (kind, shape, phase, moved, flops, _), own in alike.items():
        seconds = cost(own, roofline, beside=False).seconds
        count = sum(k.times for k in own)
        rows.append(Dear(count, kind, shape, phase, source(own[0]), moved, flops, seconds))
    return sorted(rows, key=lambda row: -row.seconds)[:most]


def source(kernel: Kernel) -> str:
    """Where a kernel came from: the innermost line of this package, and the functions around it."""
    if not kernel.frames:
        return ""
    first, *around = kernel.frames
    names = list(dict.fromkeys(frame.function.replace(".<locals>", "") for frame in around))[:3]
    return f"{first.file}:{first.line} {first.function}" + (f", from {', '.join(names)}" if names else "")
