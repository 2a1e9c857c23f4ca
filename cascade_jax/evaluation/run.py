"""A run folder: methods draw the same captions, and are measured. Whatever stops it, it goes on where it was.

    DIR/job.json               what is drawn here: captions, seed, sampling, model
    DIR/LABEL/job.json         by which method: rule, tree, settings, drafter
    DIR/LABEL/000000.png       a picture, and beside it 000000.json, its record (see `jobs`)
    DIR/LABEL/clip.json        CLIP's cosines, and inception.npz, statistics for FID: only if they were asked for
    DIR/turns-DIGEST/          seconds that these methods took in turns, 000000.json for the first prompt and so on

Everything is written whole or not at all, and whatever is there is not made again. Picture i of a method depends on its
caption, the seed and i alone. Methods can be added to a folder; what it holds already must have been drawn by the same
settings.

    figures = evaluate(bundle, {"ar": ar, "cascade": cascade}, captions, "run")
    figures["cascade"]["speedup"]
"""

import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cascade_jax import methods as by_name
from cascade_jax import pictures
from cascade_jax.acceptance import Rule
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.evaluation import compare, files, jobs
from cascade_jax.evaluation.compare import Measured
from cascade_jax.evaluation.metrics import fid as fids
from cascade_jax.evaluation.metrics.clip import Scorer
from cascade_jax.evaluation.metrics.judge import Referee
from cascade_jax.methods import Method
from cascade_jax.sampling import Sampling
from cascade_jax.text.captions import Caption, listed
from cascade_jax.training.data import fingerprint

FORMAT = 1
CLIP, INCEPTION = "clip.json", "inception.npz"

Progress = Callable[[str, int, int], None]


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
    referee: Referee | None = None,
    clip: Scorer | None = None,
    fid: fids.Distance | None = None,
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
      referee: judges fidelity and Fréchet distance, of scenes.
      clip: scores pictures against their captions.
      fid: compares pictures with a reference; warns if there are fewer than it takes.
      progress: called with (what is being done, done so far, how much there is); of drawing in pictures.

    Returns:
      Every method's figures as of `compare.summarise`; None for what is unknown.

    Raises:
      ValueError: if a label is no name of a folder, there are no captions, one cannot be read, or `folder` holds
        pictures drawn with other settings or by another version.
    """
    draw(
        bundle, methods, captions, folder, seed=seed, batch=batch, timed=timed, sampling=sampling,
        judged=referee, progress=progress,
    )  # fmt: skip
    return compare.summarise(
        measure(methods, captions, folder, timed=timed, referee=referee, clip=clip, fid=fid, progress=progress)
    )


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
    judged: Referee | None = None,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> int:
    """The first half of `evaluate`: turns and pictures.

    Args:
      judged: gives every record its fidelity.
      part: (p, n) draws every n-th picture from the p-th on, for n processes that share the folder. The first of them
        takes the turns.

    Returns:
      How many pictures were drawn, turns aside.
    """
    folder, texts = pathlib.Path(folder), [caption.text for caption in listed(captions)]
    sampling = (default_sampling(bundle.config) if sampling is None else sampling).checked()
    settle(bundle, methods, captions, folder, seed=seed, sampling=sampling, judged=judged is not None)
    own = range(part[0], len(texts), part[1])
    left = {label: jobs.missing(folder / label, own) for label in methods}
    turns = [] if part[0] else _open_turns(folder, methods, min(timed, len(texts)))
    done, total = 0, sum(map(len, left.values())) + len(turns) * len(methods)

    def report(what, count=0):
        nonlocal done
        done += count
        if progress is not None:
            progress(what, done, total)

    _take_turns(bundle, methods, texts, turns, folder, seed, sampling, report)
    for label, method in methods.items():
        report(f"drawing with {label}")
        for count in jobs.draw(
            bundle, method, texts, left[label], folder / label, seed=seed, batch=batch, sampling=sampling,
            referee=judged,
        ):  # fmt: skip
            report(f"drawing with {label}", count)
    return sum(map(len, left.values()))


def measure(
    methods: dict[str, Method],
    captions: Sequence[str | Caption],
    folder: str | os.PathLike,
    *,
    timed: int = 4,
    referee: Referee | None = None,
    clip: Scorer | None = None,
    fid: fids.Distance | None = None,
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
        found = _records(place, len(texts))
        shares = [record["fidelity"] for record in found]
        paths = [place / f"{number:06d}.png" for number in range(len(texts))]

        def report(what, label=label):
            return None if progress is None else lambda done, total: progress(f"{what} of {label}", done, total)

        measured[label] = Measured(
            method,
            np.array([turn["seconds"][label] for turn in turns]),
            jobs.stats(found),
            fidelity=None if None in shares else np.array(shares),
            frechet=None if referee is None else referee.frechet(np.concatenate([*pictures.batches(paths, 64)])),
            clip=None if clip is None else _clip_scores(clip, place / CLIP, paths, texts, report("CLIP score")),
            fid=None if fid is None else _distance(fid, place / INCEPTION, paths, report("Inception features")),
        )
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
    judged: bool,
) -> None:
    """Writes down what is drawn into the folder, or makes sure that it is the same as before; raises as `evaluate`.

    Args:
      sampling: checked settings.
      judged: whether records tell fidelity.
    """
    folder, texts = pathlib.Path(folder), [caption.text for caption in listed(captions)]
    if not methods:
        raise ValueError("there are no methods")
    for label in methods:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._-]*", label) or label.startswith("turns-"):
            raise ValueError(f"a label names a folder: letters, digits and, not in front, + . _ -; {label!r} does not")
    files.check_folder(folder)
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
            "model": [_digest(bundle, part) for part in ("target", "vq")],
            "judged": judged,
        },
    )
    for label, method in methods.items():
        drafted = method.tree.depth > 0
        jobs.settle(
            folder / label,
            {
                "format": FORMAT,
                "method": method.name,
                "tree": by_name.tree_name(method.tree),
                "settings": method.settings,
                "rule": _rule_digest(method.rule),
                "drafter": _digest(bundle, "drafter") if drafted else None,
            },
        )


def _digest(bundle: Bundle, part: str) -> str:
    """Of a part's parameters; kept with the bundle, for it takes a while with large models."""
    kept = bundle.__dict__.setdefault("_digests", {})
    if part not in kept:
        kept[part] = fingerprint(bundle.params[part])[:16]
    return kept[part]


