"""The families that can be converted."""

from checkpoints_convert import chameleon, clip, emu3, fusion, inception, janus, llamagen, lumina2
from checkpoints_convert.formats import Family

_ALL = (
    llamagen.FAMILY, chameleon.LUMINA, chameleon.ANOLE, janus.FAMILY, lumina2.FAMILY, emu3.EMU3, emu3.EMU35,
    fusion.SIMPLEAR, fusion.LIQUID, clip.FAMILY, inception.FAMILY,
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
