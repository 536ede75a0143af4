"""Reading, testing and drawing finished runs: compare.py, sweep.py and experiments/ use it."""

import training  # noqa: F401 - before NumPy and torch, for Ctrl-C
