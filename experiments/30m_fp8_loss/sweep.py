"""Training with the output matrix and its loss in FP8, and in bfloat16: AdamW and Muon at 30M, held-out seeds.

python sweep.py experiments/30m_fp8_loss/sweep.py --out_dir=out/30m_fp8_loss
"""

from experiments.best import best_of, with_seeds


def sweep(steps=780, held_out="3,4,5", only="adamw,muon"):
    best = best_of("30m_further", steps, only=("adamw",)) | best_of("30m_tuning", steps, only=("muon",))
    return with_seeds(best, held_out, only, max_iters=[steps], fp8_loss=[True, False])
