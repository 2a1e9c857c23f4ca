"""A model directory, a *bundle*: everything needed to go from a prompt to a picture.

    DIR/config.json   what it is: family, sizes, layout, sampling defaults; plain to read
    DIR/params/       orbax checkpoints that together hold {"target", "drafter", "vq", "text"}, each a tree of arrays:
                      one, or several in folders 0, 1, ..., so that a large model is written piece by piece
    DIR/text/         what the text encoder needs beside its parameters, such as tokenizer.json
    DIR/neighbours.npy  LANTERN's table, int32 [codes, k]; optional

A destination is never half a bundle, see `files`. A network that measures pictures is kept in the same way, with
{"metric"} as its only part.

Room: `config` (config.json), `arrays` (parameters by path), `model` (a loaded model), `store` (the disk), each above
the one before. It imports the engine, models and files; of scenes, text encoders and methods it knows nothing.
"""

from cascade_jax.bundle.arrays import laid_out, nested, plain, restored_keys
from cascade_jax.bundle.config import (
    CONFIG,
    FORMAT,
    BundleError,
    Config,
    MetricConfig,
    built,
    default_sampling,
    from_json,
    read_any_config,
    read_config,
    to_json,
)
from cascade_jax.bundle.model import (
    Bundle,
    abstract,
    encode,
    pictures,
    prefix,
    shapes,
    skeleton,
    usual_neighbours,
)
from cascade_jax.bundle.store import (
    NEIGHBOURS,
    Contents,
    Placement,
    Writer,
    by_name,
    contents,
    load,
    load_metric,
    save,
    save_neighbours,
    stored,
    written,
)
from cascade_jax.models.families import FIELDS, KINDS
from cascade_jax.models.prompt import Prompt

__all__ = [
    "CONFIG",
    "FIELDS",
    "FORMAT",
    "KINDS",
    "NEIGHBOURS",
    "Bundle",
    "BundleError",
    "Config",
    "Contents",
    "MetricConfig",
    "Placement",
    "Prompt",
    "Writer",
    "abstract",
    "built",
    "by_name",
    "contents",
    "default_sampling",
    "encode",
    "from_json",
    "laid_out",
    "load",
    "load_metric",
    "nested",
    "pictures",
    "plain",
    "prefix",
    "read_any_config",
    "read_config",
    "restored_keys",
    "save",
    "save_neighbours",
    "shapes",
    "skeleton",
    "stored",
    "to_json",
    "usual_neighbours",
    "written",
]
