"""The record of a run: lines of a CSV file, the same figures as TensorBoard events, and a plot of them."""

import csv
import pathlib
import time

import numpy as np


class Log:
    """A CSV file with a line per interval; lines past the step that a run resumes from are dropped.

    Args:
      path: the file.
      start: the step that the run resumes from, 0 for a new one.
      events: folder of TensorBoard's events, in which the file's name is the tag's first part; None for none.
    """

    def __init__(self, path: pathlib.Path, start: int, events: pathlib.Path | None = None):
        self._path, self._time, self._events = path, time.monotonic(), None
        if path.exists():
            header, *lines = path.read_text().splitlines()
            kept = [line for line in lines if int(line.split(",")[0]) <= start]
            path.write_text("\n".join([header, *kept]) + "\n")
        if events is not None:
            from tensorboardX import SummaryWriter  # a third of a second that only training spends

            self._events = SummaryWriter(str(events / path.stem), purge_step=start + 1 if start else None)

    def average(self, step: int, rows: list[dict[str, np.ndarray]], tokens: int | None = None) -> dict[str, float]:
        """Writes the rows' means as the line of `step`, with steps per second and, at `tokens` a step, tokens."""
        now = time.monotonic()
        line = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        line["rate"] = len(rows) / (now - self._time)
        if tokens is not None:
            line["tokens_per_second"] = tokens * line["rate"]
        self._time = now
        return self.write(step, line)

    def write(self, step: int, figures: dict[str, float]) -> dict[str, float]:
        """Writes the line of `step` and returns it."""
        line = {"step": step, **figures}
        new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, line.keys())
            if new:
                writer.writeheader()
            writer.writerow(line)
        if self._events is not None:
            for name, value in figures.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        return line

    def pause(self, seconds: float) -> None:
        """Leaves out time that was not spent on steps."""
        self._time += seconds

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """A log's columns by name; empty if there is none."""
    if not path.exists():
        return {}
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]} if rows else {}


def plot(folder: pathlib.Path) -> None:
    """Draws the losses of `log.csv` and the figures of `evaluation.csv` into `loss.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    training, evaluation = read(folder / "log.csv"), read(folder / "evaluation.csv")
    losses = {name: values for name, values in training.items() if name in ("loss", "soft", "hard", "feature", "nats")}
    shares = {name: values for name, values in training.items() if name.startswith(("top", "acceptance"))}
    alphas = {name: values for name, values in evaluation.items() if name != "step"}
    panels = [(losses, training, "loss"), (shares, training, "share"), (alphas, evaluation, "held-out")]
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        return
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(7, 3 * len(panels)), sharex=True, squeeze=False)
    for axis, (curves, source, label) in zip(axes[:, 0], panels):
        for name, values in curves.items():
            axis.plot(source["step"], values, label=name, marker="o" if source is evaluation else None)
        axis.set_ylabel(label)
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
