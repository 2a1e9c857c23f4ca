"""THE registry of methods, and pictures drawn by them in batches.

    cascade = method("cascade", bundle, budget=0.25)
    for numbers, drawn in draw_all(bundle, cascade, prompts, seed=0):
        ...

A method is a rule and a tree; the drafter comes with the model unless the method brings its own. Each has the defaults
of the paper's comparison, which fit a codebook of 16,384 entries; what counts codes scales with the codebook. A new
method is one entry of `METHODS`: flags, help, and what `compare` and `eval` draw by are made of it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from cascade_jax import acceptance, pipeline, platforms, rules
from cascade_jax import tree as trees
from cascade_jax.acceptance import Rule
from cascade_jax.bundle import Bundle, Config, Prompt, default_sampling
from cascade_jax.sampling import Sampling
from cascade_jax.tree import DynamicTree, Tree

AR, EAGLE, LANTERN, LANTERN_PP, GSD, CASCADE = "ar", "eagle", "lantern", "lantern++", "gsd", "cascade"
TREES = {"eagle25": trees.EAGLE_25, "lanternpp57": trees.LANTERNPP_57, "eagle2": trees.EAGLE_2}
DEFAULT = "default"  # of trees: the method's own
BATCH = 16
_MOST_DRAFTS = 512

Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value that methods take; two methods may share one, with defaults of their own.

    Attributes:
      name: as a keyword and, with dashes, as a flag.
      kind: its type.
      about: what it is, for the flag's help.
      default: of a model's configuration.
      choices: what it may be; empty for any value of its type.
    """

    name: str
    kind: type
    about: str
    default: Callable[[Config], Any]
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the registry knows of a method.

    Attributes:
      name: its name.
      about: what it is, in a line.
      rule: of a model and the values of the settings: which drafts are accepted.
      settings: what it takes.
      of_model: the settings that a model's configuration holds for it; its tree may be among them.
      tree: which drafts it proposes, or a function of the settings; None for what fits the platform.
      bound: why its tree cannot be another; empty if it can.
      drafter: of a model and the values of the settings: a drafter without parameters in place of the model's own; None
        for the latter.
      compared: whether `compare` and `eval` draw by it unless told which methods.
    """

    name: str
    about: str
    rule: Callable[[Bundle, Settings], Rule]
    settings: tuple[Setting, ...] = ()
    of_model: Callable[[Config], Settings] = lambda config: {}
    tree: Tree | DynamicTree | Callable[[Settings], Tree | DynamicTree] | None = None
    bound: str = ""
    drafter: Callable[[Bundle, Settings], Any] | None = None
    compared: bool = True

    def __post_init__(self):
        for taken in ("method", "name", "tree", "drafter"):
            if taken in (setting.name for setting in self.settings):
                raise ValueError(f"{self.name}: a setting cannot be called {taken}")

    def defaults(self, config: Config) -> Settings:
        """The values of its settings for a model, the tree among them if the model names one.

        Raises:
          ValueError: if the model's config.json sets what it does not take.
        """
        usual = {setting.name: setting.default(config) for setting in self.settings}
        own = self.of_model(config)
        if unknown := own.keys() - usual.keys() - {"tree"}:
            raise ValueError(f"the model's config.json has unknown {self.name} settings: {', '.join(sorted(unknown))}")
        return usual | own


def _lantern_rule(bundle: Bundle, settings: Settings) -> Rule:
    return rules.lantern(_neighbours(bundle, settings), settings["delta"], settings["residual"])


def _lantern_pp_rule(bundle: Bundle, settings: Settings) -> Rule:
    return rules.lantern_pp(_neighbours(bundle, settings), settings["lam"], settings["residual"])


def _neighbours(bundle: Bundle, settings: Settings) -> np.ndarray:
    """The lanterns' table; LANTERN's own residual takes one column more."""
    return _nearest(bundle, settings["neighbours"] + (settings["residual"] == "lantern"))


def _grouped_rule(bundle: Bundle, settings: Settings) -> Rule:
    if settings["group"] > (codes := bundle.config.vq.codebook_size):
        raise ValueError(f"group must be at most {codes}, the number of codes, not {settings['group']}")
    return rules.grouped(settings["group"])


def _many(config: Config) -> int:
    """LANTERN's neighbourhood: 1,000 of 16,384 codes; at most a twentieth of the codebook."""
    return min(1000, config.vq.codebook_size // 20)


_STRICT = lambda bundle, settings: acceptance.strict()
_NEIGHBOURS = Setting("neighbours", int, "number of neighbours", _many)
_RESIDUAL = Setting(
    "residual", str, "what a rejection leaves of the target's law: as strict verification or LANTERN's public code",
    lambda config: "strict", choices=("strict", "lantern"),
)  # fmt: skip
_CASCADE_SETTINGS = (
    Setting(
        "tau_pos", float, "least cosine of interchangeable siblings; above 1 switches this relaxation off",
        lambda config: 0.85,
    ),
    Setting(
        "tau_seq", float, "least cosine of a token and its converging children; above 1 switches this relaxation off",
        lambda config: 0.5,
    ),
    Setting("budget", float, "the most that a step may charge to its ledger", lambda config: 0.5),
    Setting(
        "ledger", str, "charge added mass, as the paper does, or the probability of parting from the strict decoder",
        lambda config: "nominal", choices=("nominal", "coupled"),
    ),
    Setting(
        "mass", str, "where the mass of converging children is read",
        lambda config: "current", choices=("current", "next"),
    ),
)  # fmt: skip

METHODS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(AR, "token by token", _STRICT, tree=trees.ROOT, bound="draws token by token and takes no tree"),
        Entry(EAGLE, 'strict speculative decoding, the paper\'s "naive"', _STRICT),
        Entry(
            LANTERN, "accepts by the mass of a token's neighbourhood (arXiv 2410.03355)", _lantern_rule,
            (
                _NEIGHBOURS, Setting("delta", float, "bound on the mass of a token's neighbours", lambda config: 0.2),
                _RESIDUAL,
            ),
            tree=trees.EAGLE_2,
        ),
        Entry(
            LANTERN_PP, "bounds that mass by the token's own (arXiv 2502.06352)", _lantern_pp_rule,
            (
                dataclasses.replace(_NEIGHBOURS, default=lambda config: min(10, config.vq.codebook_size - 1)),
                Setting(
                    "lam", float, "bound on the mass of a token and its neighbours, in terms of the token's own",
                    lambda config: 2.0,
                ),
                _RESIDUAL,
            ),
            tree=trees.LANTERNPP_57,
        ),
        Entry(
            GSD, "accepts by the mass of a token's group (arXiv 2508.07747)", _grouped_rule,
            (Setting("group", int, "codes in a group", lambda config: min(25, config.vq.codebook_size)),),
        ),
        Entry(
            CASCADE, "relaxes where the target's features agree (arXiv 2605.07230)",
            lambda bundle, settings: rules.cascade(**settings), _CASCADE_SETTINGS,
            of_model=lambda config: config.cascade,
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Method:
    """What tells one method from another.

    Attributes:
      name: one of METHODS.
      rule: which drafts are accepted.
      tree: which drafts are proposed.
      settings: the values of the settings that it takes.
      tuned: whether the tree is one that was found for this machine, see `tuned`.
      drafter: what proposes them in place of the model's own drafter; None for the latter.
    """

    name: str
    rule: Rule
    tree: Tree | DynamicTree
    settings: Settings = dataclasses.field(default_factory=dict)
    tuned: bool = False
    drafter: nnx.Module | None = None

    def on(self, bundle: Bundle) -> Bundle:
        """The model as it draws by this method."""
        return bundle.drafting(self.drafter)


def method(name: str, bundle: Bundle, *, tree: str | Tree | DynamicTree | None = None, **settings: Any) -> Method:
    """A method for a model.

    Args:
      name: one of METHODS. "ar" decodes token by token, "eagle" is strict speculative decoding (the paper's "naive").
      tree: overrides the one found for this kind of device, and the method's own; see `parse_tree` for names. "default"
        is the method's own, whatever was found.
      settings: of those that the method takes (see `settings_of`); what is left out, or None, has its default, in
        which the model may have a say.

    Raises:
      ValueError: if the name or the tree is unknown, a value is out of range, or the method does not take it.
    """
    check_name(name)
    entry, given = METHODS[name], {setting: value for setting, value in settings.items() if value is not None}
    for setting in given:
        if setting not in takes(name):
            raise ValueError(f"{name} does not take {setting} (it takes {', '.join(takes(name)) or 'none'})")
    if entry.bound and tree not in (None, DEFAULT):
        raise ValueError(f"{name} {entry.bound}: name another method")
    chosen = entry.defaults(bundle.config) | given
    own = chosen.pop("tree", None) or (entry.tree(chosen) if callable(entry.tree) else entry.tree)
    found = None
    if tree is None:
        found = tree = bundle.trees.get(jax.local_devices()[0].device_kind, {}).get(name, {}).get("tree")
    tree = own if tree in (None, DEFAULT) else tree
    tree = platforms.defaults().tree if tree is None else tree
    drafter = None if entry.drafter is None else entry.drafter(bundle, chosen)
    tree = parse_tree(tree) if isinstance(tree, str) else tree
    return Method(name, entry.rule(bundle, chosen), tree, chosen, found is not None, drafter)


def check_name(name: str) -> None:
    """Raises a ValueError that lists the known methods unless `name` is one of them."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")


def takes(name: str) -> tuple[str, ...]:
    """Names of the settings that a method takes."""
    return tuple(setting.name for setting in METHODS[name].settings)


def tunable(name: str) -> bool:
    """Whether a method drafts on a static tree that may be any."""
    return not METHODS[name].bound and not isinstance(METHODS[name].tree, DynamicTree)


def compared() -> tuple[str, ...]:
    """The methods that are compared unless others are named; token-by-token decoding comes first."""
    return tuple(name for name, entry in METHODS.items() if entry.compared)


def settings_of() -> dict[Setting, tuple[str, ...]]:
    """Every setting that methods take, once, and the methods that take it."""
    found: dict[str, tuple[Setting, list[str]]] = {}
    for name, entry in METHODS.items():
        for setting in entry.settings:
            found.setdefault(setting.name, (setting, []))[1].append(name)
    return {setting: tuple(takers) for setting, takers in found.values()}


def parse_tree(text: str) -> Tree | DynamicTree:
    """A tree by name (eagle25, lanternpp57, eagle2), by shape (chain:4, full:2x3), or as paths ("0 1 00 01").

    Raises:
      ValueError: if it is none of these, or larger than is of use.
    """
    if (text := text.strip()) in TREES:
        return TREES[text]
    if match := re.fullmatch(r"chain:(\d+)", text):
        _check_size(text, int(match[1]))
        return trees.chain(int(match[1]))
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
        before, total = start * bundle.length, count * bundle.length
        report = progress and (lambda done, _: progress(min(before + done, total), total))
        keys = pipeline.picture_keys(jax.random.key(seed), first + np.array(filled))
        chosen = [prompts[i] for i in filled]
        drawn = pipeline.generate(method.on(bundle), chosen, keys, method.rule, method.tree, sampling, report)
        yield indices, jax.tree.map(lambda x: x[: len(indices)], drawn)


def draw_numbers(
    bundle: Bundle,
    method: Method,
    prompts: Sequence[str | Prompt] | Mapping[int, str | Prompt],
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
    model, chosen = method.on(bundle), [prompts[number] for number in filled]
    drawn = pipeline.generate(model, chosen, keys, method.rule, method.tree, sampling)
    return jax.tree.map(lambda x: x[: len(numbers)], drawn)


def draw_one(
    bundle: Bundle, method: Method, prompt: str | Prompt, seed: int, number: int, sampling: Sampling | None = None
) -> pipeline.Generated:
    """Draws the picture of that number, as `draw_all` would, as a batch of one."""
    return draw_numbers(bundle, method, {number: prompt}, [number], seed, sampling)


@functools.lru_cache(maxsize=4)
def _table(codebook: bytes, width: int, count: int) -> np.ndarray:
    """Of a float32 codebook [V, width]: every code's nearest others, int32 [V, count]."""
    return rules.nearest_codes(np.frombuffer(codebook, np.float32).reshape(-1, width), count)


def _nearest(bundle: Bundle, count: int) -> np.ndarray:
    """Every code's nearest others, int32 [V, count], nearest first."""
    codes = bundle.config.vq.codebook_size
    if not 0 <= count < codes:
        raise ValueError(f"neighbours must be between 0 and {codes - 1} for {codes} codes, not {count}")
    table = bundle.neighbours
    if table is None or table.shape[1] < count:
        codebook = np.asarray(bundle.merged("vq").raw_codebook(), np.float32)
        # At least as many as LANTERN takes, so that methods share a table.
        table = _table(codebook.tobytes(), codebook.shape[1], max(count, _many(bundle.config)))
    return table[:, :count]


def _check_size(text: str, drafts: int) -> None:
    if drafts > _MOST_DRAFTS:
        raise ValueError(f"the tree {text[:40]!r} has more than {_MOST_DRAFTS} drafts")
