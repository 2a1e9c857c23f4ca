"""Acceptance rules that relax, one idea a file; `acceptance` says what a rule is, and holds the strict one.

May import `acceptance` and `sampling`. A rule becomes a method by an entry in `methods`.
"""

from cascade_jax.rules.annealed import annealed
from cascade_jax.rules.cascade import cascade
from cascade_jax.rules.entropic import entropic
from cascade_jax.rules.grouped import grouped
from cascade_jax.rules.lantern import lantern, lantern_pp, nearest_codes

__all__ = ["annealed", "cascade", "entropic", "grouped", "lantern", "lantern_pp", "nearest_codes"]
