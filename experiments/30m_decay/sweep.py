"""A learning rate that falls in a straight line to 0, with every optimizer's best settings and held-out seeds.

min_lr is 0 where a linear schedule does not set it.
"""

from experiments.best import best_of, with_seeds


def sweep(steps=780, held_out="3,4,5", only=""):
    best = best_of("30m_tuning", steps, only=("adamw", "muon")) | best_of("30m_spectral", steps)
    best["adamw_further"] = best_of("30m_further", steps, only=("adamw",))["adamw"]
    return with_seeds(best, held_out, only, max_iters=[steps], lr_schedule="linear")
