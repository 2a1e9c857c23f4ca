"""Models divided over eight devices of this host draw what they draw on one."""

import re

import jax
import numpy as np
import pytest
import tiny_bundles

from cascade_jax import mesh, methods, pipeline, sharding, trees

BATCH = 3
SETTINGS = {"lantern": {"delta": 0.2, "neighbours": 5}, "lantern++": {"neighbours": 5}, "gsd": {"group": 5}}
SMALL_EAGLE_2 = trees.DynamicTree(top_k=2, rounds=1, drafts=4)


def method(name: str, model) -> methods.Method:
    tree = {"ar": None, "lantern": SMALL_EAGLE_2}.get(name, "0 1 00")
    return methods.method(name, model, tree=tree, **SETTINGS.get(name, {}))


@pytest.fixture(scope="module")
def bundles():
    """Every family's bundle on one device, and on a mesh of 2 x 4."""
    made = {family: tiny_bundles.bundle(family) for family in tiny_bundles.TARGETS}
    return {family: (one, sharding.put(one, mesh.make(2, 4))) for family, one in made.items()}


FAST = [("llamagen", name) for name in methods.METHODS] + [("chameleon", "cascade"), ("janus", "lantern")]
ALL = [(family, name) for family in tiny_bundles.TARGETS for name in methods.METHODS]


@pytest.mark.parametrize(
    ("family", "name"), [pytest.param(*p, marks=[] if p in FAST else pytest.mark.slow) for p in ALL]
)
def test_a_mesh_draws_the_tokens_of_one_device(family, name, bundles):
    """In float32; a batch that `data` does not divide."""
    one, divided = bundles[family]
    chosen, prompts = method(name, one), tiny_bundles.prompts(family, BATCH)
    want = pipeline.generate(one, prompts, jax.random.key(2), chosen.rule, chosen.tree)
    drawn = pipeline.generate(divided, prompts, jax.random.key(2), chosen.rule, chosen.tree)
    np.testing.assert_array_equal(drawn.tokens, want.tokens)
    np.testing.assert_array_equal(drawn.stats.steps, want.stats.steps)
    np.testing.assert_allclose(drawn.stats.coupled, want.stats.coupled, atol=1e-4)
    np.testing.assert_array_equal(drawn.images, want.images)


def collectives(program: str) -> list[tuple[str, int]]:
    """Name and largest size in elements of every collective in a compiled program's text."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    for shapes, kind in re.findall(rf"= ([^=]*?) ({kinds})(?:-start)?\(", program):
        sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shapes)]
        found.append((kind, max(sizes)))
    return found
