"""The families that can be converted."""

from checkpoints_convert import llamagen
from checkpoints_convert.formats import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (llamagen.FAMILY,)}
