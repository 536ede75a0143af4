# The best Sophia-G, Muon and AdamW at 1560 steps once more, with five seeds that no verdict was read off before: with
# three seeds the first two are apart by 0.006 at p = 0.16.
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_again_1560.py --out_dir=out/sweep_30m_again_1560
#   python compare.py out/sweep_30m_again_*/muon*_seed=* out/sweep_30m_again_*/[as]*_seed=* --out=out/30m_again

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
common = {"max_iters": [1560], "seed": [6, 7, 8, 9, 10]}
optimizers = best_of("30m_python", max_iters=1560, only=("adamw", "muon")) | best_of("30m_spectral", max_iters=1560)
