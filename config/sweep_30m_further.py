# AdamW, and Sophia-G with AdamW for the embeddings, tuned as much further as Sophia-G in the eigenbasis was: a random
# search of 25 runs more each, around their best in the equal tuning and past the edges it was at (AdamW's rate and
# warm-up; Sophia-G's rho, which sweep_rho_beta2.py found to be better at 1 than at 0.3), of 780 steps of 128 x 512
# tokens (51M tokens).
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_further.py --out_dir=out/sweep_30m_further --seeds=3

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
runs = 25
common = {"max_iters": 780}
best = best_of("30m_python", max_iters=780, only=("adamw", "sophiag_adamw"))
around = {"weight_decay": [0.1, 0.2, 0.4], "beta1": [0.9, 0.95], "warmup_iters": [312, 468]}
optimizers = {
    "adamw": best["adamw"]
    | around
    | {"learning_rate": [2e-3, 4e-3, 8e-3], "embedding_lr": [8e-3, 1.6e-2, 3.2e-2], "beta2": [0.95, 0.99]},
    "sophiag_adamw": best["sophiag_adamw"]
    | around
    | {"learning_rate": [1e-3, 2e-3, 4e-3], "embedding_lr": [8e-3, 1.6e-2], "rho": [0.3, 1.0, 3.0, 10.0]},
}