def _rule_digest(rule: Rule) -> str:
    leaves, structure = jax.tree.flatten(rule)
    static = re.sub(r" at 0x[0-9a-f]+", "", str(structure))  # where a function lies differs from run to run
    digest = hashlib.sha256(static.encode())
    for leaf in map(np.asarray, leaves):
        digest.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return digest.hexdigest()[:16]


def _open_turns(folder: pathlib.Path, methods: dict[str, Method], timed: int) -> list[int]:
    """Turns that are to be taken: the missing ones, and those of another machine."""
    place, device = turns_of(folder, list(methods)), compare.machine()["device"]
    missing = jobs.missing(place, range(timed))
    there = [number for number in range(timed) if number not in missing]
    return sorted(missing + [n for n in there if jobs.record(place, n)["device"] != device])


def _take_turns(bundle, methods, texts, turns, folder, seed, sampling, report) -> None:
    def one(method, number):
        (prompt,) = bundle.encode([texts[number]])
        begin = time.perf_counter()
        by_name.draw_one(bundle, method, prompt, seed, number, sampling)
        return time.perf_counter() - begin

    if not turns:
        return
    for label, method in methods.items():
        report(f"compiling {label}")
        one(method, turns[0])
    for number in turns:
        seconds = {}
        for label, method in methods.items():
            report(f"timing {label}")
            seconds[label] = one(method, number)
            report(f"timing {label}", 1)
        turn = {"number": number, "prompt": texts[number], "device": compare.machine()["device"], "seconds": seconds}
        files.write_json(turns_of(folder, list(methods)) / f"{number:06d}.json", turn)


def _records(folder: pathlib.Path, count: int) -> list[dict[str, Any]]:
    if missing := jobs.missing(folder, range(count)):
        raise ValueError(f"{folder} lacks {len(missing)} of {count} records, {missing[0]:06d}.json first: draw again")
    return jobs.records(folder, count)


def _clip_scores(scorer: Scorer, kept: pathlib.Path, paths, texts, progress) -> np.ndarray:
    about = {"network": scorer.digest, "pictures": len(paths)}
    if kept.is_file():
        there = json.loads(kept.read_text(encoding="utf-8"))
        if all(there.get(name) == value for name, value in about.items()):
            return np.array(there["scores"])
    scores = scorer.scores(map(pictures.read, paths), texts, progress=progress)
    files.write_json(kept, {**about, "scores": [float(score) for score in scores]})
    return scores.astype(np.float64)


def _distance(distance: fids.Distance, kept: pathlib.Path, paths, progress) -> float:
    origin = f"{len(paths)} pictures, network {distance.network.digest}"
    if kept.is_file() and (there := fids.read(kept)).origin == origin:
        return distance.of(there)
    own = fids.statistics(fids.gather(distance.network, paths, progress=progress), origin)
    fids.write(kept, own)
    return distance.of(own)
