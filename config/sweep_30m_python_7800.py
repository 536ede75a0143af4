# AdamW alone, half as long again as sweep_30m_python_5200.py (7800 steps of 128 x 512 tokens, 511M tokens: three times
# the corpus), so that what it needs for the losses that others reach in 5200 steps can be read off.
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_python_7800.py --out_dir=out/sweep_30m_python_7800
#   python compare.py out/sweep_30m_python_*/*_seed=* --out=out/30m_python

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
common = {"max_iters": [7800], "seed": [3, 4, 5]}
optimizers = best_of("30m_python", max_iters=7800, only=("adamw",))
