"""The registry: which targets, drafters, picture tokenizers, text encoders and metric networks there are.

A kind is a configuration, a frozen dataclass of sizes that config.json holds, and the module that is made of it by
`module(config, rngs=rngs)`. What is asked of a target, by the engine and by everything around it, stands here as two
protocols; `register` adds a family of one's own to all that loads, draws, evaluates, trains, exports and plans.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

from cascade_jax.cache import Context, Segment
from cascade_jax.decode import Prefix
from cascade_jax.drafters.eagle import Eagle1, EagleConfig
from cascade_jax.drafters.eagle3 import Eagle3, Eagle3Config
from cascade_jax.drafters.hydra import Hydra, HydraConfig
from cascade_jax.drafters.parallel import Parallel, ParallelConfig
from cascade_jax.models.chameleon import Chameleon, ChameleonConfig
from cascade_jax.models.clip import CLIP, CLIPConfig
from cascade_jax.models.cosmos import Cosmos, CosmosConfig
from cascade_jax.models.emu3 import Emu3Config
from cascade_jax.models.fusion import EarlyFusion
from cascade_jax.models.inception import Inception, InceptionConfig
from cascade_jax.models.janus import Janus, JanusConfig
from cascade_jax.models.judge import Judge, JudgeConfig
from cascade_jax.models.liquid import LiquidConfig
from cascade_jax.models.llamagen import LlamaGen, LlamaGenConfig
from cascade_jax.models.lumina2 import Lumina2Config
from cascade_jax.models.movq import MoVQ, MoVQConfig
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.simplear import SimpleARConfig
from cascade_jax.models.t5 import T5Config, T5Encoder
from cascade_jax.models.transformer import BlockConfig
from cascade_jax.models.vq import VQConfig, VQModel
from cascade_jax.sampling import Layout


class TargetConfig(Protocol):
    """What a target's configuration says of it.

    One of a family that reads text itself also has `read(encode, text)`, a caption to a `Prompt`.

    Attributes:
      dim: width of the features.
      layers: decoder blocks.
      block: their sizes.
      rope_base: of the rotary embedding, for drafters made of the same block.
      codebook_size: codes that it draws.
      length: drawn tokens of a picture.
      layout: what may stand where among them; None: any code.
      condition_slots: slots in front of the first drawn token; of text, whose length varies, as many as are reckoned
        with where memory is planned.
      table_rows: of a table that a drafter embeds tokens by, among which `Target.table_row` chooses.
      picture_places: what a drafter is told of the rotary embedding: {"grid", "condition_slots"} of a picture of codes
        in rows and columns, see `EagleConfig`; nothing where tokens stand in one line.
    """

    dim: int
    layers: int
    rope_base: float

    @property
    def block(self) -> BlockConfig: ...

    @property
    def codebook_size(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def layout(self) -> Layout | None: ...

    @property
    def condition_slots(self) -> int: ...

    @property
    def table_rows(self) -> int: ...

    @property
    def picture_places(self) -> dict[str, int]: ...

    def codes(self, tokens: jax.Array) -> jax.Array:
        """Drawn tokens int [B, length] as VQ codes int [B, h, w]."""

    def stack(self, prompts: Sequence[Prompt]) -> Any:
        """Encoded prompts side by side, as arrays."""

    def blank(self) -> Prompt:
        """A prompt without meaning, for measurements."""


class Target(Protocol):
    """What a target's module does; `decode` has the shapes.

    Attributes:
      linear_head: whether `logits` is a linear map of the features.
    """

    linear_head: bool

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Drawn tokens int [...] to embeddings [..., d]."""

    def table_row(self, tokens: jax.Array) -> jax.Array:
        """The rows of a drafter's own embedding table that stand for drawn tokens int [...]."""

    def prefix(self, stacked: Any, guided: bool, drafter: nnx.Module | None) -> Prefix:
        """What stands before the first drawn token, of what `TargetConfig.stack` made."""

    def rope(self, positions: jax.Array) -> jax.Array:
        """Rotary cosines and sines [..., D/2, 2] of slots int [...]."""

    def __call__(
        self, x: jax.Array, context: Context, past: tuple[Segment, ...], taps: tuple[int, ...]
    ) -> tuple[jax.Array, Segment]:
        """Embeddings [R, S, d] to features, and the new tokens' keys and values."""

    def logits(self, features: jax.Array) -> jax.Array:
        """Features [..., d] to float32 logits [..., V]."""


