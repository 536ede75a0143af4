# What makes Sophia-G better at 30M on Python source text: one change at a time to the equal tuning's best settings,
# two seeds each, 780 steps of 128 x 512 tokens (51M tokens). What is expected of each is in assets/evidence/LOG.md.
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_recipe.py --out_dir=out/sweep_30m_recipe
#   python compare.py out/sweep_30m_recipe/*_seed=* --out=out/30m_recipe

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
common = {"max_iters": 780, "seed": [1, 2]}
best = best_of("30m_python", max_iters=780, only=("adamw", "sophiag_adamw"))
adamw, sophia = best["adamw"], best["sophiag_adamw"]
faster = {"learning_rate": 2 * sophia["learning_rate"], "rho": round(3 * sophia["rho"], 6)}  # and clipped less
optimizers = {
    "adamw": adamw,
    "nadamw": adamw | {"optimizer_name": "nadamw"},
    "sophiag": sophia,
    "nesterov": sophia | {"nesterov": True},
    "nesterov_faster": sophia | {"nesterov": True} | faster,
    "nesterov_beta1": sophia | {"nesterov": True, "beta1": 0.95},
    "faster": sophia | faster,
    "beta2": sophia | {"beta2": 0.95},
    "fresh": sophia | {"hess_interval": 2, "hess_bs": 6, "beta2": 0.98},  # five times as often, no more sequences
    "no_correction": sophia | {"bias_correction": False},
    "sign": sophia | {"rho": 1e-6, "learning_rate": sophia["learning_rate"] / 2},  # no curvature
}
