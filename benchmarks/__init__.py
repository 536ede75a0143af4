import training  # noqa: F401 - before NumPy and torch, for Ctrl-C
