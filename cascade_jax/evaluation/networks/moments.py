"""Fréchet distances: how features of pictures are distributed, and how far two such distributions lie apart."""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from cascade_jax.evaluation.metrics.metric import FewPictures

_NOTHING = 8  # a distance of fewer pictures than this share of the features says nothing


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of feature vectors that come bit by bit, in float64.

    Those of parts, whoever computed them, merge into those of the whole, whatever the order (Chan, Golub and LeVeque
    1979).

    Attributes:
      count: vectors seen.
      mean: [F].
      scatter: [F, F], the sum of the outer products of their deviations from the mean.
    """

    count: int = 0
    mean: np.ndarray | float = 0.0
    scatter: np.ndarray | float = 0.0

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Those of vectors [B, F]."""
        features = np.asarray(features, np.float64)
        mean = features.mean(axis=0)
        return cls(len(features), mean, (features - mean).T @ (features - mean))

    def merged(self, other: "Moments") -> "Moments":
        """Those of the vectors of both."""
        count = self.count + other.count
        shift, share = other.mean - self.mean, other.count / max(count, 1)
        between = np.multiply.outer(shift, shift) * (self.count * share)
        return Moments(count, self.mean + shift * share, self.scatter + other.scatter + between)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """How the features of some pictures are distributed.

    Attributes:
      mean: [F].
      covariance: [F, F], unbiased.
      count: pictures; None where that was not stored.
      origin: what was measured with what, to tell whether stored statistics are the wanted ones.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    origin: str = ""


def statistics(moments: Moments, origin: str = "") -> Statistics:
    """What a distance needs of moments.

    Raises:
      ValueError: if they are of fewer than two pictures.
    """
    if moments.count < 2:
        raise ValueError(f"a Fréchet distance takes two pictures or more, and there is {moments.count}")
    return Statistics(moments.mean, moments.scatter / (moments.count - 1), moments.count, origin)


def frechet(ours: Statistics, theirs: Statistics, what: str = "the Fréchet distance") -> float:
    """Fréchet distance of two Gaussians: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017).

    Args:
      what: what error messages call it.

    Raises:
      ValueError: if the statistics have other sizes, or are not finite.
    """
    if ours.mean.shape != theirs.mean.shape:
        raise ValueError(f"the reference has {len(theirs.mean)} features, and pictures {len(ours.mean)}")
    for whose, own in (("the pictures", ours), ("the reference", theirs)):
        if not (np.isfinite(own.mean).all() and np.isfinite(own.covariance).all()):
            raise ValueError(f"{what} is unknown: the statistics of {whose} are not finite")
    values, vectors = np.linalg.eigh(theirs.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # the eigenvalues of A B are those of the symmetric B^(1/2) A B^(1/2)
    mixed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ ours.covariance @ root), 0)).sum()
    apart = np.sum((ours.mean - theirs.mean) ** 2)
    return float(apart + np.trace(ours.covariance) + np.trace(theirs.covariance) - 2 * mixed)


def finite(values: np.ndarray, names: Sequence[object], what: str) -> np.ndarray:
    """The same values [B, ...], of the pictures with these names.

    Raises:
      ValueError: if they are not finite; the message names the first picture that has such ones.
    """
    good = np.isfinite(np.asarray(values, np.float64)).reshape(len(values), -1).all(axis=1)
    if not good.all():
        raise ValueError(f"{what} of {names[int(np.argmin(good))]} is not finite: the network that measures is damaged")
    return values


def warn_of_few(count: int, features: int, what: str, whose: str, name: str) -> None:
    """Warns (`FewPictures`) of a distance of fewer pictures than features.

    Args:
      what: the pictures are.
      whose: features they are.
      name: of the distance.
    """
    if count >= features:
        return
    means = (
        "means nothing"
        if count * _NOTHING < features
        else f"comes out too large, the more so the fewer they are; compare it with the {name} of as many pictures only"
    )
    warnings.warn(
        f"there are only {count:,} {what}, fewer than {whose} {features:,} features: their covariance is singular and "
        f"the {name} {means}",
        FewPictures,
        stacklevel=3,
    )
