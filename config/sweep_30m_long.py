# Whether what was best at 780 steps is best in long runs: 5200 steps of 128 x 512 tokens (341M tokens), four runs of
# AdamW and of Sophia-G with AdamW for the embeddings, over the warm-up's share and one more setting each.
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_long.py --out_dir=out/sweep_30m_long --seeds=3
#   python compare.py out/sweep_30m_long/best_*_seed* --out=out/30m_long

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
common = {"max_iters": 5200}
best = best_of("30m_python", max_iters=5200, only=("adamw", "sophiag_adamw"))
warmup = {"warmup_iters": [520, 2080]}
optimizers = {
    "adamw": best["adamw"] | warmup | {"learning_rate": [2e-3, 4e-3]},
    "sophiag_adamw": best["sophiag_adamw"] | warmup | {"rho": [0.1, 0.3]},  # at 0.3 hardly anything is clipped there
}
