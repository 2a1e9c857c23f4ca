"""What a family's table says beside its rules: which part of a bundle a file is, and how large."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cascade_jax import bundle
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError, Tensor


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known while a source's sizes are worked out.

    Attributes:
      parts: configurations of the parts that were worked out before (in the order vq, target, drafter, text).
      pixels: the picture's side, if it was given; file formats that lack it need it.
      say: called with what the person who converts should know.
      paths: where these parts lie, as far as they were named.
    """

    parts: Mapping[str, Any]
    pixels: int | None = None
    say: Callable[[str], None] = lambda _: None
    paths: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A tensor that files may leave out, because another one tells it.

    Attributes:
      name: the tensor's.
      by: names of others, of which the first that is there tells it.
      unless: a setting of config.json and its value that say that the tensor is missing after all.
      make: from the other tensor; None for the same numbers.
    """

    name: str
    by: tuple[str, ...]
    unless: tuple[str, Any] | None = None
    make: Callable[[Tensor], Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """One published layout of one part.

    Attributes:
      name: for people.
      part: "target", "vq", "drafter" or "text"; "metric" for a network that measures pictures.
      signature: name patterns that all occur in such a checkpoint and tell it from others.
      configure: the part's configuration from shapes and settings.
      rules: the table, for a configuration.
      skip: patterns of tensors that the module has no use for, and why nobody misses them is said beside them.
      tokenizer: whether the bundle keeps the text tokenizer that belongs to such a checkpoint.
      stand_ins: tensors that files may leave out.
      absent: name patterns that do not occur in such a checkpoint, only in others that have the signature too.
    """

    name: str
    part: str
    signature: tuple[str, ...]
    configure: Callable[[Source, Known], Any]
    rules: Callable[[Any], Sequence[Rule]]
    skip: tuple[str, ...] = ()
    tokenizer: bool = False
    stand_ins: tuple[StandIn, ...] = ()
    absent: tuple[str, ...] = ()

    def left_out(self, source: Source) -> dict[str, Tensor]:
        """The tensors that a source leaves out and others tell."""
        found = {}
        for own in self.stand_ins:
            other = next((source.tensors[name] for name in own.by if name in source.tensors), None)
            denied = own.unless and source.settings.get(own.unless[0]) == own.unless[1]
            if own.name not in source.tensors and other is not None and not denied:
                found[own.name] = own.make(other) if own.make else other
        return found


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture with everything that is published for it.

    Attributes:
      name: as on the command line.
      formats: layouts of its parts; the first that matches a source wins.
      required: parts without which there is no bundle.
      assemble: the bundle's configuration (without origin) from the parts' configurations.
      architecture: the bundle's family; None for `name`. Fine-tunes that draw in different ways share one.
    """

    name: str
    formats: tuple[Format, ...]
    required: tuple[str, ...]
    assemble: Callable[[Mapping[str, Any]], bundle.Config | bundle.MetricConfig]
    architecture: str | None = None

    def is_a(self, name: str) -> bool:
        """Whether the family or its architecture is called that."""
        return name in (self.name, self.architecture)


def of_tokens(name: str, side: int | None = None) -> Callable[[Mapping[str, Any]], bundle.Config]:
    """`Family.assemble` of models whose prompts are token ids: a target and the picture tokenizer whose codes it draws.

    Args:
      name: the bundle's family.
      side: pixels a side of the square that a code stands for, where the way that the model draws takes it for granted.
    """

    def assemble(parts: Mapping[str, Any]) -> bundle.Config:
        target, vq = parts["target"], parts["vq"]
        if target.codebook_size != vq.codebook_size:
            raise ConvertError(f"the model draws {target.codebook_size} codes and its tokenizer has {vq.codebook_size}")
        if side not in (None, vq.downsampling):
            raise ConvertError(f"a code of the tokenizer is {vq.downsampling} pixels wide, and one of the model {side}")
        return bundle.Config(
            family=name,
            target=target,
            drafter=parts.get("drafter"),
            vq=vq,
            text="tokens",
            sampling=target.sampling,
            cascade=target.cascade,
        )

    return assemble