class Kind(NamedTuple):
    """A kind of a part: the classes of its sizes and of its module."""

    config: type
    module: type


# By part, and by the name in config.json. The first is what a config.json without a name means.
KINDS: dict[str, dict[str, Kind]] = {
    "target": {
        "llamagen": Kind(LlamaGenConfig, LlamaGen),
        "chameleon": Kind(ChameleonConfig, Chameleon),
        "janus": Kind(JanusConfig, Janus),
        "emu3": Kind(Emu3Config, EarlyFusion),
        "lumina2": Kind(Lumina2Config, EarlyFusion),
        "simplear": Kind(SimpleARConfig, EarlyFusion),
        "liquid": Kind(LiquidConfig, EarlyFusion),
    },
    "vq": {"llamagen": Kind(VQConfig, VQModel), "movq": Kind(MoVQConfig, MoVQ), "cosmos": Kind(CosmosConfig, Cosmos)},
    "drafter": {
        "eagle1": Kind(EagleConfig, Eagle1),
        "eagle3": Kind(Eagle3Config, Eagle3),
        "parallel": Kind(ParallelConfig, Parallel),
        "hydra": Kind(HydraConfig, Hydra),
    },
    "text": {"t5": Kind(T5Config, T5Encoder)},
    "metric": {
        "clip": Kind(CLIPConfig, CLIP),
        "inception": Kind(InceptionConfig, Inception),
        "judge": Kind(JudgeConfig, Judge),
    },
}
# The fields of `bundle.Config` and `bundle.MetricConfig` that hold their sizes, by part.
FIELDS = {"target": "target", "vq": "vq", "drafter": "drafter", "text": "encoder", "metric": "metric"}


def register(name: str, config: type, module: type, part: str = "target") -> None:
    """Adds a kind; one of the same name and classes may be registered again, as notebooks do.

    Args:
      config: a frozen dataclass; of a target, one that fulfils `TargetConfig`.
      module: made by `module(config, rngs=rngs)`; of a target, it fulfils `Target`.
      part: one of FIELDS.

    Raises:
      ValueError: if the name or the configuration is taken, or there is no such part.
      TypeError: if the classes lack something; the message names it.
    """
    if part not in KINDS:
        raise ValueError(f"unknown part {part!r}; there are {', '.join(KINDS)}")
    if not (dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen):
        raise TypeError(f"{config.__name__} must be a frozen dataclass: it is hashed, and written as JSON")
    if part == "target":
        fields = {field.name for field in dataclasses.fields(config)}
        for cls, protocol, own in ((config, TargetConfig, fields), (module, Target, set())):
            if missing := sorted(x for x in _asked(protocol) if x not in own and not hasattr(cls, x)):
                raise TypeError(f"{cls.__name__} is no target's: it lacks {', '.join(missing)} ({protocol.__name__})")
    known = KINDS[part].get(name)
    if known is not None and (_place(known.config), _place(known.module)) != (_place(config), _place(module)):
        raise ValueError(f"there is a {part} {name!r} already: {known.config.__name__}")
    for other, kind in KINDS[part].items():
        if kind.config is config and other != name:
            raise ValueError(f"{config.__name__} is registered already, as {part} {other!r}")
    KINDS[part][name] = Kind(config, module)


def _asked(protocol: type) -> set[str]:
    return {*protocol.__annotations__, *(name for name in vars(protocol) if not name.startswith("_"))}


def _place(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def kind_of(part: str, config: Any) -> str:
    """The name that a configuration's kind has.

    Raises:
      TypeError: if there is none; the message says what is registered.
    """
    found = next((name for name, kind in KINDS[part].items() if kind.config is type(config)), None)
    if found is None:
        kinds = ", ".join(f"{name} ({kind.config.__name__})" for name, kind in KINDS[part].items())
        raise TypeError(
            f"{type(config).__name__} is no registered {part}; registered are {kinds}: see cascade_jax.register"
        )
    return found


def module_of(part: str, config: Any) -> type:
    """The class of the module of a configuration's kind. Raises as `kind_of`."""
    return KINDS[part][kind_of(part, config)].module


def known(part: str) -> str:
    """What there is, for messages."""
    return f"this version knows: {', '.join(KINDS[part])}"
