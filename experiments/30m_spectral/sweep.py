# Equal tuning of the spectral step (Muon's, in coordinates that the curvature whitens) in Muon's ranges.

from experiments.best import sweep_of

tuning = sweep_of("30m_tuning")
runs, common, muon = tuning["runs"], tuning["common"], tuning["optimizers"]["muon"]
optimizers = {
    "sophiag_spectral": {
        "config": "config/train_gpt2_30m_sophiag.py",
        "optimizer_name": "sophiag",
        "eigenbasis": True,
        "spectral": True,
        "adamw_for": "embeddings+vectors",
        "learning_rate": muon["learning_rate"],
        "embedding_lr": muon["embedding_lr"],
        "weight_decay": muon["weight_decay"],
        "beta1": muon["momentum"],
        "nesterov": True,  # as Muon's
        "beta2": 0.9,
        "bias_correction": True,
        "hess_interval": 5,
        "hess_bs": 8,
    },
}
