"""How good pictures are: the scenes judge's fidelity, the Fréchet distance to renders, and intervals for any figure.

A referee holds the judge, and how its features are distributed over renders:

    referee = load_referee()
    fidelity = referee.fidelity(images, prompts)  # [B]
    distance = referee.frechet(images)
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from cascade_jax import bundle
from cascade_jax.recipes import judge as recipe
from cascade_jax.scenes import captions, data, judge

WEIGHTS = pathlib.Path(judge.__file__).parent / "judge_weights"
REFERENCE = "reference.npz"
RENDERS = 2048


@dataclasses.dataclass(frozen=True)
class Referee:
    """A judge, and how its features are distributed over renders.

    Attributes:
      judge: the network.
      mean: [F], of the features of renders; None where that is unknown.
      covariance: [F, F].
    """

    judge: judge.Judge
    mean: np.ndarray | None = None
    covariance: np.ndarray | None = None

    def fidelity(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Share of what each prompt says that the judge reads in its picture, [B]."""
        return judge.fidelity(judge.read(self.judge, images), [captions.parse(prompt) for prompt in prompts])

    def frechet(self, images: np.ndarray) -> float | None:
        """Distance of pictures to renders; None if the renders' statistics are unknown or there are no two pictures.

        The estimate is biased upwards for few pictures: compare figures of equal numbers only.
        """
        if self.mean is None or len(images) < 2:
            return None
        return frechet(*moments(judge.features(self.judge, images)), self.mean, self.covariance)


def load_referee(folder: str | pathlib.Path | None = None) -> Referee | None:
    """The judge in a folder of `recipes.judge.train_judge`, by default the one that comes with the package.

    The renders' statistics are read from the folder's reference.npz. Without it they are computed, which takes a while
    and scikit-image; without scikit-image they stay unknown.

    Returns:
      None if the package comes without a judge.

    Raises:
      FileNotFoundError: if a folder is named that holds no judge.
    """
    if folder is None and not WEIGHTS.is_dir():
        return None
    folder = pathlib.Path(WEIGHTS if folder is None else folder)
    network = _packed(folder) if (folder / "params").is_dir() else recipe.load_judge(folder)
    try:
        if (folder / REFERENCE).exists():
            with np.load(folder / REFERENCE) as stored:
                return Referee(network, stored["mean"], stored["covariance"])
        return Referee(network, *reference(network))
    except ModuleNotFoundError:
        return Referee(network)


def _packed(folder: pathlib.Path) -> judge.Judge:
    """The judge as `scenes.pack` stores it: its parameters alone."""
    graph, state = nnx.split(nnx.eval_shape(lambda: judge.Judge(rngs=nnx.Rngs(0))))
    one = bundle.here()
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), bundle.plain(state))
    with bundle.reader() as checkpointer:
        stored = checkpointer.restore((folder / "params").absolute(), wanted)
    nnx.replace_by_pure_dict(state, bundle.restored_keys(stored))
    return nnx.merge(graph, state)


def reference(network: judge.Judge, renders: int = RENDERS, seed: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Mean [F] and covariance [F, F] of the judge's features over renders of random scenes."""
    size = 64
    batches = (data.scene_batch(seed, step, size)["images"] for step in range(-(-renders // size)))
    return moments(np.concatenate([judge.features(network, images) for images in batches])[:renders])


def write_reference(folder: str | pathlib.Path) -> None:
    """Computes `reference` for the judge in `folder` and keeps it there."""
    folder = pathlib.Path(folder)
    mean, covariance = reference(recipe.load_judge(folder))
    np.savez(folder / REFERENCE, mean=mean.astype(np.float32), covariance=covariance.astype(np.float32))


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

    @property
    def covariance(self) -> np.ndarray:
        """[F, F], unbiased; of at least two vectors."""
        return self.scatter / (self.count - 1)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [F] and covariance [F, F] of [B, F], in float64."""
    whole = Moments.of(features)
    return whole.mean, whole.covariance


def frechet(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """Fréchet distance of two Gaussians: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017)."""
    values, vectors = np.linalg.eigh(covariance_b)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # the eigenvalues of A B are those of the symmetric B^(1/2) A B^(1/2)
    mixed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_a @ root), 0)).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(covariance_a) + np.trace(covariance_b) - 2 * mixed)


def interval(figure: Callable[[np.ndarray], float], count: int, resamples: int = 1000) -> tuple[float, float]:
    """The 95 % bootstrap interval of a figure that is computed from the rows with given indices, int [count]."""
    rng = np.random.default_rng(0)
    figures = [figure(rng.integers(0, count, count)) for _ in range(resamples)]
    return tuple(float(x) for x in np.quantile(figures, (0.025, 0.975)))
