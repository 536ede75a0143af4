# Whitened Muon at 30M on Python source: sides, exponent, decay, interval, blocks, and whose gradients give the factors.
#   python data/python/prepare.py
#   python sweep.py experiments/30m_whitening/sweep.py --out_dir=out/30m_whitening
# All have the learning rates, decay, momentum and warm-up that were best for the spectral step (30m_spectral),
# 780 steps of 128 x 512 tokens, and by default seeds 3 and 4.

from experiments.best import with_seeds

settings = {
    "dataset": "python",
    "total_bs": 128,
    "batch_size": 128,
    "block_size": 512,
    "max_iters": 780,
    "warmup_iters": 156,
    "eval_interval": 390,
    "grad_clip": 1.0,
    "learning_rate": 1.6e-2,
    "embedding_lr": 3.2e-2,
    "weight_decay": 0.1,
    "beta1": 0.9,
}
whitened = {"config": "config/train_gpt2_30m_muon.py", "optimizer_name": "whitened_muon", "momentum": 0.9}
one_side = {"whiten_sides": "input", "whiten_exponent": 0.25}
variants = {
    "both": whitened,  # exponent 1/8, ridge 0.01, decay 0.95, roots every 10 steps, the training gradient
    "input": whitened | one_side,
    "exponent_0": whitened | {"whiten_exponent": 0.0},  # the control: Muon
    "sophia_labels": {
        "config": "config/train_gpt2_30m_sophiag.py",
        "optimizer_name": "sophia_muon",
        "hess_interval": 5,
        "hess_bs": 8,
    },
    "both_often": whitened | {"whiten_interval": 5},
    "input_slow": whitened | one_side | {"whiten_decay": 0.99},
    "both_slow": whitened | {"whiten_decay": 0.99},
    "input_blocks": whitened | one_side | {"whiten_max_width": 384},
}


def sweep(held_out="3,4", only=""):
    return with_seeds(variants, held_out, only, **settings)
