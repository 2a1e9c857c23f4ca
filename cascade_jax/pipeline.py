"""From prompts to pictures: `load`, `generate` and `score`, the functions most people start with."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh

from cascade_jax import acceptance, bundle, decode, hub, interrupts, platforms, sharding
from cascade_jax.acceptance import Rule
from cascade_jax.bundle import Bundle, Prompt
from cascade_jax.decode import Program
from cascade_jax.drafters.jacobi import Jacobi
from cascade_jax.mesh import DATA, MODEL
from cascade_jax.sampling import FRESH, GUMBEL, Sampling
from cascade_jax.targets import Target
from cascade_jax.text import readers
from cascade_jax.tree import ROOT, DynamicTree, Tree, window
from cascade_jax.verify import TRAVERSAL, WALK

_SCENES = pathlib.Path(__file__).parent / "scenes"
EMBEDDED = {"scenes": _SCENES / "weights", "scenes-small": _SCENES / "small_weights"}  # models in the package
CHUNK = 16  # steps between two looks at progress and interrupts


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
      images: uint8 [B, H, W, 3]; None of a target that makes none.
      tokens: int32 [B, T].
      stats: see `Report`.
      texts: str [B], of a target that writes text (see `targets.Text`).
    """

    images: np.ndarray | None
    tokens: np.ndarray
    stats: Report
    texts: np.ndarray | None = None


@struct.dataclass
class Scored:
    """What the target thinks of given pictures.

    Attributes:
      logits: float32 [B, T, V], conditional branch, over VQ codes.
      features: [B, T, h], the hidden states that yield them.
    """

    logits: jax.Array
    features: jax.Array


def load(
    model: str | os.PathLike = "scenes",
    dtype=None,
    placement: bundle.Placement | None = None,
    mesh: Mesh | None = None,
    batch: int = 1,
) -> Bundle:
    """Loads a model: "scenes" or "scenes-small", which come with the package, or a converted directory.

    Args:
      dtype: of the parameters; None for bfloat16 where the machine multiplies that, and float32 elsewhere.
      placement: gives each parameter's sharding; see `bundle.load`.
      mesh: divides the model over devices, see `mesh.make`; None for one device.
      batch: pictures that will be drawn at once; room for them and the parameters is looked for before anything is
        loaded, unless parameters are placed by hand.

    Raises:
      bundle.BundleError: if there is no such model, or it is damaged.
      ValueError: if the mesh does not divide the model, or its devices have too little memory.
    """
    directory, contents = folder(model), None
    dtype = platforms.defaults().decoding if dtype is None else dtype
    if placement is None:
        sizes = {DATA: 1, MODEL: 1} if mesh is None else dict(mesh.shape)
        config, contents = bundle.read_config(directory), bundle.contents(directory)
        sharding.check(config, sizes[MODEL])
        arrays = bundle.by_name(contents)
        platforms.check_memory(sharding.needed(config, arrays, dtype, batch=batch, **sizes), math.prod(sizes.values()))
        placement = None if mesh is None else sharding.placement(mesh)
    loaded = bundle.load(directory, dtype, placement, contents, for_decoding=True)
    encoder = None if loaded.config.encoder is None else loaded.merged("text")
    read = readers.reader(loaded.config, loaded.params["text"], encoder, directory / "text")
    return dataclasses.replace(loaded, mesh=mesh, read=read)


def folder(model: str | os.PathLike) -> pathlib.Path:
    """Where a model lies: one of `EMBEDDED`, a converted directory, or one on the hub, hf://OWNER/NAME, which is
    downloaded unless the hub's cache has it.

    Raises:
      bundle.BundleError: if there is no such model, or it cannot be had.
    """
    if hub.is_address(model):
        return _from_hub(hub.address(model))
    directory = EMBEDDED.get(str(model)) or pathlib.Path(model)
    if not directory.is_dir():
        known = ", ".join(f'"{name}"' for name in EMBEDDED)
        raise bundle.BundleError(f"there is no model {str(model)!r}: give {known} or a converted directory")
    return directory


