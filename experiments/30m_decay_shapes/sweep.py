"""Three shapes of the learning rate for every optimizer alike, at its best settings, with held-out seeds.

min_lr is 5% of the peak for the cosine, 0 for the others.
"""

from experiments.best import best_of, whitened_muon, with_seeds


def sweep(steps=780, held_out="3,4", only=""):
    best = best_of("30m_further", steps) | best_of("30m_tuning", steps, only=("muon",))
    best |= {"whitened_muon": whitened_muon(steps)} | best_of("30m_eigenbasis", steps, only=("soap",))
    return with_seeds(best, held_out, only, max_iters=[steps], lr_schedule=["cosine", "linear", "wsd_sqrt"])
