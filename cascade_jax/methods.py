"""THE registry of methods, and pictures drawn by them in batches.

    cascade = method("cascade", bundle, budget=0.25)
    for numbers, drawn in draw_all(bundle, cascade, prompts, seed=0):
        ...

A method is a rule and a tree; the drafter comes with the model unless the method brings its own. Each has the defaults
of the paper's comparison, which fit a codebook of 16,384 entries; what counts codes scales with the codebook. A new
method is one entry of `METHODS`: flags, help, and what `compare` and `eval` draw by are made of it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from cascade_jax import acceptance, pipeline, platforms, rules
from cascade_jax import bundle as bundles
from cascade_jax import tree as trees
from cascade_jax.acceptance import Rule
from cascade_jax.bundle import Bundle, BundleError, Prompt, default_sampling
from cascade_jax.decode import Program
from cascade_jax.drafters import jacobi
from cascade_jax.entry import Entry, Setting, Settings
from cascade_jax.sampling import FRESH, GUMBEL, NOISES, Sampling
from cascade_jax.tree import DynamicTree, Tree
from cascade_jax.verify import VERIFIERS, WALK

AR, EAGLE, LANTERN, LANTERN_PP, GSD, CASCADE, SCD = "ar", "eagle", "lantern", "lantern++", "gsd", "cascade", "scd"
DEFAULT = "default"  # of trees: the method's own
BATCH = 16


def _lantern_rule(bundle: Bundle, settings: Settings) -> Rule:
    return rules.lantern(_neighbours(bundle, settings), settings["delta"], settings["residual"])


def _lantern_pp_rule(bundle: Bundle, settings: Settings) -> Rule:
    return rules.lantern_pp(_neighbours(bundle, settings), settings["lam"], settings["residual"])


def _neighbours(bundle: Bundle, settings: Settings) -> np.ndarray:
    """The lanterns' table; LANTERN's own residual takes one column more."""
    return bundle.nearest(settings["neighbours"] + (settings["residual"] == "lantern"))


def _grouped_rule(bundle: Bundle, settings: Settings) -> Rule:
    if settings["group"] > (codes := bundle.config.target.codebook_size):
        raise ValueError(f"group must be at most {codes}, the number of codes, not {settings['group']}")
    return rules.grouped(settings["group"])


def _cascade_rule(bundle: Bundle, settings: Settings) -> Rule:
    return rules.cascade(**{setting.name: settings[setting.name] for setting in _CASCADE_SETTINGS})


def _entropic_rule(bundle: Bundle, settings: Settings) -> Rule:
    return rules.entropic(*(settings[setting.name] for setting in _ENTROPY_SETTINGS))


def _jacobi(bundle: Bundle, settings: Settings, coupled: bool) -> jacobi.Jacobi:
    if not 1 <= settings["window"] <= bundle.length:
        raise ValueError(
            f"window must be between 1 and {bundle.length}, the tokens of a picture, not {settings['window']}"
        )
    tokens = jax.ShapeDtypeStruct((1, bundle.length), np.int32)
    rows = jax.eval_shape(bundle.config.target.codes, tokens).shape[1]
    return jacobi.Jacobi(settings["guess"], coupled, bundle.length // rows)


_STRICT = lambda bundle, settings: acceptance.strict()
_NEIGHBOURS = Setting("neighbours", int, "number of neighbours", bundles.usual_neighbours)
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

_ENTROPY_SETTINGS = (
    Setting("entropy_scale", float, "nats from which on a draft is not judged more leniently", lambda config: 8.0),
    Setting("entropy_calm", float, "nats from which on chance plays no part; inf for none", lambda config: 16.0),
    Setting("entropy_floor", float, "added to the nats over their scale; 1 judges strictly", lambda config: 0.0),
)
_ANNEALED_SETTINGS = (
    Setting("relaxation", float, "mean over the tree's levels of what the ratio is multiplied by", lambda config: 1.1),
    Setting("annealing", float, "how fast that falls with depth; 0 for not at all", lambda config: 0.7),
)
_GROUP = Setting("group", int, "codes in a group", lambda config: min(25, config.target.codebook_size))
_WINDOW = Setting(
    "window", int, "drafts of the target's own",
    lambda config: min(platforms.defaults().window, config.target.length),
)  # fmt: skip
_CANDIDATES = Setting("candidates", int, "candidates for the window's first position", lambda config: 4)
_WINDOW_OR_DRAFTER = dataclasses.replace(
    _WINDOW, about="drafts of the target's own; 0 for the model's drafter, of methods that take either",
    default=lambda of: 0 if of.drafter else _WINDOW.default(of),
)  # fmt: skip
_VERIFIER = Setting("verifier", str, "how drafts are judged; traversal accepts more", lambda config: WALK, VERIFIERS)
_GUESS = Setting(
    "guess", str, "what a window's end is filled with: draws, the token before it, or the one above",
    lambda config: "repeat", choices=jacobi.GUESSES,
)  # fmt: skip


def _by_itself(
    name, about, rule=_STRICT, coupled=False, more=(), window=_WINDOW, bound="drafts its window and takes no tree",
    of_model=lambda config: {}, compared=False,
) -> Entry:  # fmt: skip
    """A method that drafts a window of the target's own; if it is not `bound` to that, a window of 0 is none."""
    none = lambda settings: settings["window"] == 0 and not bound
    tree = lambda settings: None if none(settings) else trees.window(settings["window"], settings.get("candidates", 1))
    drafter = lambda bundle, settings: None if none(settings) else _jacobi(bundle, settings, coupled)
    settings = window, _GUESS, *more
    return Entry(name, about, rule, settings, of_model, tree, bound, drafter, compared)


