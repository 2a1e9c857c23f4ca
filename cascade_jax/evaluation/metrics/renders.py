"""The Fréchet distance of pictures of scenes to renders, between the judge's features."""

from cascade_jax.evaluation.metrics.metric import PICTURES, Album, Gauge, Metric, Order, Progress, mean_of, stacks
from cascade_jax.evaluation.metrics.scenes import FLAG, referee_of

NAME = "frechet"
GROWTH = 1.10  # over AR's that still counts as its quality


def _open(order: Order) -> Gauge | None:
    referee = referee_of(order)
    if referee is None:
        return None
    if referee.renders is None:
        order.say(
            "the Fréchet distance stays unknown, for renders need scikit-image: pip install 'cascade_jax[scenes]'"
        )
        return None

    from cascade_jax.evaluation.networks.moments import Moments

    def measure(album: Album, progress: Progress | None = None) -> float | None:
        moments, seen = Moments(), 0
        for images in stacks(album.images()):
            moments = moments.merged(referee.moments(images, album.names[seen : seen + len(images)]))
            seen += len(images)
        return referee.distance(moments)

    return Gauge(NAME, measure)


FRECHET = Metric(
    NAME,
    PICTURES,
    mean_of(NAME),
    "Fréchet",
    "{:.2f}",
    meaning="The Fréchet distance is that of the judge's features to renders, and depends on the number of pictures.",
    axis="Fréchet distance to renders",
    bar=lambda base: GROWTH * base,
    lower=True,
    within=f"Fréchet distance within {100 * (GROWTH - 1):.0f} %",
    flags=(FLAG,),
    open=_open,
)
