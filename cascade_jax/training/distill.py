"""Making training data: pictures that the target draws itself, or real ones that its picture tokenizer encodes.

A row depends on its prompt, its number and the seed alone, and a shard is written whole or not at all: a run that was
stopped goes on where it stopped, and several processes can each make a part of the shards in one folder.
"""

import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from cascade_jax import interrupts, pictures, pipeline
from cascade_jax.bundle import Bundle
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.vq import to_float
from cascade_jax.sampling import Sampling
from cascade_jax.text import captioned, captions
from cascade_jax.training import data
from cascade_jax.training.drafter import branch_features
from cascade_jax.training.settings import agree, settle
from cascade_jax.tree import ROOT

Say = Callable[[str], None]


def draw(
    model: Bundle,
    folder: str | pathlib.Path,
    prompts: Sequence[str | Prompt],
    *,
    count: int,
    batch: int,
    seed: int,
    sampling: Sampling,
    features: tuple[int, ...] | None = None,
    part: tuple[int, int] = (0, 1),
    name: str = "",
    say: Say = lambda _: None,
) -> data.Data | None:
    """Lets the target draw `count` pictures, token by token, and keeps their tokens.

    Args:
      prompts: row i's prompt is the i-th; if there are fewer, they are gone through again.
      batch: rows drawn at once, and rows of a shard.
      features: keep the target's features too, and these layers behind them (see `passes.split`); None keeps none.
      part: (k, n) makes every n-th shard from the k-th on, for n processes that work on one folder.
      name: of the model, for messages.
      say: called with a line on every shard.

    Returns:
      The finished data; None while other parts are missing.

    Raises:
      ValueError: if `folder` holds data made with other settings, or a prompt cannot be read.
    """
    sampling = sampling.checked()
    settings = {name: None if x is None else float(x) for name, x in vars(sampling).items()}
    digest = hashlib.sha256(json.dumps([p if isinstance(p, str) else "" for p in prompts]).encode()).hexdigest()
    settings = {"source": "drawn", "seed": seed, "sampling": settings, "prompts": digest[:16]}

    def make(numbers):
        asked = [prompts[i % len(prompts)] for i in numbers]
        encoded, keys = model.encode(asked), pipeline.picture_keys(jax.random.key(seed), np.array(numbers))
        tokens, _ = pipeline.draw_tokens(model, encoded, keys, tree=ROOT, sampling=sampling)
        return tokens, _captions(asked), encoded

    return _make(model, folder, make, count, batch, features, part, name, settings, say)


def encode(
    model: Bundle,
    folder: str | pathlib.Path,
    images: str | pathlib.Path,
    *,
    batch: int,
    count: int | None = None,
    features: tuple[int, ...] | None = None,
    part: tuple[int, int] = (0, 1),
    name: str = "",
    say: Say = lambda _: None,
) -> data.Data | None:
    """Encodes captioned pictures by the model's picture tokenizer, as LANTERN trains its drafters; else as `draw`.

    Args:
      images: a folder, see `text.captioned`. Pictures are cropped to the model's shape around their middle and resized.
      count: the first so many; None for all.

    Raises:
      ValueError: as of `draw`, or if a picture or its caption cannot be read; names the file.
    """
    found = captioned.read(pathlib.Path(images))
    if count is not None and count > len(found):
        raise ValueError(f"{images} holds {len(found)} captioned pictures, and {count} are asked for")
    found = found[:count]
    captions.check(model, [caption for _, caption in found])
    for path, _ in found:
        pictures.check(path)
    names = json.dumps([(path.name, caption.text) for path, caption in found])
    settings = {"source": "encoded", "pictures": hashlib.sha256(names.encode()).hexdigest()[:16]}
    graph, state = nnx.split(model.merged("vq"))
    rows, columns = _codes_shape(model)
    side = model.config.vq.downsampling

    def make(numbers):
        chosen = [found[i % len(found)] for i in numbers]
        images = np.stack([pictures.read(path, columns * side, rows * side) for path, _ in chosen])
        codes = np.asarray(_codes(graph, state, images)).reshape(len(images), -1)
        texts = [caption.text for _, caption in chosen]
        return tokens_of(codes, model.layout), texts, model.encode(texts)

    return _make(model, folder, make, len(found), batch, features, part, name, settings, say)


def tokens_of(codes: np.ndarray, layout) -> np.ndarray:
    """Drawn tokens int [B, T] of a picture's codes int [B, n]: the codes, and between them what the layout forces."""
    if layout is None:
        return codes
    forced = np.array(layout.forced)
    tokens = np.broadcast_to(forced, (len(codes), len(forced))).copy()
    tokens[:, forced < 0] = codes
    return tokens


def _codes_shape(model: Bundle) -> tuple[int, int]:
    found = jax.eval_shape(model.config.target.codes, jax.ShapeDtypeStruct((1, model.length), np.int32))
    return found.shape[1:]


@jax.jit(static_argnums=0)
def _codes(graph, state, images: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).encode_codes(to_float(images))


@jax.jit(static_argnums=(0, 1))
def _features(graph, taps, state, prefix, tokens: jax.Array) -> jax.Array:
    return branch_features(nnx.merge(graph, state), prefix, tokens, taps)


def _captions(asked: Sequence[str | Prompt]) -> list[str]:
    return [prompt if isinstance(prompt, str) else "" for prompt in asked]


def _make(
    model: Bundle,
    folder: str | pathlib.Path,
    make: Callable[[list[int]], tuple[np.ndarray, list[str], list[Prompt]]],
    count: int,
    batch: int,
    features: tuple[int, ...] | None,
    part: tuple[int, int],
    name: str,
    settings: dict[str, Any],
    say: Say,
) -> data.Data | None:
    """Makes the missing shards: `make` gives tokens, captions and prompts of the rows with these numbers."""
    folder, state = pathlib.Path(folder), model.params["target"]
    digest = data.fingerprint(state)
    about = {"format": data.FORMAT, "target": digest, "model": name, "count": count, "shard": batch}
    about |= {"length": model.length, "features": None if features is None else list(features)}
    about |= {"dtype": str(jax.tree.leaves(state)[0].dtype), **settings}
    agree(folder / "data.json", about, "data")
    graph, total, done = model.program(ROOT).target, -(-count // batch), data.shards(folder)
    missing = [shard for shard in range(part[0], total, part[1]) if shard not in done]
    begin = time.monotonic()
    for made, shard in enumerate(missing, 1):
        try:
            interrupts.check()
            # The last shard is made whole, and cut: all batches are of one shape.
            tokens, captions, prompts = make([shard * batch + row for row in range(batch)])
        except interrupts.Interrupted as asked:
            there = f"{folder} keeps {len(data.shards(folder))} of {total} shards: the same command makes the others"
            raise interrupts.Interrupted(there) from asked
        kept = None
        if features is not None:
            kept = np.asarray(_features(graph, features, state, model.prefix(prompts, guided=True), tokens))
        rows = min(batch, count - shard * batch)
        settle(folder / "data.json", about, "data")  # with the first rows, so that what cannot be read leaves nothing
        data.write_shard(
            folder, shard, tokens[:rows], captions[:rows], prompts[:rows], None if kept is None else kept[:rows]
        )
        each = (time.monotonic() - begin) / (made * batch)
        left = each * batch * (len(missing) - made) / 60
        say(f"shard {shard + 1} of {total}: {each:.2f} s a picture, {left:.1f} min left")
    return data.Data(folder, digest) if len(data.shards(folder)) == total else None
