"""`python -m checkpoints_convert` is `cascade-jax convert`."""

import sys

from cascade_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
