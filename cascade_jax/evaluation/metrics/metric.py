"""What a metric is: a figure of what a method drew, where it stands in reports, and what it takes to measure it.

A metric knows how its figure follows from what is known of a method's pictures (`Measured`). One that must look at the
pictures is opened first, with the flags that it names: that gives a `Gauge`, whose values its figure is computed from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the command line makes flags of metrics, and must not wait for JAX
    from cascade_jax.bundle import Bundle
    from cascade_jax.methods import Method
    from cascade_jax.pipeline import Report

TIMES, STEPS, PICTURES = "times", "steps", "pictures"  # what a figure is of

Progress = Callable[[str, int, int], None]
Rows = np.ndarray | slice


class FewPictures(UserWarning):
    """A distance of too few pictures."""


@contextlib.contextmanager
def cautions() -> Iterator[list[str]]:
    """A list that holds, behind the block, what it was warned of (`FewPictures`), each once."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FewPictures)
        yield found
    found.extend(dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, FewPictures)))


@dataclasses.dataclass(frozen=True)
class Album:
    """Pictures of one method, and what each was to show.

    Attributes:
      texts: the captions.
      images: gives the pictures, uint8 [H, W, 3] each, from the first on, whenever it is called.
      names: what error messages call them.
      folder: where what was measured may be kept; None for nowhere.
    """

    texts: Sequence[str]
    images: Callable[[], Iterator[np.ndarray]]
    names: Sequence[str]
    folder: pathlib.Path | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, images: np.ndarray, texts: Sequence[str]) -> Album:
        """Pictures uint8 [B, H, W, 3] that are at hand."""
        return cls(texts, lambda: iter(images), [f"picture {number}" for number in range(len(images))])


@dataclasses.dataclass
class Measured:
    """What is known of the pictures that one method drew.

    Attributes:
      method: the method.
      seconds: [timed], of pictures drawn one at a time; every method's are of the same captions.
      stats: per picture, [B].
      values: of metrics that look at pictures, by name: [B], or one for all of them, or None where it is unknown.
    """

    method: Method
    seconds: np.ndarray
    stats: Report
    values: dict[str, np.ndarray | float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Gauge:
    """A metric with what it takes to measure pictures.

    Attributes:
      name: the metric's.
      measure: gives a value for every picture, [B], or one for all, or None where it cannot be told.
    """

    name: str
    measure: Callable[[Album, Progress | None], np.ndarray | float | None]


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag on the command line that a metric needs.

    Attributes:
      name: as a Python name.
      kind: of its value.
      metavar: what stands for the value in the help.
      help: what it is.
      hint: what happens without it.
    """

    name: str
    kind: type
    metavar: str
    help: str
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class Order:
    """What metrics are opened with.

    Attributes:
      bundle: the model that draws.
      given: values of flags by name; those that were not given are None.
      folder: where statistics of a reference may be kept; None for nowhere.
      progress: called with (what is being done, done so far, how much there is).
      say: called with what stays unknown, and why.
    """

    bundle: Bundle
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: pathlib.Path | None = None
    progress: Progress | None = None
    say: Callable[[str], None] = lambda text: None


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of what a method drew.

    Attributes:
      name: its key in reports.
      kind: what it is of: TIMES that turns took, STEPS of decoding, or PICTURES.
      figure: of (what one method drew, what AR drew or None, which turns or pictures of both); None where unknown.
      column: heads its column in tables; "" keeps it out of them.
      form: how a table writes it.
      meaning: a sentence for below a table.
      interval: whether a bootstrap interval belongs to it, which resamples turns or pictures.
      axis: its name on an axis of quality over speed; "" for no such curve.
      bar: the worst figure that still counts as AR's quality, given AR's; None if it does not count.
      lower: whether less is better.
      within: the bar in words.
      flags: what it can be opened with.
      check: raises a ValueError unless given flags fit together; nothing is read for it.
      open: gives the gauge; None if nobody asked for it, or the model is none that it can measure. Raises a ValueError
        if what the flags name is unusable. None for metrics that need no look at the pictures.
    """

    name: str
    kind: str
    figure: Callable[[Measured, Measured | None, Rows], float | None]
    column: str = ""
    form: str = "{:.3f}"
    meaning: str = ""
    interval: bool = False
    axis: str = ""
    bar: Callable[[float], float] | None = None
    lower: bool = False
    within: str = ""
    flags: tuple[Flag, ...] = ()
    check: Callable[[Mapping[str, Any]], None] = lambda given: None
    open: Callable[[Order], Gauge | None] | None = None

    def keeps(self, own: float | None, base: float | None) -> bool:
        """Whether a method's figure is as good as AR's; true where there is no bar, or AR's is unknown."""
        if self.bar is None or base is None:
            return True
        bar = self.bar(base)
        return own is not None and (own <= bar if self.lower else own >= bar)


def mean_of(name: str) -> Callable[[Measured, Measured | None, Rows], float | None]:
    """The figure of a gauge's values: their mean, or the one that there is."""

    def figure(own: Measured, base: Measured | None, rows: Rows) -> float | None:
        values = own.values.get(name)
        if values is None:
            return None
        return float(np.mean(values[rows])) if isinstance(values, np.ndarray) else float(values)

    return figure


def interval(figure: Callable[[np.ndarray], float], count: int, resamples: int = 1000) -> tuple[float, float]:
    """The 95 % bootstrap interval of a figure that is computed from the rows with given indices, int [count]."""
    rng = np.random.default_rng(0)
    figures = [figure(rng.integers(0, count, count)) for _ in range(resamples)]
    return tuple(float(x) for x in np.quantile(figures, (0.025, 0.975)))


def stacks(images: Iterable[np.ndarray], size: int = 64) -> Iterator[np.ndarray]:
    """Pictures of one size, uint8 [H, W, 3] each, in batches uint8 [at most `size`, H, W, 3]."""
    batch = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)
