"""The target families: what a bundle's `family` stands for.

A family is a configuration and a module. To the engine the module is any with `embed`, `rope`, `__call__` and `logits`
(see `decode`). Around the engine a bundle also asks for

    config.length, config.layout     drawn tokens of a picture, and what may stand where among them (None: any code)
    config.codes(tokens)             drawn tokens int [B, length] to VQ codes int [B, h, w]
    config.stack(prompts)            encoded prompts side by side, as arrays
    module.prefix(stacked, guided)   these arrays to what stands before the first drawn token, a `decode.Prefix`
    config.sampling, config.cascade  the paper's settings, which a converter writes into a new bundle

and, of a family that reads text itself, config.read(encode, text), a caption to a `Prompt`.
"""

from dataclasses import dataclass

from flax import nnx

from cascade_jax.models.chameleon import Chameleon, ChameleonConfig
from cascade_jax.models.janus import Janus, JanusConfig
from cascade_jax.models.llamagen import LlamaGen, LlamaGenConfig


@dataclass(frozen=True)
class Family:
    """A configuration class and the module that it describes."""

    config: type
    module: type[nnx.Module]


FAMILIES = {
    "llamagen": Family(LlamaGenConfig, LlamaGen),
    "chameleon": Family(ChameleonConfig, Chameleon),
    "janus": Family(JanusConfig, Janus),
}
TargetConfig = LlamaGenConfig | ChameleonConfig | JanusConfig
