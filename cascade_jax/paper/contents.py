"""What of the paper can be made: every table and figure, and what each takes."""

import dataclasses
from collections.abc import Callable

from cascade_jax.paper import features, tables, tradeoffs
from cascade_jax.paper.lab import Lab, Result


@dataclasses.dataclass(frozen=True)
class Entry:
    """A table or figure.

    Attributes:
      make: measures it.
      count: captions, of everything's the first, unless others are asked for; None for as many as the tables.
      drafters: whether it compares drafters, and needs others than the model's own.
      judged: whether pictures are measured for it.
      methods: whether it compares whatever methods it is given.
    """

    make: Callable[[Lab], Result]
    count: int | None = None
    drafters: bool = False
    judged: bool = True
    methods: bool = False


COUNT = 64  # captions of whatever has no count of its own
CONTENTS = {
    "table1": Entry(tables.table_1, methods=True),
    "table2": Entry(tables.table_2, drafters=True),
    "table3a": Entry(tables.table_3a, drafters=True),
    "table3b": Entry(tables.table_3b),
    "figure3": Entry(features.figure_3, count=2, judged=False),
    "figure4": Entry(tradeoffs.figure_4),
    "figure8": Entry(features.figure_8, count=16, judged=False),
    "figure9": Entry(features.figure_9, count=1, judged=False),
    "figure13": Entry(tradeoffs.figure_13, count=COUNT),
    "figure14": Entry(tradeoffs.figure_14, count=COUNT),
}
