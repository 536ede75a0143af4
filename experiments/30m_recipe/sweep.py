# One change at a time to the best settings of 30m_tuning, two seeds each.

from experiments.best import best_of

common = {"max_iters": 780, "seed": [1, 2]}
best = best_of("30m_tuning", 780, only=("adamw", "sophiag_adamw"))
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
