# Learning rate and warm-up of four optimizers at 30M: 8 runs each of 1560 steps of 128 x 512 tokens (102M tokens).
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_lr.py --out_dir=out/sweep_30m_lr --seeds=3

common = {
    "dataset": "python",
    "total_bs": 128,
    "batch_size": 128,
    "block_size": 512,
    "max_iters": 1560,
    "warmup_iters": [78, 312],
    "eval_interval": 390,
}
optimizers = {
    "adamw": {"config": "config/train_gpt2_30m_adam.py", "learning_rate": [1e-3, 2e-3, 4e-3, 8e-3]},
    "lion": {"config": "config/train_gpt2_30m_lion.py", "learning_rate": [1e-4, 2e-4, 4e-4, 8e-4]},
    "muon": {"config": "config/train_gpt2_30m_muon.py", "learning_rate": [1e-3, 2e-3, 4e-3, 8e-3]},
    "sophiag": {
        "config": "config/train_gpt2_30m_sophiag.py",
        "learning_rate": [2.5e-4, 5e-4, 1e-3, 2e-3],
        "beta1": 0.9,  # the config's 0.965 is made for 100k steps
    },
}
