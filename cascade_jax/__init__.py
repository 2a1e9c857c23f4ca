"""CASCADE: context-aware relaxation for speculative image decoding (arXiv 2605.07230), in JAX and Flax.

    import cascade_jax as cj

A name is imported when it is first asked for: the command line is there, and hears of interrupts, before JAX is.
"""

import importlib
import sys
import types

__version__ = "0.1.0"
_HOMES = {
    "Bundle": "bundle",
    "BundleError": "bundle",
    "DynamicTree": "tree",
    "Generated": "pipeline",
    "Prompt": "bundle",
    "Sampling": "sampling",
    "Target": "targets",
    "Tree": "tree",
    "Verdict": "verify",
    "annealed": "rules",
    "bounded": "acceptance",
    "cascade": "rules",
    "draft": "draft",  # the module itself
    "entropic": "rules",
    "exact": "acceptance",
    "generate": "pipeline",
    "grouped": "rules",
    "lantern": "rules",
    "lantern_pp": "rules",
    "load": "pipeline",
    "nearest_codes": "rules",
    "register": "models.families",
    "score": "pipeline",
    "strict": "acceptance",
    "trees": "tree",  # likewise
    "verify": "verify",
}
_MODULES = ("draft", "trees")
__all__ = sorted(_HOMES)


class _Package(types.ModuleType):
    """Keeps public names of functions from being taken by modules of the same name, as `verify`, when these load."""

    def __setattr__(self, name: str, value) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        vars(self)[name] = value = home if name in _MODULES else getattr(home, name)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
