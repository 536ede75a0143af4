# Variants of Muon and of whitened Muon at 30M on Python source, the most important ones first.
#   python data/python/prepare.py
#   python sweep.py experiments/30m_muon_variants/sweep.py --out_dir=out/30m_muon_variants
# Muon has the settings of its tuning. Whitened Muon has those of 30m_muon_fresh's best variant.

from experiments.best import best_of, sweep_of, with_seeds

fresh = sweep_of("30m_muon_fresh")
settings = fresh["whitening"]["settings"]
muon = best_of("30m_tuning", settings["max_iters"], only=("muon",))["muon"]
whitened = settings | fresh["variants"]["every_momentum_0.85"]
input_side = whitened | {"whiten_sides": "input", "whiten_exponent": 0.25}
kfac = {"variant": "kfac", "whiten_interval": 10, "whiten_decay": 0.6}  # 0.95 to the power 10
record = {"whiten_decay": 0.9, "whiten_interval": 10}  # of SOAP-Muon
soap = muon | {"optimizer_name": "whitened_muon", "variant": "soap"} | record
newton = {"optimizer_name": "whitened_muon", "variant": "newton", "whiten_ridge": 0.2, "whiten_interval": 10}
averages = {"weight_ema": "0.9,0.95,0.98,0.98*0.6,0.99"}
warm = {"momentum_start": 0.85, "momentum_warmup": 300, "momentum": 0.95}
variants = {
    "muon": muon | averages,
    "whitened": whitened | averages,
    "soap_muon": soap,
    "soap_muon_1.6e-2": whitened | {"variant": "soap"} | record,
    "soap_muon_0.95": soap | {"momentum": 0.95},
    "kl": whitened | {"variant": "kl"},
    "input": input_side,
    "kfac": input_side | kfac,
    "newton_muon": muon | newton,
    "newton_muon_1.6e-2": whitened | newton,
    "muon_warm": muon | warm,
    "muon_0.95": muon | {"momentum": 0.95},
    "whitened_warm": whitened | warm,
    "kl_quarter": whitened | {"variant": "kl", "whiten_exponent": 0.25},
    "soap_muon_mlp": soap | {"variant": "soap_mlp", "momentum": 0.95},
    "kfac_half": input_side | kfac | {"whiten_exponent": 0.5, "whiten_ridge": 0.1},
    "kfac_both": whitened | kfac,
    "soap_muon_every": whitened | {"variant": "soap"} | record | {"whiten_interval": 1},
}


def sweep(held_out="3,4", only=""):
    script = "experiments/30m_muon_variants/variants.py"
    return with_seeds(variants, held_out, only, script=script, max_iters=settings["max_iters"])
