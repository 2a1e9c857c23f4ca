"""Plans of training steps against what can be counted by hand and what is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import small
from flax import nnx

from cascade_jax.models.llamagen import LlamaGen
from cascade_jax.training import plan
from cascade_jax.training.drafter import Objective, sizes, standard, start


def test_a_matrix_products_inputs_and_output_are_what_is_alive():
    def function(a, b):
        hidden = jnp.tanh(a @ b)  # stored once: tanh is read by one product alone
        return jnp.sum(hidden @ b)

    made = jax.make_jaxpr(function)(jnp.zeros((8, 16)), jnp.zeros((16, 16)))
    assert plan.peak(made.jaxpr) == 2 * 8 * 16 * 4


def test_what_lives_on_is_counted_as_long_as_it_does():
    def function(a):
        first = a @ a
        second = first @ a
        return second @ first  # the first product is still there

    made = jax.make_jaxpr(function)(jnp.zeros((8, 8)))
    assert plan.peak(made.jaxpr) == 3 * 8 * 8 * 4


def test_parameters_are_counted_and_activations_do_not_grow_with_the_target():
    objective = Objective(guidance=2.0, dtype="bfloat16")
    six, eight = (plan.plan(dataclasses.replace(small.TARGET, layers=n), "eagle1", objective, 2) for n in (6, 8))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    target = nnx.eval_shape(lambda: LlamaGen(dataclasses.replace(small.TARGET, layers=8), rngs=nnx.Rngs(0)))
    assert eight.target == 2 * count(nnx.state(target))
    assert eight.drafter == 4 * 4 * count(jax.eval_shape(lambda: start(sizes("eagle1", small.TARGET), 0)[1]))
    assert six.activations == eight.activations
    assert eight.total == eight.target + eight.drafter + eight.batch + eight.activations


def test_rematerialisation_needs_less():
    unrolled = dataclasses.replace(standard("eagle3"), unroll=4, dtype="bfloat16")
    kept, again = (
        plan.plan(small.TARGET, "eagle3", dataclasses.replace(unrolled, remat=remat), 4) for remat in (False, True)
    )
    assert again.activations < kept.activations
    assert again.target == kept.target


def test_the_estimate_is_of_the_order_of_what_is_compiled():
    def function(w, x):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    shapes = jax.ShapeDtypeStruct((256, 256), jnp.float32), jax.ShapeDtypeStruct((512, 256), jnp.float32)
    compiled = jax.jit(jax.grad(function)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    estimate = plan.peak(jax.make_jaxpr(jax.grad(function))(*shapes).jaxpr)
    assert 0.5 * compiled < estimate < 2.5 * compiled
