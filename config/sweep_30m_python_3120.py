# AdamW alone, twice as long as sweep_30m_python_1560.py (3120 steps of 128 x 512 tokens, 204M tokens): from 1560 to
# 5200 steps its loss is interpolated over too wide a gap, so that speed-ups at 1560 steps depend on how.
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_python_3120.py --out_dir=out/sweep_30m_python_3120
#   python compare.py out/sweep_30m_python_*/*_seed=* --out=out/30m_python

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
common = {"max_iters": [3120], "seed": [3, 4, 5]}
optimizers = best_of("30m_python", max_iters=3120, only=("adamw",))
