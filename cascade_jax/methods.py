"""The paper's methods by name, and pictures drawn by them in batches.

    cascade = method("cascade", bundle, budget=0.25)
    for numbers, drawn in draw_all(bundle, cascade, prompts, seed=0):
        ...

A method is a rule and a tree; the drafter comes with the model. Each has the defaults of the paper's comparison, which
fit a codebook of 16,384 entries; what counts codes scales with the codebook.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cascade_jax import acceptance, pipeline, platforms
from cascade_jax import tree as trees
from cascade_jax.acceptance import Rule
from cascade_jax.bundle import Bundle, Prompt, default_sampling
from cascade_jax.sampling import Sampling
from cascade_jax.tree import DynamicTree, Tree

METHODS = ("ar", "eagle", "lantern", "lantern++", "gsd", "cascade")
TREES = {"eagle25": trees.EAGLE_25, "lanternpp57": trees.LANTERNPP_57, "eagle2": trees.EAGLE_2}
BATCH = 16

_SETTINGS = {
    "ar": (),
    "eagle": (),
    "lantern": ("neighbours", "delta"),
    "lantern++": ("neighbours", "lam"),
    "gsd": ("group",),
    "cascade": ("tau_pos", "tau_seq", "budget", "ledger", "mass"),
}
_TREES = {"ar": trees.ROOT, "lantern": trees.EAGLE_2, "lantern++": trees.LANTERNPP_57}  # all others: the platform's
_MOST_DRAFTS = 512


@dataclasses.dataclass(frozen=True)
class Method:
    """What tells one method from another.

    Attributes:
      name: one of METHODS.
      rule: which drafts are accepted.
      tree: which drafts are proposed.
      settings: the values of the settings that its rule takes.
    """

    name: str
    rule: Rule
    tree: Tree | DynamicTree
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def method(
    name: str,
    bundle: Bundle,
    *,
    tree: str | Tree | DynamicTree | None = None,
    tau_pos: float | None = None,
    tau_seq: float | None = None,
    budget: float | None = None,
    ledger: str | None = None,
    mass: str | None = None,
    delta: float | None = None,
    lam: float | None = None,
    neighbours: int | None = None,
    group: int | None = None,
) -> Method:
    """A method for a model. None stands for the default.

    Args:
      name: one of METHODS. "ar" decodes token by token, "eagle" is strict speculative decoding (the paper's "naive").
      tree: overrides the one found for this kind of device, and the method's own; see `parse_tree` for names.
      tau_pos: of cascade, as `tau_seq`, `budget`, `ledger` and `mass`: see `acceptance.cascade`. Defaults are the
        model's own.
      delta: of lantern: bound on the mass of a token's neighbourhood; 0.2.
      lam: of lantern++: bound on that mass in terms of the token's own; 2.
      neighbours: of lantern and lantern++: size of the neighbourhood. LANTERN's is 1,000 of 16,384 codes; here
        1,000 but at most a twentieth of the codebook. LANTERN++'s is 10.
      group: of gsd: codes in a group; 25.

    Raises:
      ValueError: if the name or the tree is unknown, a value is out of range, or the method does not take it.
    """
    check_name(name)
    given = {
        "tau_pos": tau_pos, "tau_seq": tau_seq, "budget": budget, "ledger": ledger, "mass": mass,
        "delta": delta, "lam": lam, "neighbours": neighbours, "group": group,
    }  # fmt: skip
    given = {setting: value for setting, value in given.items() if value is not None}
    for setting in given:
        if setting not in _SETTINGS[name]:
            takes = ", ".join(_SETTINGS[name]) or "none"
            raise ValueError(f"{name} does not take {setting} (it takes {takes})")
    settings = _defaults(name, bundle) | given
    own_tree = settings.pop("tree", _TREES.get(name, platforms.defaults().tree))
    own_tree = bundle.trees.get(jax.local_devices()[0].device_kind, {}).get(name, {"tree": own_tree})["tree"]
    if name == "ar" and tree is not None:
        raise ValueError("ar draws token by token and takes no tree: name another method")
    tree = own_tree if tree is None else tree
    return Method(name, _rule(name, bundle, settings), parse_tree(tree) if isinstance(tree, str) else tree, settings)


def check_name(name: str) -> None:
    """Raises a ValueError that lists the known methods unless `name` is one of them."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")


def takes(name: str) -> tuple[str, ...]:
    """Names of the settings that a method takes."""
    return _SETTINGS[name]


def parse_tree(text: str) -> Tree | DynamicTree:
    """A tree by name (eagle25, lanternpp57, eagle2), by shape (chain:4, full:2x3), or as paths ("0 1 00 01").

    Raises:
      ValueError: if it is none of these, or larger than is of use.
    """
    text = text.strip()
    if text in TREES:
        return TREES[text]
    if match := re.fullmatch(r"chain:(\d+)", text):
        depth = int(match[1])
        _check_size(text, depth)
        return trees.chain(depth)
    if match := re.fullmatch(r"full:(\d+)x(\d+)", text):
        width, depth = int(match[1]), int(match[2])
        _check_size(text, depth if width < 2 else sum(width**d for d in range(1, min(depth, 10) + 1)))
        return trees.full(width, depth)
    if re.fullmatch(r"\d+(\s+\d+)*", text):
        _check_size(text, len(text.split()))
        return trees.parse(text)
    raise ValueError(
        f'unknown tree {text!r}; known: {", ".join(TREES)}, chain:DEPTH, full:WIDTHxDEPTH, or paths such as "0 1 00 01"'
    )


