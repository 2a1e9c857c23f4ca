"""The Fréchet Inception Distance of pictures to a reference (Heusel et al. 2017, arXiv 1706.08500).

    network = load("models/inception")
    distance = Distance(network, reference(network, "coco/val2017", square=256))
    distance.to(pictures.paths("run/cascade"))

Pictures (see `pictures.read`) are resized and normalised as `pytorch-fid` does it: 8-bit RGB to [0, 1], bilinear to
299 x 299 without smoothing, then to [-1, 1]. Features are gathered in float64 bit by bit, so that memory does not grow
with the number of pictures, and the parts that several processes gather can be merged (`quality.Moments`).
"""

import dataclasses
import os
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import bundle, pictures
from cascade_jax.evaluation import files
from cascade_jax.evaluation.metrics.judge import Moments, frechet
from cascade_jax.models.inception import Inception
from cascade_jax.training.data import fingerprint

ENOUGH = 2048  # features of a picture
BATCH = 32

Progress = Callable[[int, int], None]

_CAUTION = (
    f"there are only {{count:,}} {{what}}, fewer than Inception's {ENOUGH:,} features: their covariance is singular "
    "and FID comes out too large, the more so the fewer they are; compare it with FIDs of as many pictures only"
)


class FewPictures(UserWarning):
    """A distance of too few pictures."""


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
class Statistics:
    """How the features of some pictures are distributed.

    Attributes:
      mean: [F].
      covariance: [F, F].
      count: pictures; None where that was not stored.
      origin: what was measured with what, to tell whether stored statistics are the wanted ones.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class Distance:
    """A network, and the statistics that pictures are held against."""

    network: Network
    reference: Statistics

    def to(self, found: Sequence[pathlib.Path], progress: Progress | None = None) -> float:
        """The distance of pictures; warns as `of`.

        Raises:
          ValueError: if they cannot be read, or there are no two.
        """
        return self.of(statistics(gather(self.network, found, progress=progress)))

    def of(self, own: Statistics) -> float:
        """The distance of pictures with these statistics; warns where there are too few of them."""
        theirs = self.reference
        for what, count in (("pictures", own.count), ("pictures of the reference", theirs.count)):
            if count is not None and count < ENOUGH:
                warnings.warn(_CAUTION.format(what=what, count=count), FewPictures, stacklevel=2)
        if own.mean.shape != theirs.mean.shape:
            raise ValueError(f"the reference has {len(theirs.mean)} features, and pictures {len(own.mean)}")
        return frechet(own.mean, own.covariance, theirs.mean, theirs.covariance)


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
    found: Sequence[pathlib.Path],
    *,
    square: int | None = None,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Moments:
    """Mean and covariance of the features of pictures.

    Args:
      square: see `pictures.batches`.
      batch: pictures at once; memory grows with it.
      progress: called with (pictures done, pictures in all).

    Raises:
      ValueError: if a picture cannot be read, or they have different sizes.
    """
    moments = Moments()
    for images in pictures.batches(found, batch, square):
        missing = batch - len(images)  # all batches have one size, so that one program serves them all
        filled = np.concatenate([images, *[images[-1:]] * missing])
        moments = moments.merged(Moments.of(network.features(filled)[: len(images)]))
        if progress is not None:
            progress(moments.count, len(found))
    return moments


def statistics(moments: Moments, origin: str = "") -> Statistics:
    """What a distance needs of moments.

    Raises:
      ValueError: if they are of fewer than two pictures.
    """
    if moments.count < 2:
        raise ValueError(f"a Fréchet distance takes two pictures or more, and there is {moments.count}")
    return Statistics(moments.mean, moments.covariance, moments.count, origin)


def reference(
    network: Network,
    source: str | os.PathLike,
    *,
    square: int | None = None,
    keep: pathlib.Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """The statistics of a folder of pictures, or those stored in an .npz file, of ours or of `pytorch-fid`.

    Args:
      square: see `pictures.batches`; for folders alone.
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
    measured = statistics(gather(network, found, square=square, progress=progress), origin)
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
    return Statistics(mean, covariance, count, origin)


def write(path: pathlib.Path, measured: Statistics) -> None:
    """Stores statistics, whole or not at all, so that `read` and `pytorch-fid` can read them."""
    known = {} if measured.count is None else {"count": measured.count}
    with files.whole(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, mu=measured.mean, sigma=measured.covariance, origin=measured.origin, **known)
