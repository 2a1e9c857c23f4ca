"""Verification as algorithms are written on paper: loops, dictionaries, double precision, one tree at a time.

Nothing here is shared with the package. A rule is a function without arguments that opens a step's ledger and returns
the step's acceptance function: `Candidate` to (acceptance probability, added mass).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Candidate:
    """A draft under examination: its token, the residual r, the drafter's distribution p without earlier siblings, its
    siblings as (token, cosine), its own children as (token, cosine, probability after it), the target's distribution
    before any sibling was rejected, and its depth."""

    token: int
    r: np.ndarray
    p: np.ndarray
    siblings: list
    children: list
    q: np.ndarray
    depth: int

    @property
    def strict(self):
        return min(1.0, self.r[self.token] / self.p[self.token])


@dataclasses.dataclass
class Walk:
    """What a step did. `charges` are |accept - strict| of all candidates examined, `coupled` only sums them up to the
    one at which the strict decoder parts."""

    path: list
    leftover: np.ndarray
    nominal: float
    coupled: float
    diverged: bool
    charges: list


def verify(uniforms, children, tokens, drafts, target, features, rule) -> Walk:
    """Walks down a tree.

    Args:
      uniforms: [depth, W].
      children: int [N, W], -1 where there is none.
      tokens: int [N], negative where a node does not exist.
      drafts: [N, V], or None for point masses.
      target: [N, V], probabilities.
      features: [N, h].
    """
    accept = rule()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    walk = Walk([0], None, 0.0, 0.0, False, [])
    node = 0
    for level in range(len(uniforms)):
        r = target[node].copy()
        p = None if drafts is None else drafts[node].copy()
        below = [child for child in children[node] if child >= 0 and tokens[child] >= 0]
        chosen = None
        for rank, child in enumerate(children[node]):
            if child not in below:
                continue
            token = tokens[child]
            if drafts is None:
                p = np.eye(len(r))[token]
            if p[token] == 0:
                continue
            candidate = Candidate(
                token,
                r,
                p,
                [(tokens[b], unit[child] @ unit[b]) for b in below if b != child],
                [
                    (tokens[b], unit[child] @ unit[b], target[child][tokens[b]])
                    for b in children[child]
                    if b >= 0 and tokens[b] >= 0
                ],
                target[node],
                level + 1,
            )
            probability, added = accept(candidate)
            u = uniforms[level][rank]
            walk.nominal += added
            walk.charges.append(abs(probability - candidate.strict))
            if not walk.diverged:
                walk.coupled += walk.charges[-1]
            walk.diverged |= (u < probability) != (u < candidate.strict)
            if u < probability:
                chosen = child
                break
            r = _normalised(getattr(accept, "leaves", strictly_left)(candidate), r)
            if drafts is not None:
                p = p.copy()
                p[token] = 0.0
                p = _normalised(p, p)
        if chosen is None:
            walk.leftover = r
            return walk
        walk.path.append(chosen)
        node = chosen
    walk.leftover = target[node]
    return walk


def strictly_left(c):
    return np.maximum(c.r - c.p, 0.0)


def strict():
    return lambda c: (c.strict, 0.0)


def annealed(relaxation, annealing, levels):
    fall = [np.exp(-annealing * i) for i in range(1, levels + 1)]

    def begin():
        multiplier = lambda c: relaxation * fall[c.depth - 1] / np.mean(fall)

        def accept(c):
            added = max(multiplier(c) - 1, 0.0) * c.r[c.token]
            return min(1.0, multiplier(c) * c.r[c.token] / c.p[c.token]), added

        def leaves(c):
            accepted = [min(1.0, multiplier(c) * r / p) if p > 0 else 0.0 for r, p in zip(c.r, c.p)]
            return np.maximum(c.r - c.p * accepted, 0.0)

        accept.leaves = leaves
        return accept

    return begin


def entropic(scale, calm, floor):
    def accept(c):
        if c.r[c.token] == 0 or c.strict == 1:
            return c.strict, 0.0
        entropy = -sum(q * np.log(q) for q in c.q if q > 0)
        height, chance = min(1.0, entropy / scale + floor), max(0.0, 1 - entropy / calm)
        mean = height / 2
        if height * chance == 0:
            probability = float(mean <= c.strict)
        else:
            probability = min(1.0, max(0.0, 0.5 + (c.strict - mean) / (height * chance)))
        return probability, min(1.0, max(0.0, probability * c.p[c.token] - c.r[c.token]))

    return lambda: accept


def lantern(neighbours, delta):
    return lambda: lambda c: _with_neighbours(c, neighbours, delta)


def lantern_pp(neighbours, lam):
    return lambda: lambda c: _with_neighbours(c, neighbours, (lam - 1) * c.r[c.token])


def _with_neighbours(c, neighbours, bound):
    added = 0.0
    for token in neighbours[c.token]:
        if added + c.r[token] > bound:
            break
        added += c.r[token]
    return min(1.0, (c.r[c.token] + added) / c.p[c.token]), added


def grouped(size):
    def accept(c):
        order = sorted(range(len(c.r)), key=lambda token: (-c.r[token], token))
        rank = order.index(c.token)
        group = order[max(0, rank - (size - 1) // 2) : rank + size // 2 + 1]
        probability = min(1.0, sum(c.r[group]) / sum(c.p[group]))
        return probability, sum(c.r[group]) - c.r[c.token]

    return lambda: accept


def cascade(tau_pos, tau_seq, budget, mass="current"):
    def begin():
        ledger = 0.0

        def accept(c):
            nonlocal ledger
            added, counted = 0.0, {c.token}
            alike = {token for token, cosine in c.siblings if cosine >= tau_pos} - counted
            first = sum(c.r[token] for token in alike)
            if ledger + first <= budget:
                added, ledger, counted = added + first, ledger + first, counted | alike
            converging = [(token, after) for token, cosine, after in c.children if cosine >= tau_seq]
            if mass == "next":
                second = sum(after for _, after in converging)
            else:
                second = sum(c.r[token] for token in {token for token, _ in converging} - counted)
            if ledger + second <= budget:
                added, ledger = added + second, ledger + second
            return min(1.0, (c.r[c.token] + added) / c.p[c.token]), added

        return accept

    return begin


def bounded(rule, budget):
    def begin():
        wish, spent = rule(), 0.0

        def accept(c):
            nonlocal spent
            probability, added = wish(c)
            left = budget - spent
            granted = min(max(probability, c.strict - left), c.strict + left)
            spent += abs(granted - c.strict)
            return granted, min(added, max(granted * c.p[c.token] - c.r[c.token], 0.0))

        return accept

    return begin


def _normalised(mass, otherwise):
    return mass / mass.sum() if mass.sum() > 0 else otherwise
