"""What only a GPU can show: programs with kernels of our own give what plain ones give there.

Run by `scripts/on_device.sh`; skipped where there is no GPU.
"""

import jax
import numpy as np
import pytest
import tiny_bundles

from cascade_jax import methods, pipeline, platforms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.fixture(params=sorted(tiny_bundles.TARGETS))
def family(request):
    return request.param


def draw(family: str, name: str, count: int, seed: int = 0) -> pipeline.Generated:
    model = tiny_bundles.bundle(family)
    method = methods.method(name, model)
    return pipeline.generate(model, tiny_bundles.prompts(family, count), jax.random.key(seed), method.rule, method.tree)


@pytest.mark.parametrize("name", ["ar", "eagle", "cascade"])
def test_programs_with_and_without_kernels_draw_the_same_tokens(family, name):
    """In float32 with products in full precision: they differ by rounding, which hardly ever decides a draw."""
    with_kernels = draw(family, name, 4)
    with platforms.portable():
        jax.clear_caches()
        plain = draw(family, name, 4)
    jax.clear_caches()
    same = np.mean(np.all(with_kernels.tokens == plain.tokens, axis=1))
    assert same >= 0.75


def test_a_row_does_not_depend_on_its_batch(family):
    alone, together = draw(family, "cascade", 1), draw(family, "cascade", 3)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[0])


def test_the_same_key_draws_the_same_picture_again(family):
    first, second = draw(family, "cascade", 2), draw(family, "cascade", 2)
    np.testing.assert_array_equal(first.images, second.images)
