# Single changes to whitened Muon at 30M on Python source, each from the variant "both" of 30m_whitening.
#   python sweep.py experiments/30m_muon_recipe/sweep.py --out_dir=out/30m_muon_recipe

from experiments.best import sweep_of, with_seeds

whitening = sweep_of("30m_whitening")
both = whitening["variants"]["both"]
input_side = whitening["variants"]["input"]
changes = {
    "both_every": both | {"whiten_interval": 1},
    "both_fast": both | {"whiten_decay": 0.9},
    "both_ridge_0.1": both | {"whiten_ridge": 0.1},
    "both_ridge_0.001": both | {"whiten_ridge": 0.001},
    "both_quarter": both | {"whiten_exponent": 0.25, "whiten_ridge": 0.1},
    "input_half": input_side | {"whiten_exponent": 0.5, "whiten_ridge": 0.1},
    "input_ridge_0.1": input_side | {"whiten_ridge": 0.1},
    "momentum_0.95": both | {"momentum": 0.95},
    "lr_0.8e-2": both | {"learning_rate": 8e-3},
    "lr_2.4e-2": both | {"learning_rate": 2.4e-2},
    "embedding_lr_1.6e-2": both | {"embedding_lr": 1.6e-2},
    "decay_0.2": both | {"weight_decay": 0.2},
    "decay_0.4": both | {"weight_decay": 0.4},
    "cautious_0.2": both | {"weight_decay": 0.2, "cautious_decay": True},
    "betas_0.8_0.95": both | {"beta1": 0.8, "beta2": 0.95},
    "line_to_0": both | {"lr_schedule": "linear"},
    "warmup_78": both | {"warmup_iters": 78},
    "warmup_312": both | {"warmup_iters": 312},
}


def sweep(held_out="3", only=""):
    return with_seeds(changes, held_out, only, **whitening["settings"])
