"""The judge of scenes, which two metrics ask: what it reads in pictures, and how far its features lie from renders'.

referee = load_referee()
fidelity = referee.fidelity(images, prompts)  # [B]
distance = referee.frechet(images)
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from cascade_jax import bundle
from cascade_jax.evaluation.networks.moments import Moments, Statistics, finite, frechet, statistics, warn_of_few
from cascade_jax.models.judge import Judge
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
      renders: its features' statistics over renders; None where these are unknown.
    """

    judge: Judge
    renders: Statistics | None = None

    def fidelity(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Share of what each prompt says that the judge reads in its picture, [B].

        Raises:
          ValueError: if the judge's weights are damaged.
        """
        return judge.fidelity(self._read(images, prompts), [captions.parse(prompt) for prompt in prompts])

    def shapes(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Share of each prompt's things whose shape the judge reads in its picture, [B]. Raises as `fidelity`."""
        right, said = judge.marks(self._read(images, prompts), [captions.parse(prompt) for prompt in prompts])[
            "shape"
        ].T
        return right / said

    def _read(self, images, prompts) -> judge.Reading:
        reading = judge.read(self.judge, images)
        for logits in reading:
            finite(logits, prompts, "what the judge reads in the picture")
        return reading

    def moments(self, images: np.ndarray, names: Sequence[object]) -> Moments:
        """Those of the features of pictures with these names. Raises as `fidelity`."""
        return Moments.of(finite(judge.features(self.judge, images), names, "the judge's feature"))

    def distance(self, moments: Moments) -> float | None:
        """Fréchet distance to renders of pictures with these moments; None if the renders' statistics are unknown or
        there are no two pictures. Warns where there are few: compare figures of equal numbers only."""
        if self.renders is None or moments.count < 2:
            return None
        warn_of_few(moments.count, len(self.renders.mean), "pictures", "the judge's", "Fréchet distance")
        return frechet(statistics(moments), self.renders, "the Fréchet distance to renders")


def load_referee(folder: str | pathlib.Path | None = None) -> Referee | None:
    """The judge in a folder, a bundle or a run of `recipes.judge.train_judge`; by default the package's own.

    The renders' statistics are read from the folder's reference.npz. Without it they are computed, which takes a while
    and scikit-image; without scikit-image they stay unknown.

    Returns:
      None if the package comes without a judge.

    Raises:
      FileNotFoundError: if a folder is named that holds no judge.
      bundle.BundleError: if it is a bundle of something else, or damaged.
    """
    if folder is None and not WEIGHTS.is_dir():
        return None
    folder = pathlib.Path(WEIGHTS if folder is None else folder)
    network = bundle.load_metric(folder) if (folder / "config.json").is_file() else recipe.load_judge(folder)
    if not isinstance(network, Judge):
        raise bundle.BundleError(f"{folder} is no judge of scenes but a {type(network).__name__}")
    try:
        if (folder / REFERENCE).exists():
            with np.load(folder / REFERENCE) as stored:
                return Referee(network, Statistics(stored["mean"], stored["covariance"]))
        return Referee(network, reference(network))
    except ModuleNotFoundError:
        return Referee(network)


def reference(network: Judge, renders: int = RENDERS, seed: int = 9) -> Statistics:
    """Statistics of the judge's features over renders of random scenes."""
    size = 64
    batches = (data.scene_batch(seed, step, size)["images"] for step in range(-(-renders // size)))
    features = np.concatenate([judge.features(network, images) for images in batches])[:renders]
    return statistics(Moments.of(features))


def write_reference(folder: str | pathlib.Path) -> None:
    """Computes `reference` for the judge in `folder` and keeps it there."""
    folder = pathlib.Path(folder)
    found = reference(recipe.load_judge(folder))
    np.savez(folder / REFERENCE, mean=found.mean.astype(np.float32), covariance=found.covariance.astype(np.float32))
