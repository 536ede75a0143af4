"""Reading, testing and drawing finished runs: compare.py, sweep.py and experiments/ use it."""
