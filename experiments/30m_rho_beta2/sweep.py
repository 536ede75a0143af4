# Sophia-G with AdamW for the embeddings over a grid of rho and beta2, all else as tuned; one seed.

from experiments.best import best_of

common = {"max_iters": 780, "seed": 1}
best = best_of("30m_tuning", 780, only=("sophiag_adamw",))["sophiag_adamw"]
optimizers = {"sophiag_adamw": best | {"rho": [0.03, 0.1, 0.3, 1.0], "beta2": [0.9, 0.95, 0.99, 0.995]}}
