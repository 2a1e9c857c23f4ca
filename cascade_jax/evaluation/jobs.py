"""One list of prompts, drawn by any number of processes, none of which needs the others to finish its own part.

Process p of P draws every picture whose number is p modulo P. A picture's record is written after its file, and both
appear whole or not at all, so a folder tells what is done: whoever starts again, after a kill or with another number of
processes, draws what has no record and nothing else. Pictures depend on prompt, seed and number alone, so it does not
matter who draws them. `jax.distributed` finds the processes (on its own under SLURM, Open MPI, Kubernetes or on a TPU
pod), and because every process is recoverable, one may die and come back while the others go on.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cascade_jax import files, interrupts, pictures
from cascade_jax import methods as by_name
from cascade_jax.bundle import Bundle, Prompt
from cascade_jax.evaluation.figures import acceptance_figures
from cascade_jax.evaluation.metrics import Album, Gauge
from cascade_jax.measure.clock import machine
from cascade_jax.methods import Method
from cascade_jax.pipeline import Generated, Report
from cascade_jax.sampling import Sampling

JOB, REPORT = "job.json", "report.json"


def join(
    coordinator: str | None, processes: int | None, process: int | None, recoverable: bool = True
) -> tuple[int, int]:
    """Meets the other processes; must come before anything else asks JAX for a device. All None: as the cluster says.

    Args:
      recoverable: whether one may die and come back while the others go on.

    Returns:
      This process's number, and how many there are.

    Raises:
      ValueError: if they cannot meet.
    """
    jax.config.update("jax_enable_recoverability", recoverable)
    try:
        with interrupts.kept():
            jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"the processes cannot meet: {error}") from error
    return jax.process_index(), jax.process_count()


def settle(folder: pathlib.Path, job: dict[str, Any], growing: str = "") -> None:
    """Writes down what is drawn into a folder; everybody who joins in must draw the same.

    Args:
      growing: name of a list of which somebody may draw the first ones only; the longest is kept.

    Raises:
      ValueError: if the folder holds another job.
    """
    job, place = json.loads(json.dumps(job)), folder / JOB
    if not place.exists():
        files.write_json(place, job)
    there = json.loads(place.read_text(encoding="utf-8"))
    longer = False
    if growing and isinstance(there.get(growing), list):
        shorter, longest = sorted((job[growing], there[growing]), key=len)
        if longest[: len(shorter)] == shorter:
            longer, job = longest is not there[growing], job | {growing: longest}
            there[growing] = longest
    if names := [name for name in job if job[name] != there.get(name)]:
        raise ValueError(f"{folder} holds pictures of another job (other {', '.join(names)}): give another --out")
    if longer:
        files.write_json(place, there)


def missing(folder: pathlib.Path, numbers: Sequence[int]) -> list[int]:
    """The numbers without a record."""
    return [number for number in numbers if not _record(folder, number).exists()]


def draw(
    bundle: Bundle,
    method: Method,
    prompts: Sequence[str | Prompt],
    numbers: Sequence[int],
    folder: pathlib.Path,
    *,
    seed: int,
    batch: int,
    sampling: Sampling,
) -> Iterator[int]:
    """Draws the pictures of these numbers, in batches of one size, into NUMBER.png and NUMBER.json.

    Args:
      prompts: of all pictures, by number.

    Yields:
      How many pictures were just written.
    """
    for start in range(0, len(numbers), batch):
        own = list(numbers[start : start + batch])
        drawn = by_name.draw_numbers(bundle, method, prompts, own, seed, sampling, batch)
        texts = [prompts[number] for number in own]
        for row, number in enumerate(own):
            keep(folder, method, number, texts[row], seed, drawn, row)
        yield len(own)


def keep(
    folder: pathlib.Path, method: Method, number: int, prompt: str, seed: int, drawn: Generated, row: int = 0
) -> None:
    """Writes a row of what was drawn as the picture of that number, and then its record."""
    own = {"number": number, "prompt": prompt, "seed": seed, "process": jax.process_index()}
    own |= {name: getattr(drawn.stats, name)[row].item() for name in vars(drawn.stats)}
    note = {"Description": prompt, "Comment": f"{method.name}, seed {seed}, picture {number}"}
    pictures.write(folder / f"{number:06d}.png", drawn.images[row], **note)
    files.write_json(_record(folder, number), own)


def wait(folder: pathlib.Path, count: int, patience: float, say: Callable[[str], None]) -> None:
    """Waits for the records of all pictures.

    Raises:
      ValueError: if none came for `patience` seconds.
    """
    left, since = count + 1, time.monotonic()
    while open_ := missing(folder, range(count)):
        if len(open_) < left:
            left, since = len(open_), time.monotonic()
            say(f"waiting for {left} pictures of other processes")
        if time.monotonic() - since > patience:
            raise ValueError(
                f"{left} of {count} pictures are missing and nobody draws them: start the command again, it goes on "
                "where it stopped"
            )
        interrupts.check()
        time.sleep(0.2)


def records(folder: pathlib.Path, count: int) -> list[dict[str, Any]]:
    """The records of the first `count` pictures."""
    return [record(folder, number) for number in range(count)]


def record(folder: pathlib.Path, number: int) -> dict[str, Any]:
    """A picture's record."""
    return json.loads(_record(folder, number).read_text(encoding="utf-8"))


def stats(found: Sequence[dict[str, Any]]) -> Report:
    """What records say of how the pictures were drawn."""
    names = [field.name for field in dataclasses.fields(Report)]
    return Report(**{name: np.array([own[name] for own in found]) for name in names})


def album(folder: pathlib.Path, texts: Sequence[str]) -> Album:
    """The pictures in a folder, of these captions by number."""
    paths = [folder / f"{number:06d}.png" for number in range(len(texts))]
    return Album(texts, lambda: map(pictures.read, paths), paths, folder)


def report(
    folder: pathlib.Path, prompts: Sequence[str], job: dict[str, Any], gauges: Sequence[Gauge] = ()
) -> dict[str, Any]:
    """Writes report.json over all records, and returns it: means over pictures, or over steps.

    Args:
      gauges: measure the pictures; a report holds the means of what they find.
    """
    found = records(folder, len(prompts))
    processes = [own["process"] for own in found]
    values = {gauge.name: gauge.measure(album(folder, prompts), None) for gauge in gauges}
    content = {
        **job,
        "machine": machine(),
        "pictures": len(prompts),
        "by_process": {str(process): processes.count(process) for process in sorted(set(processes))},
        **acceptance_figures(stats(found)),
        **{name: None if value is None else float(np.mean(value)) for name, value in values.items()},
    }
    files.write_json(folder / REPORT, content)
    return content


def _record(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number:06d}.json"
