"""Whitened Muon in blocks with the best settings of 30m_muon_momentum against Muon with those of 30m_tuning.

Held-out seeds, any horizon.
"""

from experiments.best import best_of, sweep_of, with_seeds


def sweep(steps=780, held_out="5,6,7,8,9,10,11,12", only=""):
    whitening = dict(sweep_of("30m_whitening")["settings"])
    warmup = round(whitening["warmup_iters"] * steps / whitening.pop("max_iters"))
    blocks = sweep_of("30m_muon_momentum")["blocks"] | {"momentum": 0.85, "weight_decay": 0.2, "warmup_iters": warmup}
    optimizers = {"blocks": whitening | blocks, **best_of("30m_tuning", steps, only=("muon",))}
    return with_seeds(optimizers, held_out, only, max_iters=[steps])
