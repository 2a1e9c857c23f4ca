"""From prompts to pictures: `load`, `generate` and `score`, the functions most people start with."""

import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from cascade_jax import acceptance, bundle, decode
from cascade_jax.acceptance import Rule
from cascade_jax.bundle import Bundle, Prompt
from cascade_jax.sampling import Sampling
from cascade_jax.scenes import captions
from cascade_jax.text import classes, t5
from cascade_jax.text import tokens as tokens_of
from cascade_jax.tree import EAGLE_25, ROOT, DynamicTree, Tree

SCENES = pathlib.Path(__file__).parent / "scenes" / "weights"
CHUNK = 16  # steps between two calls of a progress function


@struct.dataclass
class Report:
    """How the pictures were made, a value per picture, [B] each.

    Attributes:
      steps: verification steps: passes of the target after the prefill, which yields the first token.
      accepted: draft tokens among the output.
      alpha: accepted drafts per step.
      tokens_per_step: alpha + 1.
      nominal: probability mass that the rule added, per step.
      coupled: probability of parting from the strict decoder, per step (see `verify.Verdict`).
      divergence: share of the steps in which it would have parted.
    """

    steps: np.ndarray
    accepted: np.ndarray
    alpha: np.ndarray
    tokens_per_step: np.ndarray
    nominal: np.ndarray
    coupled: np.ndarray
    divergence: np.ndarray


@struct.dataclass
class Generated:
    """Pictures and how they came about.

    Attributes:
      images: uint8 [B, H, W, 3].
      tokens: int32 [B, T].
      stats: see `Report`.
    """

    images: np.ndarray
    tokens: np.ndarray
    stats: Report


@struct.dataclass
class Scored:
    """What the target thinks of given pictures.

    Attributes:
      logits: float32 [B, T, V], conditional branch, over VQ codes.
      features: [B, T, h], the hidden states that yield them.
    """

    logits: jax.Array
    features: jax.Array


def load(model: str | os.PathLike = "scenes", dtype=None, placement: bundle.Placement | None = None) -> Bundle:
    """Loads a model: "scenes", which comes with the package, or a converted directory.

    Args:
      dtype: of the parameters; None for float32 on CPU and bfloat16 elsewhere.
      placement: gives each parameter's sharding; see `bundle.load`.

    Raises:
      bundle.BundleError: if there is no such model, or it is damaged.
    """
    directory = folder(model)
    loaded = bundle.load(directory, dtype, placement)
    match loaded.config.text:
        case "scenes":
            table = loaded.params["text"]

            def read(texts: Sequence[str]) -> list[Prompt]:
                ids = np.stack([captions.encode(captions.placed(captions.parse(text))) for text in texts])
                return [Prompt(features=features) for features in captions.features(table, ids)]

            loaded.read = read
        case "t5":
            slots = loaded.config.target.condition_tokens
            loaded.read = t5.reader(loaded.merged("text"), directory / "text" / "tokenizer.json", slots)
        case "tokens":
            loaded.read = tokens_of.reader(directory / "text" / "tokenizer.json", loaded.config.target)
        case "class":
            loaded.read = classes.reader(loaded.config.target.classes)
    return loaded


def folder(model: str | os.PathLike) -> pathlib.Path:
    """Where a model lies: "scenes", which comes with the package, or a converted directory.

    Raises:
      bundle.BundleError: if there is no such model.
    """
    directory = SCENES if str(model) == "scenes" else pathlib.Path(model)
    if not directory.is_dir():
        raise bundle.BundleError(f'there is no model {str(model)!r}: give "scenes" or a converted directory')
    return directory


def generate(
    model: Bundle,
    prompts: Sequence[str | Prompt],
    key: jax.Array,
    rule: Rule | None = None,
    tree: Tree | DynamicTree = EAGLE_25,
    sampling: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Draws a picture for every prompt, as one batch.

    Args:
      prompts: texts, or encoded prompts.
      key: a random key; picture i draws from fold_in(key, i). Or a key for every picture, [B]. A picture depends on
        its prompt and its key alone, whatever else is in the batch.
      rule: the acceptance rule; None for `strict()`.
      tree: the draft tree; `trees.ROOT` is autoregressive decoding.
      sampling: None for the model's own settings.
      progress: called now and then with (tokens drawn, tokens in all). Without it nothing returns to the host
        before the last token.

    Raises:
      ValueError: for no prompt, an unreadable one, or settings out of range.
    """
    if not prompts:
        raise ValueError("there is no prompt")
    sampling = (bundle.default_sampling(model.config) if sampling is None else sampling).checked()
    state = start(model, prompts, key, tree, sampling)
    program = model.program(tree)
    params, rule = model.decoding_params(program), acceptance.strict() if rule is None else rule
    if progress is None:
        state = decode.run_jit(program, params, state, rule, sampling)
    else:
        total = len(prompts) * program.length
        while (drawn := int(jnp.sum(state.count))) < total:
            progress(drawn, total)
            state = decode.run_jit(program, params, state, rule, sampling, CHUNK)
        progress(total, total)
    tokens = state.tokens[:, : program.length]
    return Generated(model.images(tokens), np.asarray(tokens), report(state.stats))


def start(model: Bundle, prompts, key: jax.Array, tree: Tree | DynamicTree, sampling: Sampling) -> decode.DecodeState:
    """The decoding state of `prompts` after the prefill, with checked sampling settings; `key` as in `generate`."""
    program = model.program(tree)
    prefix = model.prefix(model.encode(prompts), guided=sampling.guidance is not None)
    keys = key if key.ndim else picture_keys(key, np.arange(len(prompts)))
    if keys.shape != (len(prompts),):
        raise ValueError(f"{len(prompts)} prompts need one key or {len(prompts)}, not keys of shape {keys.shape}")
    return decode.prefill_jit(program, model.decoding_params(program), prefix, keys, sampling)


@jax.jit
def picture_keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """The keys [B] of the pictures with these numbers, int [B]: fold_in(key, number)."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def report(stats: decode.Stats) -> Report:
    """Sums over steps as the figures that are reported."""
    stats = jax.tree.map(np.asarray, stats)
    steps = np.maximum(stats.steps, 1)
    alpha = stats.accepted / steps
    return Report(
        steps=stats.steps,
        accepted=stats.accepted,
        alpha=alpha,
        tokens_per_step=alpha + 1,
        nominal=stats.nominal / steps,
        coupled=stats.coupled / steps,
        divergence=stats.diverged / steps,
    )


def score(model: Bundle, prompts: Sequence[str | Prompt], tokens: jax.Array) -> Scored:
    """Teacher-forced logits and features of the conditional branch at the image positions.

    Args:
      prompts: texts or encoded prompts, B.
      tokens: int [B, T]; position t's logits are those of token t given the tokens before it.
    """
    prefix = model.prefix(model.encode(prompts), guided=False)
    program = model.program(ROOT)
    return _score(program.target, model.params["target"], prefix, jnp.asarray(tokens, jnp.int32))


@jax.jit(static_argnums=0)
def _score(graph, state, prefix: decode.Prefix, tokens: jax.Array) -> Scored:
    target = nnx.merge(graph, state)
    features = decode.at_tokens(decode.teacher_forced(target, prefix, tokens), prefix, tokens.shape[1])
    return Scored(target.logits(features), features)
