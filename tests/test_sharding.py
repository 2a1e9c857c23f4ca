"""Models divided over eight devices of this host draw what they draw on one.

JAX_NUM_CPU_DEVICES=8 pytest tests/test_sharding.py
"""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bundles

from cascade_jax import mesh, methods, pipeline, sampling, sharding, trees
from cascade_jax.bundle import default_sampling
from cascade_jax.export import artifact

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs JAX_NUM_CPU_DEVICES=8")
BATCH = 3
SETTINGS = {"lantern": {"delta": 0.2, "neighbours": 5}, "lantern++": {"neighbours": 5}, "gsd": {"group": 5}}
SETTINGS |= {name: {"window": 3} for name in ("sjd", "scd", "pac", "gsd-jacobi")}
SMALL_EAGLE_2 = trees.DynamicTree(top_k=2, rounds=1, drafts=4)


def method(name: str, model) -> methods.Method:
    bound = methods.METHODS[name].bound
    tree = None if bound else {"lantern": SMALL_EAGLE_2}.get(name, "0 1 00")
    return methods.method(name, model, tree=tree, **SETTINGS.get(name, {}))


@pytest.fixture(scope="module")
def bundles():
    """Every family's bundle on one device, and on a mesh of 2 x 4."""
    made = {family: tiny_bundles.bundle(family) for family in tiny_bundles.TARGETS}
    return {family: (one, sharding.put(one, mesh.make(2, 4))) for family, one in made.items()}


FAST = [("llamagen", "cascade"), ("llamagen", "gsd")]  # the latter's loop has a collective of the whole mesh
ALL = [(family, name) for family in tiny_bundles.TARGETS for name in methods.METHODS]


@pytest.mark.parametrize(
    ("family", "name"), [pytest.param(*p, marks=[] if p in FAST else pytest.mark.slow) for p in ALL]
)
def test_a_mesh_draws_the_tokens_of_one_device(family, name, bundles):
    """In float32; a batch that `data` does not divide."""
    assert_alike(*bundles[family], family, name)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["parallel", "hydra"])
def test_a_mesh_draws_the_tokens_of_one_device_with_drafters_in_one_pass(drafter):
    one = tiny_bundles.bundle("llamagen", drafter=drafter)
    assert_alike(one, sharding.put(one, mesh.make(2, 4)), "llamagen", "cascade")


def assert_alike(one, divided, family, name):
    chosen, prompts = method(name, one), tiny_bundles.prompts(family, BATCH)
    numbers = range(BATCH)
    want = methods.draw_numbers(one, chosen, prompts, numbers, seed=2)
    drawn = methods.draw_numbers(divided, chosen, prompts, numbers, seed=2)
    np.testing.assert_array_equal(drawn.tokens, want.tokens)
    np.testing.assert_array_equal(drawn.stats.steps, want.stats.steps)
    np.testing.assert_allclose(drawn.stats.coupled, want.stats.coupled, atol=1e-4)
    np.testing.assert_array_equal(drawn.images, want.images)


def collectives(program: str) -> list[tuple[str, int]]:
    """Kind and size in elements of every collective in a compiled program's text."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    for shapes, kind in re.findall(rf"= ([^=]*?) ({kinds})(?:-start)?\(", program):
        sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shapes)]
        found.append((kind, max(sizes)))
    return found


@pytest.mark.slow
def test_the_loop_gathers_neither_caches_nor_weights():
    """Two pictures a row of devices, guided, four nodes: activations have 4 * 4 * 32 = 512 elements on a device.

    The smallest matrix of a block has 1,024, and so have the smallest caches. In a step the target's block and the
    drafter's, which reads three pending pairs and then a level of two nodes, end in two all-reduces each.
    """
    model = sharding.put(tiny_bundles.bundle("llamagen"), mesh.make(2, 4))
    chosen, prompts = method("cascade", model), tiny_bundles.prompts("llamagen", 4)
    settings, program = default_sampling(model.config).checked(), chosen.program(model)
    state = pipeline.start(model, program, prompts, jax.random.key(0), settings)
    assert state.cache[0].key.sharding.spec == jax.sharding.PartitionSpec(None, "data", "model")
    with jax.set_mesh(model.mesh):
        lowered = sharding.run_jit.lower(program, model.decoding_params(program), state, chosen.rule, settings, None)
        text = lowered.compile().as_text()
    found = collections.Counter(collectives(text))
    assert {kind for kind, _ in found} <= {"all-reduce", "all-gather", "all-to-all"}
    assert max(size for kind, size in found if kind == "all-to-all") < 64  # parts of activations
    assert max(size for _, size in found) <= 512
    assert found["all-reduce", 512] >= 2


def test_every_device_holds_its_part_and_the_estimate_is_exact():
    made, placed = tiny_bundles.bundle("janus"), mesh.make(2, 4)
    model = sharding.put(made, placed)
    block = model.params["target"]["blocks"][0]
    part = lambda leaf: leaf[...].addressable_shards[0].data.shape
    assert part(block["attention"]["qkv"]["kernel"]) == (32, 1, 3, 8)
    assert part(block["ffn"]["gate_up"]["kernel"]) == (32, 2, 16)
    assert part(model.params["target"]["head"]["fc2"]["kernel"]) == (32, 16)
    arrays = {
        f"{part}.{name}": leaf for part, tree in made.params.items() for name, leaf in artifact.named(tree).items()
    }
    needed = sharding.needed(made.config, arrays, jnp.float32, data=2, model=4, batch=4)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model.params))
    assert needed["parameters"] == held
    halved = sharding.needed(made.config, arrays, jnp.float32, data=2, model=2, batch=4)
    assert halved["caches"] == 2 * needed["caches"]


def test_the_largest_are_found_on_a_mesh_as_without_one():
    """With ties: of equals the first."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 64)).astype(np.float32))
    with jax.set_mesh(mesh.make(1, 4)):
        found = jax.jit(lambda x: sampling.top(mesh.divided(x, 1), 6))(x)
    for ours, theirs in zip(found, jax.lax.top_k(x, 6)):
        np.testing.assert_array_equal(ours, theirs)
