"""The target families: what a bundle's `family` stands for.

A family is a configuration and a module. To the engine the module is any with `embed`, `rope`, `__call__`, `logits` and
`linear_head` (see `decode`). Around the engine a bundle also asks for

    config.length, config.layout     drawn tokens of a picture, and what may stand where among them (None: any code)
    config.codes(tokens)             drawn tokens int [B, length] to VQ codes int [B, h, w]
    config.stack(prompts)            encoded prompts side by side, as arrays
    config.blank()                   a prompt without meaning, for measurements
    module.prefix(stacked, guided, drafter)   these arrays to what stands before the first drawn token

and, of a family that reads text itself, config.read(encode, text), a caption to a `Prompt`. A drafter with a table of
embeddings of its own reads the row `module.table_row(tokens)` of it.
"""

from cascade_jax.models.chameleon import Chameleon, ChameleonConfig
from cascade_jax.models.janus import Janus, JanusConfig
from cascade_jax.models.llamagen import LlamaGen, LlamaGenConfig

TARGETS = {
    "llamagen": (LlamaGenConfig, LlamaGen),
    "chameleon": (ChameleonConfig, Chameleon),
    "janus": (JanusConfig, Janus),
}