def _from_hub(address: hub.Address) -> pathlib.Path:
    try:
        bundle.read_any_config(hub.only(address, bundle.CONFIG))  # before gigabytes are fetched
        return hub.whole(address)
    except hub.HubError as error:
        raise bundle.BundleError(str(error)) from error
    except bundle.BundleError as error:
        convert = f"cascade-jax convert auto {address} DEST"
        raise bundle.BundleError(f"{error}; if {address} is a published checkpoint, convert it: {convert}") from error


def generate(
    model: Bundle | Target,
    prompts: Sequence[str | Prompt],
    key: jax.Array,
    rule: Rule | None = None,
    tree: Tree | DynamicTree | None = None,
    sampling: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
    drafter: nnx.Module | None = None,
    noise: str | None = None,
    verifier: str = WALK,
    length: int | None = None,
) -> Generated:
    """Draws a picture for every prompt, as one batch.

    Args:
      model: a loaded model, or a target of one's own.
      prompts: texts, or encoded prompts; for a target of one's own token ids, or texts if it reads them: one prefix, or
        several of any lengths.
      key: a random key, or a seed; picture i draws from fold_in(key, i). Or a key for every picture, [B]. A picture
        depends on its prompt and its key alone, whatever else is in the batch.
      rule: the acceptance rule; None for `strict()`.
      tree: the draft tree; `trees.ROOT` is autoregressive decoding. None for the one that fits the platform, or a
        window that does for a model without a drafter, which drafts it by itself if the rule is lossless.
      sampling: None for the model's own settings.
      progress: called now and then with (tokens drawn, tokens in all). Without it, and where nobody watches for
        interrupts, nothing returns to the host before the last token.
      drafter: one without parameters, `drafters.jacobi.Jacobi` for instance, in place of the model's own; any for a
        target of one's own.
      noise: "gumbel" draws with noise that belongs to the output position: one and the same picture for a key, whatever
        the tree and drafter. None for that with `exact()`, and for "fresh" random numbers with other rules.
      verifier: of a strict rule, "traversal" accepts more than the "walk"; see `verify.verify`.
      length: tokens to draw from a target of one's own; None for its own number.

    Raises:
      ValueError: for no prompt, an unreadable one, keys of another number, settings out of range, or gumbel noise
        or traversal with a relaxed rule.
      TypeError: for prompts that are no list of texts or encoded prompts, or a key that is none.
      interrupts.Interrupted: between two steps, if that was asked for.
    """
    model, program = _prepared(model, rule, tree, drafter, noise, verifier, length)
    encoded = model.encode(prompts)
    tokens, stats = _drawn(model, encoded, key, rule, program, sampling, progress)
    drawn = Generated(model.images(tokens), np.asarray(tokens), stats, model.texts(tokens))
    return jax.tree.map(lambda x: x[: len(encoded)], drawn)


def draw_tokens(
    model: Bundle | Target,
    prompts: Sequence[str | Prompt],
    key: jax.Array,
    rule: Rule | None = None,
    tree: Tree | DynamicTree | None = None,
    sampling: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
    drafter: nnx.Module | None = None,
    noise: str | None = None,
    verifier: str = WALK,
    length: int | None = None,
) -> tuple[np.ndarray, Report]:
    """As `generate`, without pictures: tokens int32 [B, T], and how they were drawn."""
    model, program = _prepared(model, rule, tree, drafter, noise, verifier, length)
    encoded = model.encode(prompts)
    drawn = jax.tree.map(np.asarray, _drawn(model, encoded, key, rule, program, sampling, progress))
    return jax.tree.map(lambda x: x[: len(encoded)], drawn)


