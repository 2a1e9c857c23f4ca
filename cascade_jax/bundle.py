"""A model directory, a *bundle*: everything needed to go from a prompt to a picture.

    DIR/config.json   what it is: family, sizes, layout, sampling defaults; plain to read
    DIR/params/       an orbax checkpoint: {"target", "drafter", "vq", "text"}, each a tree of arrays
    DIR/tokenizer.json  the text tokenizer, where prompts are text tokens (text: "tokens")

A bundle is written to a temporary directory beside its destination and renamed: a destination is never half a bundle.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from cascade_jax.decode import Prefix, Program
from cascade_jax.models.eagle import Eagle1, EagleConfig
from cascade_jax.models.families import FAMILIES, TargetConfig
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.transformer import BlockConfig
from cascade_jax.models.vq import VQConfig, VQModel, to_uint8
from cascade_jax.sampling import Layout, Sampling
from cascade_jax.tree import DynamicTree, Tree

FORMAT = 1
TOKENIZER = "tokenizer.json"


class BundleError(ValueError):
    """A model directory that cannot be used; the message is one line and says what would help."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A bundle's config.json.

    Attributes:
      family: which architecture the target has, one of `models.families.FAMILIES`.
      target: its sizes.
      drafter: the drafter's sizes; None without one.
      vq: the picture tokenizer's sizes.
      text: which text encoder reads the prompts: "tokens" is the bundle's tokenizer alone, of a target that reads text
        itself; "scenes" the embedded model's captions; None where prompts come encoded.
      sampling: default sampling settings.
      cascade: default thresholds of the cascade rule.
      origin: where the weights came from: source files, digests, recipe.
    """

    family: str
    target: TargetConfig
    drafter: EagleConfig | None
    vq: VQConfig
    text: str | None = None
    sampling: dict[str, float] = dataclasses.field(default_factory=dict)
    cascade: dict[str, float] = dataclasses.field(default_factory=dict)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Bundle:
    """A loaded model.

    Attributes:
      config: what it is.
      params: {"target", "drafter", "vq", "text"}: NNX states, None where a part is missing, an array tree for text.
      read: the text encoder: prompts to a list of `Prompt`; None where prompts come encoded.
    """

    config: Config
    params: dict[str, Any]
    read: Callable[[Sequence[str]], list[Prompt]] | None = None

    def __post_init__(self):
        self._graphs = {name: graph for name, (graph, _) in _skeleton(self.config).items()}
        self._decode_images = jax.jit(
            lambda state, codes: to_uint8(nnx.merge(self._graphs["vq"], state).decode_codes(codes))
        )

    @property
    def length(self) -> int:
        """Output tokens of a picture."""
        return self.config.target.length

    @property
    def layout(self) -> Layout | None:
        """What may stand where in the output."""
        return self.config.target.layout

    def program(self, tree: Tree | DynamicTree) -> Program:
        """The decoding program of this model with `tree`.

        Raises:
          BundleError: if the tree has drafts and the bundle no drafter.
        """
        drafter = self._graphs.get("drafter") if tree.depth else None
        if tree.depth and drafter is None:
            raise BundleError("this model has no drafter, so only autoregressive decoding is possible (--method ar)")
        return Program(self._graphs["target"], drafter, tree, self.length, self.layout)

    def decoding_params(self, program: Program) -> dict[str, Any]:
        """The parameters that `program` reads."""
        return {"target": self.params["target"], "drafter": self.params["drafter"] if program.drafter else None}

    def merged(self, part: str) -> nnx.Module:
        """A part as a module: "target", "drafter" or "vq"."""
        return nnx.merge(self._graphs[part], self.params[part])

    def encode(self, prompts: Sequence[str | Prompt]) -> list[Prompt]:
        """Prompts as the target's conditioning.

        Raises:
          ValueError: for an empty prompt, or text that the text encoder cannot read.
        """
        texts = [p for p in prompts if isinstance(p, str)]
        for text in texts:
            if not text.strip():
                raise ValueError("the prompt is empty")
        if texts and self.read is None:
            raise BundleError("this model has no text encoder: pass encoded prompts (cascade_jax.Prompt)")
        read = iter(self.read(texts) if texts else [])
        return [next(read) if isinstance(p, str) else p for p in prompts]

    def prefix(self, prompts: Sequence[Prompt], guided: bool) -> Prefix:
        """What stands before the first output token, for both guidance branches or the conditional one alone."""
        stacked = self.config.target.stack(prompts)
        return _prefix(self._graphs["target"], self.params["target"], stacked, guided)

    def images(self, tokens: jax.Array) -> np.ndarray:
        """Output tokens int [B, L] as pictures, uint8 [B, H, W, 3]."""
        return np.asarray(self._decode_images(self.params["vq"], self.config.target.codes(tokens)))


@jax.jit(static_argnums=(0, 3))
def _prefix(graph, state, stacked, guided: bool) -> Prefix:
    return nnx.merge(graph, state).prefix(stacked, guided)


def save(
    directory: str | os.PathLike,
    config: Config,
    params: dict[str, Any],
    dtype=jnp.bfloat16,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Writes a bundle; `directory` appears whole or not at all, and replaces a bundle that is there.

    Args:
      params: as `Bundle.params`.
      dtype: of the floating-point arrays on disk.
      tokenizer: the file that becomes the bundle's tokenizer.json.
    """
    directory = pathlib.Path(directory)
    tree = {name: plain(part) for name, part in params.items() if part is not None}
    tree = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
    with replaced(directory) as temporary:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / "params", tree)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
        (temporary / "config.json").write_text(json.dumps({"format": FORMAT, **_to_json(config)}, indent=2) + "\n")


