"""A run folder: methods draw the same captions, and are measured. Whatever stops it, it goes on where it was.

    DIR/job.json               what is drawn here: captions, seed, sampling, model
    DIR/LABEL/job.json         by which method: rule, tree, settings, drafter
    DIR/LABEL/000000.png       a picture, and beside it 000000.json, its record (see `jobs`)
    DIR/LABEL/...              what metrics found in the pictures, where they keep it
    DIR/turns-DIGEST/          seconds that these methods took in turns, 000000.json for the first prompt and so on

Everything is written whole or not at all, and whatever is there is not made again. Picture i of a method depends on its
caption, the seed and i alone. Methods and further captions can be added to a folder; what it holds already must have
been drawn by the same settings.

    figures = evaluate(bundle, {"ar": ar, "cascade": cascade}, captions, "run")
    figures["cascade"]["speedup"]
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cascade_jax import files
from cascade_jax import methods as by_name
from cascade_jax.acceptance import Rule
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.evaluation import jobs
from cascade_jax.evaluation.figures import summarise
from cascade_jax.evaluation.metrics import Gauge, Measured
from cascade_jax.evaluation.metrics.metric import Progress
from cascade_jax.measure import clock
from cascade_jax.measure.clock import machine
from cascade_jax.methods import Method
from cascade_jax.sampling import Sampling
from cascade_jax.text.captions import Caption, listed
from cascade_jax.training.data import fingerprint
from cascade_jax.tree import name_of

FORMAT = 1


def evaluate(
    bundle: Bundle,
    methods: dict[str, Method],
    captions: Sequence[str | Caption],
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    batch: int = by_name.BATCH,
    timed: int = 4,
    sampling: Sampling | None = None,
    weights: Mapping[str, str | None] | None = None,
    keep_turns: bool = False,
    gauges: Sequence[Gauge] = (),
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Draws every caption by every method and measures the pictures; whatever `folder` holds already is not made again.

    Args:
      methods: by their labels, which name folders: letters, digits and any of + . _ - behind the first of them.
      captions: picture i of every method is the i-th.
      folder: the run folder.
      batch: pictures drawn at once.
      timed: how many of the captions are drawn one at a time as well, with a clock: the methods take turns, after a
        turn that compiles. All times of a turn are of the same run.
      sampling: None for the model's own settings.
      weights: as of `weights_of`, which is asked if it is None; with large models that takes a while.
      keep_turns: take what was drawn in turns as the pictures of these captions, and compile nothing for them.
      gauges: of metrics that look at the pictures, see `metrics.opened`.
      progress: called with (what is being done, done so far, how much there is); of drawing in pictures.

    Returns:
      Every method's figures as of `figures.summarise`; None for what is unknown.

    Raises:
      ValueError: if a label is no name of a folder, there are no captions, one cannot be read, or `folder` holds
        pictures drawn with other settings or by another version, or another process owns it.
    """
    with files.owned(folder):
        draw(
            bundle, methods, captions, folder, seed=seed, batch=batch, timed=timed, sampling=sampling, weights=weights,
            keep_turns=keep_turns, progress=progress,
        )  # fmt: skip
        return summarise(measure(methods, captions, folder, timed=timed, gauges=gauges, progress=progress))


