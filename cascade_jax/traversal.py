"""Traversal verification: a draft tree judged from its leaves, which accepts more than the walk from the root.

(Weng et al. 2025, arXiv 2505.12398; on a chain it is block verification, Sun et al. 2024, arXiv 2403.10444.)

The walk decides every draft for good when it comes to it. Here a path is judged as a whole: a draft that the target
likes more than the drafter did makes up for one above it that it liked less. Let the output go through a node with
probability h, and on from there by the law r; the root has h = 1, and every node starts with the target's own law. A
child drawn from d is x with probability d(x), and is given

    h_x = min(1, h r(x) / d(x)),

so that it accounts for min(d(x), h r(x)) of the h r(x) that x is due. What is left, [h r - d]_+ with the sum R, is due
after the child failed, which has the probability 1 - h + R. So the node goes on to its next child with

    h' = R / (R + 1 - h),  r' = [h r - d]_+ / R,

and after its last child the output ends there with probability h', its bonus token drawn from r'; or else the node
fails. By induction from the leaves, a node succeeds with probability h, and what follows it has the law r. Nothing is
asked of d but that it is the law of the next child given the elder ones: without replacement, p without these.
"""

import jax
import jax.numpy as jnp
from flax import struct

from cascade_jax.tree import Topology


@struct.dataclass
class Ends:
    """Where the output may end, whatever the random numbers. N nodes, M of them inner.

    Attributes:
      chance: [N], the probability that it ends at a node once all of its children have failed.
      leftover: [M, V], what the bonus token is then drawn from, at an inner node.
    """

    chance: jax.Array
    leftover: jax.Array


def examine(topology: Topology, inner, tokens: jax.Array, draft_probs: jax.Array | None, probs: jax.Array) -> Ends:
    """Goes down the tree, node by node and child by child.

    Args:
      inner: int [M], ids of the inner nodes, parents first.
      tokens: int [N]; negative at nodes that do not exist.
      draft_probs: [M, V], from which the inner nodes' children were drawn without replacement; None for point masses.
      probs: [M, V], the target's distributions there.
    """
    size, vocab = tokens.shape[0], probs.shape[-1]
    children = jnp.asarray(topology.children)

    def node(chance, given):
        own, law, draft = given

        def child(state, id):
            h, r, d = state
            token = jnp.where(id >= 0, tokens[id], -1)
            one_hot = jnp.arange(vocab) == token
            p = one_hot.astype(r.dtype) if draft is None else d
            drafted = jnp.sum(jnp.where(one_hot, p, 0.0))
            due = h * r
            won = jnp.where(drafted > 0, jnp.minimum(1.0, jnp.sum(jnp.where(one_hot, due, 0.0)) / drafted), 0.0)
            left = jnp.maximum(due - p, 0.0)
            rest = jnp.sum(left)
            # by rounding alone nothing is left of what is due for certain
            some = (drafted > 0) & ((rest > 0) | (h < 1))
            h_after = jnp.where(some, rest / jnp.where(some, rest + 1.0 - h, 1.0), h)
            r_after = jnp.where(some & (rest > 0), left / jnp.where(rest > 0, rest, 1.0), r)
            if draft is not None:
                kept = jnp.where(one_hot, 0.0, d)
                mass = jnp.sum(kept)
                d = jnp.where((drafted > 0) & (mass > 0), kept / jnp.where(mass > 0, mass, 1.0), d)
            return (h_after, r_after, d), won

        ids = children[own]
        (h, r, _), won = jax.lax.scan(child, (chance[own], law, law if draft is None else draft), ids)
        chance = chance.at[jnp.where(ids >= 0, ids, size)].set(won, mode="drop")
        return chance.at[own].set(h), r

    start = jnp.zeros(size).at[0].set(1.0)
    chance, leftover = jax.lax.scan(node, start, (jnp.asarray(inner), probs, draft_probs))
    return Ends(chance, leftover)


def ascend(key: jax.Array, topology: Topology, ends: Ends) -> tuple[jax.Array, jax.Array]:
    """Where the output does end: the first node, leaves before their parents and elder siblings first, that says so.

    Returns:
      path int [depth + 1], and the last node on it.
    """
    ancestors, children = jnp.asarray(topology.ancestors), jnp.asarray(topology.children)
    says = jax.random.uniform(key, ends.chance.shape) < ends.chance
    says = says.at[0].set(True)
    within = jnp.any(ancestors & says[:, None], axis=0)  # itself or below it

    def level(node, _):
        ids = children[node]
        holds = (ids >= 0) & within[ids]
        chosen = jnp.where(jnp.any(holds), ids[jnp.argmax(holds)], -1)
        chosen = jnp.where(node >= 0, chosen, -1)
        return jnp.where(chosen >= 0, chosen, -1), chosen

    _, below = jax.lax.scan(level, jnp.int32(0), length=topology.depth)
    path = jnp.concatenate([jnp.zeros(1, jnp.int32), below.astype(jnp.int32)])
    return path, jnp.max(path)
