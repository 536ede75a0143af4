# Curvature from a quarter of the batch (the default) and from the whole batch.

common = {
    "config": "config/train_gpt2_30m_sophiag.py",
    "optimizer_name": "sophiag",
    "dataset": "python",
    "total_bs": 128,
    "batch_size": 128,
    "block_size": 512,
    "max_iters": 1000,
    "warmup_iters": 200,
    "learning_rate": 5e-4,
    "beta1": 0.9,
    "weight_decay": 0.4,
    "bias_correction": True,
    "eval_interval": 250,
    "seed": [1, 2, 3],
}
optimizers = {"quarter": {"hess_bs": 32}, "full": {"hess_bs": 128}}
