# Fresher curvature and a higher learning rate of the embeddings together, and one change at a time to that.

from experiments.best import best_of

common = {"max_iters": 780, "seed": [1]}
fresh = best_of("30m_eigenbasis", 780, only=("sophiag_eigenbasis",))["sophiag_eigenbasis"]
fresh |= {"beta2": 0.9, "hess_interval": 5, "hess_bs": 8, "embedding_lr": 1.6e-2}
optimizers = {
    "fresh": fresh,
    "faster": fresh | {"learning_rate": 2e-3, "rho": 0.3},
    "faster_embeddings": fresh | {"embedding_lr": 3.2e-2},
    "fresher": fresh | {"hess_interval": 2, "beta2": 0.95},
    "decay": fresh | {"weight_decay": 0.2},
    "costly": fresh | {"hess_bs": 16},
    "beta1": fresh | {"beta1": 0.9},
    "rho": fresh | {"rho": 0.2},
    "rate": fresh | {"learning_rate": 1.5e-3, "rho": 0.15},
    "slower": fresh | {"learning_rate": 7e-4, "rho": 0.07},
    "warmup": fresh | {"warmup_iters": 156},
    "fresher_short": fresh | {"hess_interval": 2},
}
