# Equal tuning of five optimizers at 30M on Python source text: a random search of 16 runs each, of 780 steps of
# 128 x 512 tokens (51M tokens), over rate, decay, momentum and warm-up, for Sophia rho too.
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_python.py --out_dir=out/sweep_30m_python --seeds=3
#   python compare.py out/sweep_30m_python/best_*_seed* --out=out/sweep_30m_python/best

runs = 16
common = {
    "dataset": "python",
    "total_bs": 128,
    "batch_size": 128,
    "block_size": 512,
    "max_iters": 780,
    "warmup_iters": [78, 156, 312],  # of 39, 78 and 156 the last was AdamW's best in a pilot
    "eval_interval": 390,
    "grad_clip": 1.0,
}
sophia = {
    "config": "config/train_gpt2_30m_sophiag.py",
    "learning_rate": [2.5e-4, 5e-4, 1e-3, 2e-3],
    "weight_decay": [0.1, 0.2, 0.4, 1.0],
    "beta1": [0.8, 0.9, 0.95],  # the config's 0.965 is made for 100k steps
    "bias_correction": True,  # h remembers 1000 steps, more than there are
}
optimizers = {
    "adamw": {
        "config": "config/train_gpt2_30m_adam.py",
        "learning_rate": [1e-3, 2e-3, 4e-3, 8e-3],
        "weight_decay": [0.1, 0.2, 0.4, 0.8],  # the pilot's best had 0.4, its largest
        "beta1": [0.8, 0.9, 0.95],
    },
    "lion": {
        "config": "config/train_gpt2_30m_lion.py",
        "learning_rate": [2.5e-4, 5e-4, 1e-3, 2e-3],
        "weight_decay": [0.1, 0.2, 0.4, 1.0],
        "beta2": [0.9, 0.95, 0.98],  # of its momentum; at 0.99 16 runs ended between 3.1 and 3.9, AdamW at 1.66
    },
    "muon": {
        "config": "config/train_gpt2_30m_muon.py",
        "learning_rate": [1e-3, 2e-3, 4e-3, 8e-3],
        "weight_decay": [0.1, 0.2, 0.4, 0.8],
        "momentum": [0.9, 0.95],
    },
    "sophiag": sophia | {"rho": [0.01, 0.03, 0.1, 0.3]},
    "sophiah": sophia | {"rho": [0.003, 0.01, 0.03, 0.1]},
}
