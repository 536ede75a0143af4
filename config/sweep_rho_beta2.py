# How much Sophia-G, with AdamW for the embeddings, minds rho and beta2, as the paper's sensitivity figure asks, at 30M:
# 16 runs of 780 steps of 128 x 512 tokens (51M tokens), all else as was best in the equal tuning. Draws a heat map.
#   python data/python/prepare.py
#   python sweep.py config/sweep_rho_beta2.py --out_dir=out/sweep_rho_beta2

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
common = {"max_iters": 780, "seed": 1}
best = best_of("30m_python", max_iters=780, only=("sophiag_adamw",))["sophiag_adamw"]
optimizers = {"sophiag_adamw": best | {"rho": [0.03, 0.1, 0.3, 1.0], "beta2": [0.9, 0.95, 0.99, 0.995]}}