def tree_name(tree: Tree | DynamicTree) -> str:
    """The name that `parse_tree` knows a tree by, or its paths."""
    names = {known: name for name, known in TREES.items()} | {trees.ROOT: "root"}
    if tree in names:
        return names[tree]
    if isinstance(tree, DynamicTree):
        return str(tree)
    if tree.width == 1:
        return f"chain:{tree.depth}"
    return " ".join("".join(map(str, path)) for path in tree.paths[1:])


def draw_all(
    bundle: Bundle,
    method: Method,
    prompts: Sequence[str | Prompt],
    seed: int,
    sampling: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
    batch: int = BATCH,
    first: int = 0,
) -> Iterator[tuple[range, pipeline.Generated]]:
    """Draws a picture for every prompt, in batches of at most `batch`.

    Picture i depends on its prompt, the seed and `first` + i alone. All batches have the same size, so that one program
    serves them all; the last is filled up with pictures that are thrown away.

    Args:
      sampling: None for the model's own settings.
      progress: called now and then with (tokens drawn, tokens in all).
      first: number of the first picture.

    Yields:
      The indices of a batch's prompts, and its pictures.
    """
    sampling = (default_sampling(bundle.config) if sampling is None else sampling).checked()
    count = len(prompts)
    chunks = -(-count // batch)
    size = -(-count // chunks) if count else 0
    for start in range(0, count, size or 1):
        indices = range(start, min(start + size, count))
        filled = [*indices, *[indices[-1]] * (size - len(indices))]
        report = None
        if progress is not None:
            before, total = start * bundle.length, count * bundle.length
            report = lambda done, _: progress(min(before + done, total), total)
        keys = pipeline.picture_keys(jax.random.key(seed), first + np.array(filled))
        chosen = [prompts[i] for i in filled]
        drawn = pipeline.generate(bundle, chosen, keys, method.rule, method.tree, sampling, report)
        yield indices, jax.tree.map(lambda x: x[: len(indices)], drawn)


def draw_numbers(
    bundle: Bundle,
    method: Method,
    prompts: Sequence[str | Prompt],
    numbers: Sequence[int],
    seed: int,
    sampling: Sampling | None = None,
    size: int = 1,
) -> pipeline.Generated:
    """Draws the pictures of these numbers, as `draw_all` would, as one batch that is filled up to `size`.

    Args:
      prompts: of all pictures, by number.
    """
    filled = [*numbers, *[numbers[-1]] * (size - len(numbers))]
    keys = pipeline.picture_keys(jax.random.key(seed), np.array(filled))
    chosen = [prompts[number] for number in filled]
    drawn = pipeline.generate(bundle, chosen, keys, method.rule, method.tree, sampling)
    return jax.tree.map(lambda x: x[: len(numbers)], drawn)


def draw_one(
    bundle: Bundle, method: Method, prompt: str | Prompt, seed: int, number: int, sampling: Sampling | None = None
) -> pipeline.Generated:
    """Draws the picture of that number, as `draw_all` would, as a batch of one."""
    keys = pipeline.picture_keys(jax.random.key(seed), np.array([number]))
    return pipeline.generate(bundle, [prompt], keys, method.rule, method.tree, sampling)


def _defaults(name: str, bundle: Bundle) -> dict[str, Any]:
    codes = bundle.config.vq.codebook_size
    match name:
        case "lantern":
            return {"neighbours": min(1000, codes // 20), "delta": 0.2}
        case "lantern++":
            return {"neighbours": min(10, codes - 1), "lam": 2.0}
        case "gsd":
            return {"group": min(25, codes)}
        case "cascade":
            usual = {"tau_pos": 0.85, "tau_seq": 0.5, "budget": 0.5, "ledger": "nominal", "mass": "current"}
            if unknown := bundle.config.cascade.keys() - usual.keys() - {"tree"}:
                raise ValueError(f"the model's config.json has unknown cascade settings: {', '.join(sorted(unknown))}")
            return usual | bundle.config.cascade
    return {}


def _rule(name: str, bundle: Bundle, settings: dict[str, Any]) -> Rule:
    match name:
        case "lantern":
            return acceptance.lantern(_nearest(bundle, settings["neighbours"]), settings["delta"])
        case "lantern++":
            return acceptance.lantern_pp(_nearest(bundle, settings["neighbours"]), settings["lam"])
        case "gsd":
            if settings["group"] > (codes := bundle.config.vq.codebook_size):
                raise ValueError(f"group must be at most {codes}, the number of codes, not {settings['group']}")
            return acceptance.grouped(settings["group"])
        case "cascade":
            return acceptance.cascade(**settings)
    return acceptance.strict()


def _nearest(bundle: Bundle, count: int) -> np.ndarray:
    """Every code's nearest others, int32 [V, count]; the table is kept with the bundle."""
    codes = bundle.config.vq.codebook_size
    if not 0 <= count < codes:
        raise ValueError(f"neighbours must be between 0 and {codes - 1} for {codes} codes, not {count}")
    table = bundle.__dict__.get("_nearest", bundle.neighbours)
    if table is None or table.shape[1] < count:
        table = acceptance.nearest_codes(bundle.merged("vq").codebook(), count)
        bundle.__dict__["_nearest"] = table
    return table[:, :count]


def _check_size(text: str, drafts: int) -> None:
    if drafts > _MOST_DRAFTS:
        raise ValueError(f"the tree {text[:40]!r} has more than {_MOST_DRAFTS} drafts")
