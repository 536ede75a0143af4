"""Every optimizer's best settings at one training horizon, with held-out seeds.

Every run has 128 x 512 tokens a step.
"""

from experiments.best import best_of, with_seeds


def sweep(steps=780, held_out="3,4,5", only=""):
    best = best_of("30m_tuning", steps)
    best["sophiag_adamw_beta2"] = best["sophiag_adamw"] | {"beta2": 0.95}  # the best of 30m_recipe
    best["nadamw"] = best["adamw"] | {"optimizer_name": "nadamw"}
    best |= best_of("30m_eigenbasis", steps)
    best["sophiag_eigenbasis_fresh"] = best_of("30m_eigenbasis_fresh", steps, only=("fresh",))["fresh"]
    best |= best_of("30m_spectral", steps)
    return with_seeds(best, held_out, only, max_iters=[steps])
