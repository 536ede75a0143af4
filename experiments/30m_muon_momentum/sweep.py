# Momentum and weight decay of whitened Muon, whole and in blocks, and of Muon itself, at 30M on Python source.
#   python sweep.py experiments/30m_muon_momentum/sweep.py --out_dir=out/30m_muon_momentum

from experiments.best import best_of, sweep_of, with_seeds

whitening = sweep_of("30m_whitening")
whole = whitening["variants"]["both"] | {"whiten_interval": 1}
blocks = whitening["variants"]["both"] | {"whiten_interval": 2, "whiten_max_width": 384}
muon = {"config": "config/train_gpt2_30m_muon.py", "optimizer_name": "muon", "learning_rate": 8e-3}
grid = {"momentum": [0.8, 0.85], "weight_decay": [0.2, 0.4]}
variants = {"whole": whole, "blocks": blocks, "muon": muon, "muon_1.6e-2": muon | {"learning_rate": 1.6e-2}}
variants["muon_tuned"] = best_of("30m_tuning", 780, only=("muon",))["muon"]


def sweep(held_out="3,4", only=""):
    return with_seeds({n: one | grid for n, one in variants.items()}, held_out, only, **whitening["settings"])
