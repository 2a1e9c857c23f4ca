"""What a bundle is: its config.json, read and written."""

import dataclasses
import json
import os
import pathlib
import types
import typing
from typing import Any

from cascade_jax.models import families
from cascade_jax.sampling import Sampling

FORMAT = 1
_WRITTEN = {"written": True}  # in config.json, even where it is nothing
CONFIG = "config.json"


class BundleError(ValueError):
    """A model directory that cannot be used; the message is one line and says what would help."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A bundle's config.json.

    Attributes:
      family: which architecture the target has, one of the targets of `models.families`.
      target: its sizes.
      drafter: the drafter's sizes; None without one.
      vq: the picture tokenizer's sizes; None for a model that draws tokens alone.
      text: how prompts are read, see `text.readers`: "scenes", "t5", "class" (a class's number), "tokens" (the target
        reads text itself); None where they come encoded.
      sampling: default sampling settings.
      cascade: default thresholds of the cascade rule.
      origin: where the weights came from: source files, digests, recipe.
      encoder: the text encoder's sizes; None where there is none, or it is a table.

    The sizes are those of `models.families`.
    """

    family: str
    target: Any
    drafter: Any | None = dataclasses.field(default=None, metadata=_WRITTEN)
    vq: Any | None = dataclasses.field(default=None, metadata=_WRITTEN)
    text: str | None = None
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    cascade: dict[str, Any] = dataclasses.field(default_factory=dict)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    encoder: Any | None = None

    @property
    def of_scenes(self) -> bool:
        """Whether its prompts are captions of scenes, which can be made up, and held against pictures by a judge."""
        return self.text == "scenes"


@dataclasses.dataclass(frozen=True)
class MetricConfig:
    """The config.json of a network that measures pictures.

    Attributes:
      metric: its sizes, of `models.families`.
      origin: as of `Config`.
    """

    metric: Any
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Which network it is."""
        return families.kind_of("metric", self.metric)


def read_config(directory: str | os.PathLike) -> Config:
    """The config.json of a model that draws.

    Raises:
      BundleError: if it is missing, makes no sense, or is that of a network that measures.
    """
    config = read_any_config(directory)
    if isinstance(config, MetricConfig):
        raise BundleError(
            f"{directory} is a network that measures pictures ({config.kind}), not a model that draws them"
        )
    return config


def read_any_config(directory: str | os.PathLike) -> Config | MetricConfig:
    """A bundle's config.json, whatever the bundle is for.

    Raises:
      BundleError: if it is missing or makes no sense.
    """
    path = pathlib.Path(directory) / CONFIG
    if not path.is_file():
        raise BundleError(f"{directory} is not a model: it has no config.json")
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or not even UTF-8
        raise BundleError(f"{path} is damaged: {error}") from error
    if not isinstance(raw, dict) or "format" not in raw:
        raise BundleError(f"{path} is damaged: it names no format")
    if raw.pop("format") != FORMAT:
        raise BundleError(f"{path} has another format than this version reads ({FORMAT}): convert the model again")
    try:
        return from_json(raw)
    except BundleError as error:
        raise BundleError(f"{path} is damaged, or of a newer version: {error}") from error


def to_json(config: Config | MetricConfig) -> dict[str, Any]:
    """A configuration as config.json has it."""
    raw = dataclasses.asdict(config)
    for part, field in families.FIELDS.items():
        if raw.get(field) is not None:
            raw[field] = {"kind": families.kind_of(part, getattr(config, field)), **raw[field]}
    return raw


def from_json(raw: dict[str, Any]) -> Config | MetricConfig:
    """The inverse of `to_json`.

    Raises:
      BundleError: if it makes no sense; the message says where.
    """
    raw, cls = dict(raw), MetricConfig if "metric" in raw else Config
    if cls is Config and raw.get("family") not in families.KINDS["target"]:
        raise BundleError(f"unknown model family {raw.get('family')!r}; {families.known('target')}")
    for part, field in families.FIELDS.items():
        if raw.get(field) is None:
            continue
        if not isinstance(raw[field], dict):
            raise BundleError(f"{field} is {raw[field]!r}, and a dictionary of sizes is needed")
        own = dict(raw[field])
        kind = own.pop("kind", raw.get("family") if part == "target" else next(iter(families.KINDS[part])))
        if kind not in families.KINDS[part]:
            raise BundleError(f"unknown {field} {kind!r}; {families.known(part)}")
        raw[field] = built(families.KINDS[part][kind].config, own, field)
    config = built(cls, raw)
    if cls is Config:
        if config.target is None:
            raise BundleError("it lacks target")
        drawn, there = config.target.codebook_size, getattr(config.vq, "codebook_size", None)
        if there is not None and there < drawn:
            raise BundleError(f"the target draws {drawn} codes and its picture tokenizer has {there}")
        try:
            default_sampling(config).checked()
        except (TypeError, ValueError) as error:
            raise BundleError(f"sampling: {error}") from error
    return config


def built(cls: type, raw: dict[str, Any], where: str = "") -> Any:
    """A configuration of a class from JSON: lists are tuples, and dictionaries configurations where it says so.

    Raises:
      BundleError: for fields that are missing, unknown, or not of the type that the class declares.
    """
    hints, values = typing.get_type_hints(cls), {}
    for name, x in raw.items():
        place = f"{where}.{name}" if where else name
        if name not in hints:
            raise BundleError(f"{place} is unknown here")
        values[name] = _value(hints[name], x, place)
    missing = [field.name for field in dataclasses.fields(cls) if field.name not in raw and _required(field)]
    if missing:
        raise BundleError(f"{where or 'it'} lacks {', '.join(missing)}")
    try:
        return cls(**values)
    except (ValueError, ArithmeticError) as error:  # what the class checks itself
        raise BundleError(f"{where}: {error}") from error


def _required(field: dataclasses.Field) -> bool:
    optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    return not optional or "written" in field.metadata


def _value(hint: Any, x: Any, place: str) -> Any:
    """What JSON holds, as a value of the type `hint`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(x, dict):
        own = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if own is not None:
            return built(own, x, place)
    x = _tuples(x) if isinstance(x, list) else x
    if not any(_fits(option, x) for option in options):
        raise BundleError(f"{place} is {x!r}, and {_said(hint)} is needed")
    return x


def _tuples(x: Any) -> Any:
    return tuple(_tuples(y) for y in x) if isinstance(x, list) else x


def _fits(hint: Any, x: Any) -> bool:
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is tuple and inner:
        if not isinstance(x, tuple):
            return False
        each = inner[:1] * len(x) if inner[-1] is Ellipsis else inner
        return len(x) == len(each) and all(_fits(own, y) for own, y in zip(each, x))
    if origin in (int, float):
        return isinstance(x, (int, origin)) and not isinstance(x, bool)
    return origin is Any or (x is None if origin is type(None) else isinstance(x, origin))


def _said(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def default_sampling(config: Config) -> Sampling:
    """The bundle's own sampling settings."""
    return Sampling(**config.sampling)
