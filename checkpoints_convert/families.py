"""The families that can be converted."""

from checkpoints_convert import chameleon, clip, inception, janus, llamagen
from checkpoints_convert.formats import Family

_ALL = (llamagen.FAMILY, chameleon.LUMINA, chameleon.ANOLE, janus.FAMILY, clip.FAMILY, inception.FAMILY)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
