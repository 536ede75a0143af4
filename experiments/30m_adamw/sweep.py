# AdamW past the edges of 30m_further: lower rates of the embeddings, other betas, warm-ups from 10% to 60%.

from experiments.best import best_of

runs = 16
common = {"max_iters": 780}
optimizers = {
    "adamw": best_of("30m_further", 780, only=("adamw",))["adamw"]
    | {
        "learning_rate": [2e-3, 4e-3, 8e-3],
        "embedding_lr": [2e-3, 4e-3, 8e-3],
        "beta1": [0.8, 0.85, 0.9],
        "beta2": [0.98, 0.99, 0.995],
        "warmup_iters": [78, 312, 468],
        "lr_schedule": ["cosine", "linear"],
    }
}
