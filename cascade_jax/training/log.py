"""The record of a run: a progress bar, lines of CSV files, the same figures as TensorBoard events, and their plot."""

import csv
import pathlib
import time

import numpy as np
from rich import progress
from rich.console import Console

from cascade_jax import files

LOSSES, EVALUATION = "log.csv", "evaluation.csv"


class Record:
    """What a run tells of itself. Of several processes the first one speaks.

    Attributes:
      evaluated: the steps up to `start` after which there was an evaluation.
    """

    def __init__(
        self, folder: pathlib.Path, title: str, start: int, steps: int, tokens_per_step: int | None, leads: bool
    ):
        """Opens the record of a run that goes on from step `start`, 0 for a new one; later lines are dropped."""
        self._folder, self._title, self._steps, self._tokens, self._leads = folder, title, steps, tokens_per_step, leads
        self._time = time.monotonic()
        self.evaluated = {int(step) for step in read(folder / EVALUATION).get("step", ()) if step <= start}
        self._files = [Log(folder / name, start, folder / "events") if leads else None for name in (LOSSES, EVALUATION)]
        self._bar = _bar(leads)
        self._bar.start()
        self._task = self._bar.add_task(title, total=steps, completed=start, loss="")

    def losses(self, step: int, rows: list[dict[str, np.ndarray]]) -> None:
        """Tells the means of the rows, those of the last steps, with steps per second."""
        now = time.monotonic()
        line = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        line["rate"] = len(rows) / (now - self._time)
        if self._tokens is not None:
            line["tokens_per_second"] = self._tokens * line["rate"]
        self._time = now
        if self._leads:
            self._files[0].write(step, line)
            self._bar.update(self._task, completed=step, loss=f"loss {line['loss']:.4f}")
            if not self._bar.console.is_terminal:
                self._say(step, f"{_text(line)}  {(self._steps - step) / line['rate'] / 60:.1f} min left")

    def evaluation(self, step: int, figures: dict[str, float], seconds: float) -> None:
        """Tells the figures of an evaluation, which took this time away from the steps."""
        self._time += seconds
        if self._leads:
            self._files[1].write(step, figures)
            self._say(step, f"held out: {_text(figures)}")

    def plot(self, wanted: bool) -> None:
        if self._leads and wanted:
            plot(self._folder)

    def close(self) -> None:
        self._bar.stop()
        for log in filter(None, self._files):
            log.close()

    def _say(self, step: int, text: str) -> None:
        self._bar.console.print(f"{self._title} {step}/{self._steps}  {text}", soft_wrap=True)


class Log:
    """A CSV file with a line per interval; lines past the step that a run resumes from are dropped.

    Args:
      path: the file.
      start: the step that the run resumes from, 0 for a new one.
      events: folder of TensorBoard's events, in which the file's name is the tag's first part.
    """

    def __init__(self, path: pathlib.Path, start: int, events: pathlib.Path):
        from tensorboardX import SummaryWriter  # a third of a second that only training spends

        self._path = path
        if path.exists():
            header, *lines = path.read_text().splitlines() or [""]
            whole = [line for line in lines if line.count(",") == header.count(",")]  # a kill may cut the last one
            kept = [line for line in whole if int(line.split(",")[0]) <= start]
            with files.whole(path) as temporary:
                temporary.write_text("\n".join([header, *kept]) + "\n")
            if not kept:
                path.unlink()
        self._events = SummaryWriter(str(events / path.stem), purge_step=start + 1 if start else None)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Writes the line of `step`."""
        line = {"step": step, **figures}
        new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, line.keys())
            if new:
                writer.writeheader()
            writer.writerow(line)
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """A log's columns by name; empty if there is none."""
    if not path.exists():
        return {}
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]  # a kill may cut the last line
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]} if rows else {}


def plot(folder: pathlib.Path) -> None:
    """Draws the losses of `log.csv` and the figures of `evaluation.csv` into `loss.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    training, evaluation = read(folder / LOSSES), read(folder / EVALUATION)
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
    with files.whole(folder / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)


def _text(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _bar(shown: bool) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),  # stdout is for results
        disable=not shown,
    )
