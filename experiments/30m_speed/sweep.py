# Time of a step: 200 steps each with a GPU to itself.

common = {
    "dataset": "python",
    "total_bs": 128,
    "batch_size": 128,
    "block_size": 512,
    "max_iters": 200,
    "warmup_iters": 100,
    "eval_interval": 200,
    "eval_tokens": 65_536,
    "always_save_checkpoint": False,
}
sophia = {
    "config": "config/train_gpt2_30m_sophiag.py",
    "optimizer_name": "sophiag",
    "adamw_for": "embeddings",
    "embedding_lr": 8e-3,
    "learning_rate": 1e-3,
    "bias_correction": True,
}
optimizers = {
    "adamw": {"config": "config/train_gpt2_30m_adam.py"},
    "muon": {"config": "config/train_gpt2_30m_muon.py"},
    "sophiag_adamw": sophia | {"rho": 0.3, "hess_bs": 32},
    "sophiag_eigenbasis": sophia | {"rho": 0.1, "hess_bs": 16, "nesterov": True, "eigenbasis": True},
}
