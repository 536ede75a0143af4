# Long runs: 6.7 times the equal tuning, with what was best in it, and three fresh seeds each: 5200 steps of
# 128 x 512 tokens (341M tokens).
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_python_5200.py --out_dir=out/sweep_30m_python_5200
#   python compare.py out/sweep_30m_python_*/*_seed=* --out=out/30m_python

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
common = {"max_iters": [5200], "seed": [3, 4, 5]}
optimizers = best_of("30m_python", max_iters=5200)
optimizers["sophiag_tuned"] = optimizers["sophiag_adamw"] | {"beta2": 0.95}  # the best of sweep_30m_recipe.py
optimizers |= best_of("30m_eigenbasis", max_iters=5200)
fresh = best_of("30m_eigenbasis_fresh", max_iters=5200, only=("fresh",))["fresh"]
optimizers["sophiag_eigenbasis_fresh"] = fresh
optimizers |= best_of("30m_spectral", max_iters=5200)
