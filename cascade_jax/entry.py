"""What the registry of methods knows of a method: a rule, a tree, perhaps a drafter, and the settings it takes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from cascade_jax.acceptance import Rule
from cascade_jax.bundle import Bundle, Config
from cascade_jax.tree import DynamicTree, Tree

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