METHODS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            AR, "token by token", _STRICT,
            (Setting("noise", str, "new in every step, or the place's, as exact's", lambda config: FRESH, NOISES),),
            tree=trees.ROOT, bound="draws token by token and takes no tree",
        ),
        Entry(EAGLE, 'strict speculative decoding, the paper\'s "naive"', _STRICT, (_VERIFIER,)),
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
                dataclasses.replace(_NEIGHBOURS, default=lambda config: min(10, config.target.codebook_size - 1)),
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
            (_GROUP,),
        ),
        _by_itself(
            CASCADE, "relaxes where the target's features agree (arXiv 2605.07230)", _cascade_rule, coupled=True,
            more=(_CANDIDATES, *_CASCADE_SETTINGS), window=_WINDOW_OR_DRAFTER, bound="",
            of_model=lambda config: config.cascade, compared=True,
        ),
        Entry(
            "cool-sd", "accepts more near the root and less further down (arXiv 2601.09212)",
            lambda bundle, settings: rules.annealed(**settings), _ANNEALED_SETTINGS, compared=False,
        ),
        _by_itself("sjd", "lossless by itself: speculative Jacobi decoding (arXiv 2410.01699)", more=(_VERIFIER,)),
        _by_itself(SCD, "the same with coupled redraws, whose drafts settle (arXiv 2510.24211)", coupled=True),
        _by_itself(
            "pac", "the same with several candidates for the first position (arXiv 2603.18599)", coupled=True,
            more=(_CANDIDATES,),
        ),
        _by_itself(
            "gsd-jacobi", "sjd that accepts by the mass of a token's group (2508.07747)", _grouped_rule, more=(_GROUP,)
        ),
        _by_itself(
            "entropy-aware", "sjd that is lenient where the target is sure (arXiv 2510.09012)", _entropic_rule,
            more=_ENTROPY_SETTINGS, bound="",
        ),
        _by_itself(
            "exact", "the very picture of ar with gumbel noise, in fewer steps (arXiv 2408.07978)",
            lambda bundle, settings: acceptance.exact(), coupled=True, window=_WINDOW_OR_DRAFTER, bound="",
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

    def program(self, bundle: Bundle) -> Program:
        """A model's decoding program for it. Raises as `Bundle.program`."""
        return self.on(bundle).program(self.tree, **self.drawn)

    @property
    def drawn(self) -> dict[str, str]:
        """{"noise", "verifier"}, see `decode.Program`."""
        noise = GUMBEL if isinstance(self.rule, acceptance.Exact) else self.settings.get("noise", FRESH)
        return {"noise": noise, "verifier": self.settings.get("verifier", WALK)}


def method(name: str, bundle: Bundle, *, tree: str | Tree | DynamicTree | None = None, **settings: Any) -> Method:
    """A method for a model.

    Args:
      name: one of METHODS. "ar" decodes token by token, "eagle" is strict speculative decoding (the paper's "naive").
      tree: overrides the one found for this kind of device, and the method's own; see `tree.named` for names. "default"
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
    if chosen.get("window") and tree not in (None, DEFAULT):
        raise ValueError(f"{name} drafts a window of {chosen['window']} and takes no tree besides")
    if chosen.get("window") == 0 and not entry.bound and (loose := given.keys() & {_GUESS.name, _CANDIDATES.name}):
        raise ValueError(f"{name} drafts by the model's drafter: {' and '.join(sorted(loose))} want a window")
    drafter = entry.drafter and entry.drafter(bundle, chosen)
    own = chosen.pop("tree", None) or (entry.tree(chosen) if callable(entry.tree) else entry.tree)
    found = None
    if tree is None and not chosen.get("window"):
        found = tree = bundle.trees.get(jax.local_devices()[0].device_kind, {}).get(name, {}).get("tree")
    tree = own if tree in (None, DEFAULT) else tree
    tree = bundle.usual_tree if tree is None else tree
    tree = trees.named(tree) if isinstance(tree, str) else tree
    return Method(name, entry.rule(bundle, chosen), tree, chosen, found is not None, drafter)


def usual(bundle: Bundle) -> str:
    """The method that a model draws by where none is named: the paper's, or without a drafter one that needs none."""
    return SCD if bundle.alone else CASCADE


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
        drawn = _draw(bundle, method, chosen, keys, sampling, report)
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
    chosen = [prompts[number] for number in filled]
    drawn = _draw(bundle, method, chosen, keys, sampling)
    return jax.tree.map(lambda x: x[: len(numbers)], drawn)


def draw_one(
    bundle: Bundle, method: Method, prompt: str | Prompt, seed: int, number: int, sampling: Sampling | None = None
) -> pipeline.Generated:
    """Draws the picture of that number, as `draw_all` would, as a batch of one."""
    return draw_numbers(bundle, method, {number: prompt}, [number], seed, sampling)


def _draw(bundle: Bundle, method: Method, prompts, keys, sampling, progress=None) -> pipeline.Generated:
    own = method.on(bundle)
    if own.config.vq is None:
        raise BundleError("this model has no picture tokenizer: draw its tokens, by cascade_jax.generate")
    return pipeline.generate(own, prompts, keys, method.rule, method.tree, sampling, progress, **method.drawn)
