"""The Inception-v3 of the Fréchet Inception Distance, as `pytorch-fid` publishes it
(`pt_inception-2015-12-05-6726825d.pth`). Our module bears its names, and has no batch normalisations: they are folded
into the convolutions."""

from collections.abc import Sequence

import numpy as np

from cascade_jax import bundle
from cascade_jax.models.inception import InceptionConfig
from checkpoints_convert.formats import Family, Format, Known
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule
from checkpoints_convert.transforms import conv

EPSILON = 1e-3  # of the batch normalisations


def _rules(config: InceptionConfig) -> Sequence[Rule]:
    del config
    return (
        Rule(("**.conv.weight", "**.bn.weight", "**.bn.running_var"), "**.kernel", _kernel),
        Rule(("**.bn.bias", "**.bn.weight", "**.bn.running_mean", "**.bn.running_var"), "**.bias", _bias),
    )


def _kernel(weight: np.ndarray, scale: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return conv(weight) * _factor(scale, variance)


def _bias(bias: np.ndarray, scale: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return bias - mean * _factor(scale, variance)


def _factor(scale: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return scale / np.sqrt(variance + np.float32(EPSILON))


def _configure(source: Source, known: Known) -> InceptionConfig:
    del source, known
    return InceptionConfig()


INCEPTION = Format(
    "Inception-v3",
    "metric",
    ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var"),
    _configure,
    _rules,
    skip=("fc.weight", "fc.bias", "**.bn.num_batches_tracked"),  # the classifier; counts of training
)

FAMILY = Family("inception", (INCEPTION,), ("metric",), lambda parts: bundle.MetricConfig(parts["metric"]))