def load(directory: str | os.PathLike, dtype=None) -> Bundle:
    """Reads a bundle.

    Args:
      dtype: of the floating-point parameters; None for float32 on CPU and bfloat16 elsewhere.

    Raises:
      BundleError: if there is no bundle, or it is damaged.
    """
    directory = pathlib.Path(directory).absolute()
    config = read_config(directory)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    skeleton = {name: plain(state) for name, (_, state) in _skeleton(config).items()}
    if config.text == "scenes":
        skeleton["text"] = None
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(directory / "params").item_metadata.tree
            if "text" in skeleton:
                skeleton["text"] = jax.ShapeDtypeStruct(found["text"].shape, jnp.float32)
            wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, _cast(x.dtype, dtype)), skeleton)
            params = checkpointer.restore(directory / "params", wanted)
    except Exception as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise BundleError(f"{directory} is damaged (convert or copy it again): {first}") from error
    states = {}
    for name, (_, state) in _skeleton(config).items():
        nnx.replace_by_pure_dict(state, restored_keys(params[name]))
        states[name] = state
    return Bundle(config, {"drafter": None, "text": params.get("text"), **states})


def read_config(directory: str | os.PathLike) -> Config:
    """A bundle's config.json.

    Raises:
      BundleError: if it is missing or makes no sense.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise BundleError(f"{directory} is not a model: it has no config.json")
    try:
        raw = json.loads(path.read_text())
        if raw.pop("format") != FORMAT:
            raise BundleError(f"{path} has another format than this version reads ({FORMAT}): convert the model again")
        return _from_json(raw)
    except BundleError:
        raise
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error


@contextlib.contextmanager
def replaced(directory: pathlib.Path):
    """A temporary directory that takes the place of `directory` if the block succeeds, and vanishes if it does not."""
    directory = pathlib.Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if directory.exists():
            old = temporary.with_name(temporary.name + "-old")
            directory.rename(old)
            temporary.rename(directory)
            shutil.rmtree(old)
        else:
            temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _skeleton(config: Config) -> dict[str, tuple[nnx.GraphDef, nnx.State]]:
    """Graph definition and shapes of every part, without any memory."""
    parts: dict[str, Callable[[], nnx.Module]] = {
        "target": lambda: FAMILIES[config.family].module(config.target, rngs=nnx.Rngs(0)),
        "vq": lambda: VQModel(config.vq, rngs=nnx.Rngs(0)),
    }
    if config.drafter is not None:
        parts["drafter"] = lambda: Eagle1(config.drafter, rngs=nnx.Rngs(0))
    return {name: nnx.split(nnx.eval_shape(make)) for name, make in parts.items()}


def plain(part) -> Any:
    """An NNX state as nested dictionaries with string keys; other trees as they are."""
    if not isinstance(part, nnx.State):
        return part

    def named(tree):
        return {str(k): named(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return named(nnx.to_pure_dict(part))


def restored_keys(tree):
    """The inverse of `plain`'s renaming: list positions are integers again."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: restored_keys(v) for k, v in tree.items()}


def _cast(stored, wanted):
    return wanted if jnp.issubdtype(stored, jnp.floating) else stored


def _to_json(config: Config) -> dict:
    return dataclasses.asdict(config)


def _from_json(raw: dict) -> Config:
    if (family := FAMILIES.get(raw["family"])) is None:
        raise BundleError(f"unknown model family {raw['family']!r}; this version knows: {', '.join(FAMILIES)}")
    drafter = raw.pop("drafter")
    if drafter is not None:
        drafter = EagleConfig(**{**drafter, "block": BlockConfig(**drafter["block"])})
    vq = raw.pop("vq")
    vq = VQConfig(**{**vq, "channel_multipliers": tuple(vq["channel_multipliers"])})
    return Config(target=family.config(**raw.pop("target")), drafter=drafter, vq=vq, **raw)


def default_sampling(config: Config) -> Sampling:
    """The bundle's own sampling settings."""
    return Sampling(**config.sampling)
