"""`python -m cascade_jax` is `cascade-jax`."""

import sys

from cascade_jax.cli import entry

if __name__ == "__main__":
    sys.exit(entry())
