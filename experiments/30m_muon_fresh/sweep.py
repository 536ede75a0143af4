# Whitened Muon at 30M with inverse roots of the newest factors, and cheaper forms of it.
#   python sweep.py experiments/30m_muon_fresh/sweep.py --out_dir=out/30m_muon_fresh

from experiments.best import sweep_of, with_seeds

whitening = sweep_of("30m_whitening")
every = whitening["variants"]["both"] | {"whiten_interval": 1}
input_every = whitening["variants"]["input"] | {"whiten_interval": 1}
variants = {
    "every": every,
    "every_second": every | {"whiten_interval": 2},
    "input_every": input_every,
    "every_blocks": every | {"whiten_max_width": 384},
    "every_decay_0.2": every | {"weight_decay": 0.2},
    "every_momentum_0.85": every | {"momentum": 0.85},
    "every_fast": every | {"whiten_decay": 0.9},
    "every_quarter": every | {"whiten_exponent": 0.25},
    "input_every_blocks": input_every | {"whiten_max_width": 384},
}


def sweep(held_out="3,4", only=""):
    return with_seeds(variants, held_out, only, **whitening["settings"])