def _prepared(model, rule, tree, drafter, noise, verifier, length) -> tuple[Bundle | Target, Program]:
    """The model with this drafter, and its program; arguments as of `generate`."""
    exactly = isinstance(rule, acceptance.Exact)
    if tree is None and drafter is None and (rule is None or exactly) and isinstance(model, Bundle) and model.alone:
        drafter = Jacobi(coupled=verifier != TRAVERSAL)
        tree = window(min(platforms.defaults().window, length or model.length), 1)
    model = model.drafting(drafter).sized(length)
    program = model.program(
        model.usual_tree if tree is None else tree, noise or (GUMBEL if exactly else FRESH), verifier
    )
    program.check(acceptance.strict() if rule is None else rule)
    return model, program


def _drawn(model, prompts, key, rule, program, sampling, progress) -> tuple[jax.Array, Report]:
    """Tokens and figures, on a mesh of more rows than prompts."""
    sampling = (model.sampling if sampling is None else sampling).checked()
    params, rule = model.decoding_params(program), acceptance.strict() if rule is None else rule
    state = start(model, program, prompts, key, sampling)
    run = decode.run_jit if model.mesh is None else functools.partial(sharding.run, model.mesh)
    if progress is None and not interrupts.watching():
        state = run(program, params, state, rule, sampling)
    else:
        progress = progress or (lambda done, total: None)
        total = len(state.count) * program.length
        while (drawn := int(jnp.sum(state.count))) < total:
            interrupts.check()
            progress(drawn * len(prompts) // len(state.count), len(prompts) * program.length)
            state = run(program, params, state, rule, sampling, CHUNK)
        progress(len(prompts) * program.length, len(prompts) * program.length)
    return state.tokens[:, : program.length], report(state.stats)


def start(model: Bundle | Target, program: Program, prompts, key: jax.Array, sampling: Sampling) -> decode.DecodeState:
    """The decoding state of `prompts` after the prefill, with checked sampling settings; `key` as in `generate`.

    On a mesh it is a state of `sharding.prefill`, and the last prompt is repeated until `data` divides the batch.
    """
    encoded = model.encode(prompts)
    keys = typed(key)
    keys = keys if keys.ndim else picture_keys(keys, np.arange(len(encoded)))
    if keys.shape != (len(encoded),):
        raise ValueError(f"{len(encoded)} prompts need one key or {len(encoded)}, not keys of shape {keys.shape}")
    missing = 0 if model.mesh is None else -len(prompts) % model.mesh.shape[DATA]
    prefix = model.prefix([*encoded, *encoded[-1:] * missing], guided=sampling.guidance is not None)
    keys = jnp.concatenate([keys, *[keys[-1:]] * missing]) if missing else keys
    if model.mesh is not None:
        return sharding.prefill(model.mesh, program, model.decoding_params(program), prefix, keys, sampling)
    return decode.prefill_jit(program, model.decoding_params(program), prefix, keys, sampling)


def typed(key: jax.Array | int) -> jax.Array:
    """A seed, or keys of `jax.random.key` or of the older `jax.random.PRNGKey`, as keys of the former kind.

    Raises:
      TypeError: if it is nothing of it.
    """
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return jax.random.key(key)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))  # of the older kind
    if isinstance(key, (jax.Array, np.ndarray)) and key.dtype == raw.dtype and key.shape[-1:] == raw.shape:
        return jax.random.wrap_key_data(key)
    what = f"{key.dtype} {key.shape}" if isinstance(key, (jax.Array, np.ndarray)) else repr(key)
    raise TypeError(f"key is jax.random.key(SEED), or one for every picture, not {what}")


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

    Raises:
      TypeError: for a target of one's own.
    """
    if isinstance(model, Target):
        raise TypeError("score is of loaded models: a target of one's own is scored by its own forward")
    prefix = model.prefix(model.encode(prompts), guided=False)
    program = model.program(ROOT)
    return _score(program.target, model.params["target"], prefix, jnp.asarray(tokens, jnp.int32))


@jax.jit(static_argnums=0)
def _score(graph, state, prefix: decode.Prefix, tokens: jax.Array) -> Scored:
    target = nnx.merge(graph, state)
    features = decode.at_tokens(decode.teacher_forced(target, prefix, tokens), prefix, tokens.shape[1])
    return Scored(target.logits(features), features)
