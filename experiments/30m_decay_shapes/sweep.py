"""Three shapes of the learning rate for every optimizer alike, at its best settings, with held-out seeds.

max_iters and the seed are swept, so that labels hold them. min_lr is 5% of the peak for the cosine, 0 for the others.
"""

from experiments.best import best_of, sweep_of


def sweep(steps=780, held_out="3,4", only=""):
    """steps: the training horizon; held_out: the seeds, which no tuning used; only: some of the optimizers."""
    whitening = sweep_of("30m_whitening")
    whitened = whitening["settings"] | whitening["variants"]["both"]
    whitened["warmup_iters"] = round(whitened["warmup_iters"] * steps / whitened.pop("max_iters"))
    best = best_of("30m_further", steps) | best_of("30m_tuning", steps, only=("muon",))
    best |= {"whitened_muon": whitened} | best_of("30m_eigenbasis", steps, only=("soap",))
    names = only.split(",") if only else best
    shapes = {"lr_schedule": ["cosine", "linear", "wsd_sqrt"]}
    common = {"max_iters": [steps], "seed": [int(seed) for seed in held_out.split(",")]} | shapes
    return {"common": common, "optimizers": {name: best[name] for name in names}}
