# One change at a time to the best settings of 30m_eigenbasis, one seed each.

from experiments.best import best_of

common = {"max_iters": 780, "seed": [1]}
same = best_of("30m_eigenbasis", 780, only=("sophiag_eigenbasis",))["sophiag_eigenbasis"]
faster = {"learning_rate": 2 * same["learning_rate"], "rho": round(3 * same["rho"], 6)}  # and clipped less
optimizers = {
    "same": same,
    "beta2_0.9": same | {"beta2": 0.9},
    "beta2_0.8": same | {"beta2": 0.8},
    "fresh": same | {"beta2": 0.9, "hess_interval": 5, "hess_bs": 8},  # twice as often, no more sequences
    "fresh_costly": same | {"beta2": 0.9, "hess_interval": 5},
    "fresher": same | {"beta2": 0.8, "hess_interval": 5},  # averages over 25 steps
    "faster": same | faster,
    "faster_beta2": same | faster | {"beta2": 0.8},
    "small_rho": same | {"rho": round(same["rho"] / 3, 6)},
    "faster_embeddings": same | {"embedding_lr": 2 * same["embedding_lr"]},
    "unclipped": same | {"grad_clip": 0.0},  # same clips a third of its steps
    "plain_momentum": same | {"nesterov": False, "beta1": 0.9},
    "sign": same | {"rho": 1e-6, "learning_rate": same["learning_rate"] / 2},  # no curvature but in the bases
}
