"""Inception-v3's features, and the Fréchet distance between two sets of them (Heusel et al. 2017, arXiv 1706.08500).

    network = load("models/inception")
    distance = Distance(network, reference(network, "coco/val2017", square=256))
    distance.of(statistics(gather(network, batches, names)))

Pictures are read, resized and normalised as `pytorch-fid` does it: 8-bit RGB to [0, 1], bilinear to 299 x 299 without
smoothing, then to [-1, 1]. Features are gathered in float64 bit by bit, so that memory does not grow with the number of
pictures, and the parts that several processes gather can be merged (`moments.Moments`).
"""

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import bundle, files, pictures
from cascade_jax.evaluation.networks.moments import Moments, Statistics, finite, frechet, statistics, warn_of_few
from cascade_jax.models.inception import Inception
from cascade_jax.training.data import fingerprint

ENOUGH = 2048  # features of a picture
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Network:
    """Pictures to features.

    Attributes:
      features: uint8 [B, H, W, 3] to [B, F].
      digest: of its parameters.
    """

    features: Callable[[np.ndarray], np.ndarray]
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Distance:
    """A network, and the statistics that pictures are held against."""

    network: Network
    reference: Statistics

    def of(self, own: Statistics) -> float:
        """The distance of pictures with these statistics; warns where there are too few of them.

        Raises:
          ValueError: if the statistics are not finite, or of other features than the reference's.
        """
        for what, count in (("pictures", own.count), ("pictures of the reference", self.reference.count)):
            if count is not None:
                warn_of_few(count, ENOUGH, what, "Inception's", "FID")
        return frechet(own, self.reference, "FID")


def load(directory: str | os.PathLike) -> Network:
    """The Inception in a converted directory.

    Raises:
      ValueError: if it holds none.
    """
    network = bundle.load_metric(directory)
    if not isinstance(network, Inception):
        raise ValueError(f"{directory} is no Inception: make one with cascade-jax convert inception")
    graph, state = nnx.split(network)
    return Network(lambda images: np.asarray(_features(graph, state, images)), fingerprint(state)[:16])


@jax.jit(static_argnums=0)
def _features(graph: nnx.GraphDef, state: nnx.State, images: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(images.astype(jnp.float32) / 255)


def gather(
    network: Network,
    batches: Iterable[np.ndarray],
    names: Sequence[object],
    *,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Mean and covariance of the features of pictures.

    Args:
      batches: of pictures, uint8 [at most `batch`, H, W, 3].
      names: of all of them, for messages.
      progress: called with (pictures done, pictures in all).

    Raises:
      ValueError: if a picture's features are not finite.
    """
    moments = Moments()
    for images in batches:
        missing = batch - len(images)  # all batches have one size, so that one program serves them all
        filled = np.concatenate([images, *[images[-1:]] * missing])
        own = names[moments.count : moments.count + len(images)]
        features = finite(network.features(filled)[: len(images)], own, "FID is unknown: Inception's feature")
        moments = moments.merged(Moments.of(features))
        if progress is not None:
            progress(moments.count, len(names))
    return moments


def reference(
    network: Network,
    source: str | os.PathLike,
    *,
    square: int | None = None,
    keep: pathlib.Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """The statistics of a folder of pictures, or those stored in an .npz file, of ours or of `pytorch-fid`.

    Args:
      square: see `pictures.read`; for folders alone.
      keep: a file to keep the statistics of a folder in, so that they need not be measured again.

    Raises:
      ValueError: if there is neither, the file is damaged, or pictures cannot be read or have different sizes.
    """
    source = pathlib.Path(source)
    if source.is_file():
        if square is not None:
            raise ValueError(f"{source} holds statistics, and no pictures that could be cropped (square)")
        return read(source)
    origin = f"{source.absolute()}, square {square}, network {network.digest}"
    if keep is not None and keep.is_file() and (kept := read(keep)).origin == origin:
        return kept
    found = pictures.paths(source)
    moments = gather(network, pictures.batches(found, BATCH, square), found, progress=progress)
    measured = statistics(moments, origin)
    if keep is not None:
        write(keep, measured)
    return measured


def read(path: pathlib.Path) -> Statistics:
    """Statistics from an .npz file with "mu" and "sigma", as `pytorch-fid` has them.

    Raises:
      ValueError: if it holds no such thing.
    """
    try:
        with np.load(path) as stored:
            mean, covariance = stored["mu"].astype(np.float64), stored["sigma"].astype(np.float64)
            count = int(stored["count"]) if "count" in stored else None
            origin = str(stored["origin"]) if "origin" in stored else ""
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f'{path} holds no statistics, which are an .npz file with "mu" and "sigma"') from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path} holds a mean {mean.shape} and a covariance {covariance.shape}, which do not match")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path} holds statistics for FID that are not finite: measure them again")
    return Statistics(mean, covariance, count, origin)


def write(path: pathlib.Path, measured: Statistics) -> None:
    """Stores statistics, whole or not at all, so that `read` and `pytorch-fid` can read them."""
    known = {} if measured.count is None else {"count": measured.count}
    with files.whole(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, mu=measured.mean, sigma=measured.covariance, origin=measured.origin, **known)
