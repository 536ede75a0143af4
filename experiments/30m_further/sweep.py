# AdamW, and Sophia-G with AdamW for the embeddings, tuned with 25 more runs each, past the edges of 30m_tuning.

from experiments.best import best_of

runs = 25
common = {"max_iters": 780}
best = best_of("30m_tuning", 780, only=("adamw", "sophiag_adamw"))
around = {"weight_decay": [0.1, 0.2, 0.4], "beta1": [0.9, 0.95], "warmup_iters": [312, 468]}
optimizers = {
    "adamw": best["adamw"]
    | around
    | {"learning_rate": [2e-3, 4e-3, 8e-3], "embedding_lr": [8e-3, 1.6e-2, 3.2e-2], "beta2": [0.95, 0.99]},
    "sophiag_adamw": best["sophiag_adamw"]
    | around
    | {"learning_rate": [1e-3, 2e-3, 4e-3], "embedding_lr": [8e-3, 1.6e-2], "rho": [0.3, 1.0, 3.0, 10.0]},
}
