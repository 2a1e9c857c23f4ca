"""FID: the Fréchet distance of Inception-v3's features of pictures to those of a reference."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cascade_jax.evaluation.metrics.metric import PICTURES, Album, Flag, Gauge, Metric, Order, Progress, mean_of, stacks

if TYPE_CHECKING:
    from cascade_jax.evaluation.networks.inception import Distance

NAME = "fid"
REFERENCE, KEPT = "reference.npz", "inception.npz"  # statistics: of the reference, and of a method's pictures


def gauge(distance: Distance) -> Gauge:
    """FID by a distance; the statistics of an album are kept in its folder."""

    from cascade_jax.evaluation.networks import inception

    def measure(album: Album, progress: Progress | None = None) -> float:
        network, told = distance.network, None
        origin = f"{len(album)} pictures, network {network.digest}"
        keep = None if album.folder is None else album.folder / KEPT
        if keep is not None and keep.is_file() and (there := inception.read(keep)).origin == origin:
            return distance.of(there)
        if progress is not None:
            told = lambda done, total: progress("Inception features", done, total)
        own = inception.statistics(
            inception.gather(network, stacks(album.images(), inception.BATCH), album.names, progress=told), origin
        )
        if keep is not None:
            inception.write(keep, own)
        return distance.of(own)

    return Gauge(NAME, measure)


def _check(given: Mapping[str, Any]) -> None:
    if (given.get("inception") is None) != (given.get("reference") is None):
        raise ValueError("FID needs both --inception and --reference")
    if given.get("square") is not None and given.get("reference") is None:
        raise ValueError("--square is about the pictures of --reference")
    if given.get("square") is not None and given["square"] < 1:
        raise ValueError(f"square must be at least 1, not {given['square']}")


def _open(order: Order) -> Gauge | None:
    if order.given.get("inception") is None:
        return None
    from cascade_jax.evaluation.networks import inception

    told = None
    if order.progress is not None:
        told = lambda done, total: order.progress("features of the reference", done, total)
    network = inception.load(order.given["inception"])
    keep = None if order.folder is None else order.folder / REFERENCE
    source, square = order.given["reference"], order.given.get("square")
    found = inception.reference(network, source, square=square, keep=keep, progress=told)
    return gauge(inception.Distance(network, found))


FID = Metric(
    NAME,
    PICTURES,
    mean_of(NAME),
    "FID",
    "{:.2f}",
    meaning="FID is the Fréchet distance of Inception-v3's features to those of the reference, and depends on the "
    "number of pictures too.",
    axis="FID",
    lower=True,
    flags=(
        Flag("inception", pathlib.Path, "DIR", "a converted Inception: measure FID; needs --reference"),
        Flag(
            "reference",
            pathlib.Path,
            "DIR|NPZ",
            "pictures that FID is measured against, or their statistics, ours or pytorch-fid's",
        ),
        Flag(
            "square",
            int,
            "N",
            "cut the reference's pictures to the square in their middle, N pixels a side",
            "(default: as they are)",
        ),
    ),
    check=_check,
    open=_open,
)
