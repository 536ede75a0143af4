"""Whitened Muon in blocks against Muon, with the best of 30m_muon_momentum for each: held-out seeds, any horizon."""

from experiments.best import sweep_of, with_seeds


def sweep(steps=780, held_out="5,6,7,8,9,10,11,12", blocks="0.85,0.2", muon="0.85,0.2", only=""):
    """blocks, muon: momentum and weight decay of each."""
    variants, settings = sweep_of("30m_muon_momentum")["variants"], sweep_of("30m_whitening")["settings"]
    warmup = round(settings["warmup_iters"] * steps / settings["max_iters"])
    optimizers = {}
    for name, given in (("blocks", blocks), ("muon", muon)):
        momentum, weight_decay = map(float, given.split(","))
        optimizers[name] = variants[name] | {"momentum": momentum, "weight_decay": weight_decay}
    return with_seeds(optimizers, held_out, only, **settings | {"warmup_iters": warmup, "max_iters": [steps]})
