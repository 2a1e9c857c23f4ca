"""Which parts of a bundle the sources are, how large these are, and how their parameters are made."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cascade_jax import bundle
from checkpoints_convert import folders
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.formats import Family, Format, Known
from checkpoints_convert.sources import Source, open_source
from checkpoints_convert.table import Step, plan, present
from checkpoints_convert.tensors import ConvertError, listed

_ORDER = ("vq", "target", "drafter", "text", "metric")
Found = dict[str, tuple[Format, Source]]  # by part


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the bundle to be: where it comes from, and how its parameters are made."""

    format: Format
    source: Source
    config: Any
    steps: Mapping[str, Step]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())

    def __str__(self) -> str:
        layers = getattr(self.config, "layers", None)
        size = f"{layers} layer{'s' if layers != 1 else ''}, " if layers is not None else ""
        return f"{self.format.part}: {self.format.name}, {size}{self.parameters:,} parameters, {self.source.path}"


def recognise(family: Family, source: Source) -> list[Format]:
    """The formats of a family that a source has: of every part the first that fits."""
    found: dict[str, Format] = {}
    for layout in family.formats:
        names = [*source.tensors, *layout.left_out(source)]
        denied = any(present(pattern, names) for pattern in layout.absent)
        if not denied and all(present(pattern, names) for pattern in layout.signature):
            found.setdefault(layout.part, layout)
    return list(found.values())


def fitted(family: Family, source: Source) -> tuple[Source, list[Format]]:
    """`recognise`, and the source without what stands before all its names and keeps it from being recognised:
    `model.`, `ea_layer.` and whatever else a training script calls the module that it holds."""
    plain: Source | None = source
    while plain is not None:
        if layouts := recognise(family, plain):
            return plain, layouts
        plain = plain.unwrapped()
    return source, []


def family_of(name: str, opened: Sequence[Source]) -> Family:
    """The family of a name; of an architecture's name or "auto", the one that the files, or else their names, tell."""
    if name in FAMILIES:
        return FAMILIES[name]
    fitting = [family for family in FAMILIES.values() if name == "auto" or family.is_a(name)]
    if not fitting:
        raise ConvertError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}, auto")
    fitting = [family for family in fitting if all(_all_fitted(family, source) for source in opened)]
    mains = {family.name: [source for source in opened if _is_main(family, source)] for family in fitting}
    fitting = [family for family in fitting if mains[family.name]]
    if len(fitting) > 1:  # fine-tunes of one architecture
        called = {name for source in mains[fitting[0].name] for name in _named(source, [f.name for f in fitting])}
        fitting = [family for family in fitting if called == {family.name}]
    if len(fitting) != 1:
        raise ConvertError(f"the files do not tell the family: name one of {', '.join(FAMILIES)}")
    return fitting[0]


def _all_fitted(family: Family, source: Source) -> bool:
    return bool(fitted(family, source)[1]) or bool(source.pieces and all(fitted(family, p)[1] for p in source.pieces))


def _is_main(family: Family, source: Source) -> bool:
    layouts = [layout for one in (source, *source.pieces) for layout in fitted(family, one)[1]]
    return any(layout.part in ("target", "metric") for layout in layouts)


def _named(source: Source, known: Sequence[str]) -> list[str]:
    """The names that the nearest of a source's folders with such a name has in its own."""
    for name in folders.names(source.path):
        if found := [one for one in known if one in name.lower()]:
            return [one for one in found if not any(one in other for other in found if other != one)]
    return []