def draw(
    bundle: Bundle,
    methods: dict[str, Method],
    captions: Sequence[str | Caption],
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    batch: int = by_name.BATCH,
    timed: int = 4,
    sampling: Sampling | None = None,
    weights: Mapping[str, str | None] | None = None,
    keep_turns: bool = False,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> int:
    """The first half of `evaluate`: turns and pictures.

    Args:
      part: (p, n) draws every n-th picture from the p-th on, for n processes that share the folder. The first of them
        takes the turns.

    Returns:
      How many pictures were drawn, turns aside.
    """
    folder, texts = pathlib.Path(folder), [caption.text for caption in listed(captions)]
    sampling = (default_sampling(bundle.config) if sampling is None else sampling).checked()
    settle(bundle, methods, captions, folder, seed=seed, sampling=sampling, weights=weights)
    own = range(part[0], len(texts), part[1])
    turns = [] if part[0] else _open_turns(folder, methods, min(timed, len(texts)))
    kept = set(turns) if keep_turns else set()
    left = {label: jobs.missing(folder / label, [number for number in own if number not in kept]) for label in methods}
    count = len(own) - (min(timed, len(texts)) if keep_turns else 0) or len(own)
    size = -(-count // -(-count // batch)) if count else 1  # even batches: few pictures are thrown away
    done, total = 0, sum(map(len, left.values())) + len(turns) * len(methods)

    def report(what, count=0):
        nonlocal done
        done += count
        if progress is not None:
            progress(what, done, total)

    _take_turns(bundle, methods, texts, turns, folder, seed, sampling, report, kept)
    for label, method in methods.items():
        report(f"drawing with {label}")
        for count in jobs.draw(
            bundle, method, texts, left[label], folder / label, seed=seed, batch=size, sampling=sampling
        ):
            report(f"drawing with {label}", count)
    return sum(map(len, left.values()))


def measure(
    methods: dict[str, Method],
    captions: Sequence[str | Caption],
    folder: str | os.PathLike,
    *,
    timed: int = 4,
    gauges: Sequence[Gauge] = (),
    progress: Progress | None = None,
) -> dict[str, Measured]:
    """The second half of `evaluate`: what is known of every method's pictures.

    Raises:
      ValueError: if pictures or turns are missing, or cannot be read.
    """
    folder, texts = pathlib.Path(folder), [caption.text for caption in listed(captions)]
    turns = _records(turns_of(folder, list(methods)), min(timed, len(texts)))
    measured = {}
    for label, method in methods.items():
        place = folder / label
        found, album = _records(place, len(texts)), jobs.album(place, texts)
        report = None
        if progress is not None:
            report = lambda what, done, total, label=label: progress(f"{what} of {label}", done, total)
        times = np.array([turn["seconds"][label] for turn in turns])
        values = {gauge.name: gauge.measure(album, report) for gauge in gauges}
        measured[label] = Measured(method, times, jobs.stats(found), values)
    return measured


def turns_of(folder: str | os.PathLike, labels: Sequence[str]) -> pathlib.Path:
    """Where the times lie that these methods took in turns, whatever the order of their labels."""
    digest = hashlib.sha256("\n".join(sorted(labels)).encode()).hexdigest()
    return pathlib.Path(folder) / f"turns-{digest[:8]}"


def settle(
    bundle: Bundle,
    methods: dict[str, Method],
    captions: Sequence[str | Caption],
    folder: str | os.PathLike,
    *,
    seed: int,
    sampling: Sampling,
    weights: Mapping[str, str | None] | None = None,
) -> None:
    """Writes down what is drawn into the folder, or makes sure that it is the same as before; raises as `evaluate`.

    Args:
      sampling: checked settings.
    """
    folder, texts = pathlib.Path(folder), [caption.text for caption in listed(captions)]
    if not methods:
        raise ValueError("there are no methods")
    for label in methods:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._-]*", label) or label.startswith("turns-"):
            raise ValueError(f"a label names a folder: letters, digits and, not in front, + . _ -; {label!r} does not")
    files.check_folder(folder)
    weights = weights_of(bundle) if weights is None else weights
    place = folder / jobs.JOB
    if place.exists():
        try:
            there = json.loads(place.read_text(encoding="utf-8")).get("format")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{place} is damaged: give another folder") from error
        if there != FORMAT:
            raise ValueError(
                f"{folder} was written by another version or another command (its format is {there}, this version's "
                f"{FORMAT}): give another folder"
            )
    jobs.settle(
        folder,
        {
            "format": FORMAT,
            "captions": texts,
            "seed": seed,
            "sampling": {name: None if value is None else float(value) for name, value in vars(sampling).items()},
            "model": [weights["target"], weights["vq"]],
            "dtype": dtype_of(bundle),
        },
        growing="captions",
    )
    for label, method in methods.items():
        drafted = method.tree.depth > 0
        jobs.settle(
            folder / label,
            {
                "format": FORMAT,
                "method": method.name,
                "tree": name_of(method.tree),
                "settings": method.settings,
                "rule": _rule_digest(method.rule),
                "drafter": weights["drafter"] if drafted else None,
            },
        )


def weights_of(bundle: Bundle) -> dict[str, str | None]:
    """Digests of the parameters that pictures depend on: "target", "drafter" (None without one) and "vq"."""
    return {part: digest(bundle.params.get(part)) for part in ("target", "drafter", "vq")}


def dtype_of(bundle: Bundle) -> str:
    """The type of the weights that it draws with, which their digests do not tell."""
    return str(jax.tree.leaves(bundle.params["target"])[0].dtype)


def digest(state: Any) -> str | None:
    """Of a part's parameters; None without them."""
    return None if state is None else fingerprint(state)[:16]


def _rule_digest(rule: Rule) -> str:
    leaves, structure = jax.tree.flatten(rule)
    static = re.sub(r" at 0x[0-9a-f]+", "", str(structure))  # where a function lies differs from run to run
    digest = hashlib.sha256(static.encode())
    for leaf in map(np.asarray, leaves):
        digest.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return digest.hexdigest()[:16]


def _open_turns(folder: pathlib.Path, methods: dict[str, Method], timed: int) -> list[int]:
    """Turns that are to be taken: the missing ones, and those of another machine."""
    place, device = turns_of(folder, list(methods)), machine()["device"]
    missing = jobs.missing(place, range(timed))
    there = [number for number in range(timed) if number not in missing]
    return sorted(missing + [n for n in there if jobs.record(place, n)["device"] != device])


def _take_turns(bundle, methods, texts, turns, folder, seed, sampling, report, kept) -> None:
    def player(label, method):
        def play(number):
            (prompt,) = bundle.encode([texts[number]])
            seconds, drawn = clock.timed(by_name.draw_one, bundle, method, prompt, seed, number, sampling)
            if number in kept and jobs.missing(folder / label, [number]):
                jobs.keep(folder / label, method, number, texts[number], seed, drawn)
            return seconds

        return play

    players = {label: player(label, method) for label, method in methods.items()}
    for number, seconds in clock.take_turns(players, turns, report):
        turn = {"number": number, "prompt": texts[number], "device": machine()["device"], "seconds": seconds}
        files.write_json(turns_of(folder, list(methods)) / f"{number:06d}.json", turn)


def _records(folder: pathlib.Path, count: int) -> list[dict[str, Any]]:
    if missing := jobs.missing(folder, range(count)):
        raise ValueError(f"{folder} lacks {len(missing)} of {count} records, {missing[0]:06d}.json first: draw again")
    return jobs.records(folder, count)
