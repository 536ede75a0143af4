"""Training with the output matrix and its loss in FP8, and in bfloat16: AdamW and Muon at 30M, held-out seeds.

fp8_loss and the seed are swept, so that labels hold them.

python sweep.py experiments/30m_fp8_loss/sweep.py --out_dir=out/30m_fp8_loss
"""

from experiments.best import best_of


def sweep(steps=780, held_out="3,4,5", only="adamw,muon"):
    """steps: the training horizon; held_out: the seeds; only: which optimizers."""
    settings = {
        "adamw": best_of("30m_further", steps, only=("adamw",))["adamw"],
        "muon": best_of("30m_tuning", steps, only=("muon",))["muon"],
    }
    common = {"max_iters": [steps], "fp8_loss": [True, False], "seed": [int(seed) for seed in held_out.split(",")]}
    return {"common": common, "optimizers": {name: settings[name] for name in only.split(",")}}
