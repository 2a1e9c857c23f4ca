"""Puts finished training runs together as the bundle and the judge that ship inside the package."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
from flax import nnx

from cascade_jax import bundle
from cascade_jax.bundle import Bundle, Config, MetricConfig
from cascade_jax.models import families
from cascade_jax.recipes import target as target_recipe
from cascade_jax.recipes import tokenizer as tokenizer_recipe
from cascade_jax.recipes.judge import load_judge
from cascade_jax.scenes import judge
from cascade_jax.text.readers import reader
from cascade_jax.training import run

PIECE = 12 << 20  # bytes of a file of parameters, about
SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": None}


def from_runs(runs: pathlib.Path, *, drafter: bool = True) -> Bundle:
    """The scenes bundle as it stands in a directory of runs: tokenizer, target, and the drafter if it is trained."""
    runs = pathlib.Path(runs)
    tokenizer = tokenizer_recipe.load_tokenizer(runs / "tokenizer")
    config, trained = target_recipe.load_target(runs / "target", tokenizer)
    params = {**trained, "vq": nnx.split(tokenizer)[1], "drafter": None}
    eagle = None
    if drafter:
        eagle, params["drafter"], _ = run.trained(runs / "drafter")
    settings = {
        name: json.loads((runs / name / "settings.json").read_text(encoding="utf-8"))
        for name in ("target", "drafter")
        if (runs / name / "settings.json").exists()
    }
    origin = {"recipe": "cascade-jax scenes train", "settings": settings}
    own = [edition.guidance for edition in target_recipe.EDITIONS.values() if edition.config == config]
    config = Config(
        families.kind_of("target", config), config, eagle, tokenizer_recipe.TOKENIZER, "scenes",
        SAMPLING | {"guidance": own[0] if own else target_recipe.Edition.guidance}, {}, origin,
    )  # fmt: skip
    return Bundle(config, params, reader(config, params["text"], None, runs))


def pack(runs: str | pathlib.Path, out: str | pathlib.Path, *, dtype=jnp.bfloat16, cascade: dict | None = None) -> None:
    """Writes `out`, a bundle such as come with the package, and the judge beside it, from a directory of runs.

    Args:
      runs: holds tokenizer/, target/, drafter/ and judge/ as the recipes left them.
      dtype: of the weights on disk, bfloat16 or int8.
      cascade: default settings of the cascade method; None keeps those of a bundle that is there.
    """
    runs, out = pathlib.Path(runs), pathlib.Path(out)
    if cascade is None and (out / "config.json").exists():
        cascade = bundle.read_config(out).cascade
    packed = from_runs(runs)
    config = dataclasses.replace(packed.config, cascade=cascade or {})
    bundle.save(out, config, packed.params, dtype, shard=PIECE)
    with bundle.written(out.with_name("judge_weights")) as writer:
        writer.put("metric", nnx.state(load_judge(runs / "judge")))
        writer.copy(runs / "judge" / "reference.npz", "reference.npz")
        writer.finish(MetricConfig(judge.CONFIG, {"recipe": packed.config.origin["recipe"]}))
