# Equal tuning of six optimizers: a random search of 16 runs each, around the best of a first tuning.

runs = 16
common = {
    "dataset": "python",
    "total_bs": 128,
    "batch_size": 128,
    "block_size": 512,
    "max_iters": 780,
    "warmup_iters": [156, 312],
    "eval_interval": 390,
    "grad_clip": 1.0,
}
sophia = {
    "config": "config/train_gpt2_30m_sophiag.py",
    "learning_rate": [2.5e-4, 5e-4, 1e-3],
    "embedding_lr": [4e-3, 8e-3, 1.6e-2],
    "weight_decay": [0.1, 0.2, 0.4],
    "beta1": [0.8, 0.9, 0.95],  # the config's 0.965 is made for 100k steps
    "bias_correction": True,  # h remembers 1000 steps, more than there are
}
optimizers = {
    "adamw": {
        "config": "config/train_gpt2_30m_adam.py",
        "learning_rate": [1e-3, 2e-3, 4e-3],
        "embedding_lr": [8e-3, 1.6e-2, 3.2e-2],
        "weight_decay": [0.1, 0.2, 0.4],
        "beta1": [0.8, 0.9, 0.95],
    },
    "sophiag": sophia | {"rho": [0.03, 0.1, 0.3]},
    "sophiag_adamw": sophia  # Sophia-G without the embeddings, which AdamW moves
    | {
        "optimizer_name": "sophiag",
        "adamw_for": "embeddings",
        "embedding_lr": [8e-3, 1.6e-2, 3.2e-2],
        "rho": [0.03, 0.1, 0.3],
    },
    "muon": {
        "config": "config/train_gpt2_30m_muon.py",
        "learning_rate": [4e-3, 8e-3, 1.6e-2],
        "embedding_lr": [8e-3, 1.6e-2, 3.2e-2],
        "weight_decay": [0.1, 0.2, 0.4],
        "momentum": [0.9, 0.95],
    },
    "sophiah": sophia | {"rho": [0.003, 0.01, 0.03, 0.1]},
    "lion": {
        "config": "config/train_gpt2_30m_lion.py",
        "learning_rate": [1.25e-4, 2.5e-4, 5e-4],
        "embedding_lr": [2e-3, 4e-3, 8e-3],
        "weight_decay": [0.2, 0.4, 0.8],
        "beta2": [0.9, 0.95],  # of its momentum; at 0.99 16 runs ended between 3.1 and 3.9, AdamW at 1.66
    },
}