def parts(family: Family, opened: Sequence[Source], pixels: int | None, say: Callable[[str], None]) -> dict[str, Part]:
    """The bundle's parts, planned in the order in which one needs the other."""
    found = _formats(family, opened)
    for part in family.required:
        if part not in found:
            found |= _found_beside(family, part, [source for _, source in found.values()])
    for part in family.required:
        if part not in found:
            known = " or ".join(layout.name for layout in family.formats if layout.part == part)
            raise ConvertError(f"{family.name} needs its {part} too ({known}): name that file as well")
    if pixels is not None and "target" not in found:
        raise ConvertError(f"{family.name} draws no pictures, so it has no use for pixels")
    for note in dict.fromkeys(note for _, source in found.values() for note in source.notes):
        say(note)
    done: dict[str, Part] = {}
    for name in _ORDER:
        if name in found:
            paths = {n: p.source.path for n, p in done.items()}
            known = Known({n: p.config for n, p in done.items()}, pixels, say, paths)
            done[name] = planned(*found[name], known)
    return done


def _formats(family: Family, opened: Sequence[Source]) -> Found:
    found: Found = {}
    for source in opened:
        for plain, layouts in _checkpoints(family, source):
            for layout in layouts:
                if layout.part in found:
                    both = f"{found[layout.part][1].path} and {plain.path} are both a {layout.part}"
                    raise ConvertError(f"{both}: name the one that you want")
                found[layout.part] = layout, plain
    return found


def _checkpoints(family: Family, source: Source) -> Iterator[tuple[Source, list[Format]]]:
    """A source with its formats, or its files with theirs if each of them is a checkpoint of its own."""
    pieces = [fitted(family, piece) for piece in source.pieces]
    if pieces and all(layouts for _, layouts in pieces):
        yield from pieces
        return
    if source.twice is not None:
        files = listed(file.name for file in source.files)
        raise ConvertError(f"{source.path} holds several checkpoints ({files}): name the files that you want")
    plain, layouts = fitted(family, source)
    if not layouts:
        raise ConvertError(f"{source.path} is no part of {family.name}: {_looks(source)}")
    yield plain, layouts


def _looks(source: Source) -> str:
    """What a source may be that is no part of a family."""
    if others := [f"{own[0].name} ({f.name})" for f in FAMILIES.values() if (own := fitted(f, source)[1])]:
        return f"it looks like {others[0]}"
    if any(".lora_" in name for name in source.tensors):
        return "it is an adapter (LoRA): merge it into its model first, and convert that"
    return f"its tensors are {', '.join(list(source.tensors)[:3])} ..."


def _found_beside(family: Family, part: str, sources: Sequence[Source]) -> Found:
    """A part that was not named, if the folder of another holds it."""
    found: dict[str, Found] = {}
    for path in {path: None for source in sources if source.place for path in folders.beside(source.place)}:
        try:
            other = open_source(path, [source.folder for source in sources])
        except ConvertError:  # it was not asked for
            continue
        plain, layouts = fitted(family, other)
        found |= {str(path): {part: (layout, plain)} for layout in layouts if layout.part == part}
    if len(found) > 1:
        raise ConvertError(f"{listed(found)} are each a {part}: name the one that you want")
    return next(iter(found.values()), {})


def planned(layout: Format, source: Source, known: Known) -> Part:
    """Works out a part's configuration and how its parameters are made.

    Raises:
      ConvertError: if the source does not fit.
    """
    if added := layout.left_out(source):
        source = dataclasses.replace(source, tensors={**source.tensors, **added})
    try:
        config = layout.configure(source, known)
        shapes = bundle.shapes(layout.part, config)
    except ConvertError:
        raise
    except (ArithmeticError, LookupError, TypeError, AttributeError, ValueError) as error:
        what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ConvertError(f"{source.path} is no proper {layout.name}: {what}") from error
    part = Part(layout, source, config, plan(layout.rules(config), shapes, source, layout.skip), shapes)
    for name in added:
        known.say(_stands_in(layout, source, name))
    return part


def _stands_in(layout: Format, source: Source, name: str) -> str:
    own = next(own for own in layout.stand_ins if own.name == name)
    instead = "zeros are taken" if own.make else f"{next(n for n in own.by if n in source.tensors)} is taken for it"
    return f"note: {source.path} has no {name}; {instead}"
