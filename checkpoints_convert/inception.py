"""The Inception-v3 of the Fréchet Inception Distance, as `pytorch-fid` publishes it
(`pt_inception-2015-12-05-6726825d.pth`). Our module bears its names."""

from collections.abc import Sequence

from cascade_jax import bundle
from cascade_jax.models.inception import InceptionConfig
from checkpoints_convert.formats import Family, Format, Known
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule
from checkpoints_convert.transforms import conv


def _rules(config: InceptionConfig) -> Sequence[Rule]:
    del config
    return (
        Rule("**.conv.weight", "**.conv.kernel", conv),
        Rule("**.bn.weight", "**.bn.scale"),
        Rule("**.bn.bias", "**.bn.bias"),
        Rule("**.bn.running_mean", "**.bn.mean"),
        Rule("**.bn.running_var", "**.bn.variance"),
    )


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
