"""Command-line programs: `python -m launch.train --config=configs/quickstart.py`."""

import sys

from moe_jax.heap import start_over_with_huge_pages

if sys.argv[0] == "-m":  # as long as the program that `python -m` runs is being looked for
    start_over_with_huge_pages()
