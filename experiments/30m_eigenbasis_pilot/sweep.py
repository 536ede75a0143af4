# A first look at Sophia-G in the eigenbasis of its curvature, and SOAP at two learning rates; one seed.

from experiments.best import best_of

common = {"max_iters": 780, "seed": [1]}
best = best_of("30m_tuning", 780, only=("adamw", "sophiag_adamw"))
short = {"warmup_iters": 156}
same = best["sophiag_adamw"] | short | {"eigenbasis": True}
nesterov = same | {"learning_rate": 2e-3, "embedding_lr": 1.6e-2, "rho": 1.0, "nesterov": True}
nesterov4 = nesterov | {"learning_rate": 4e-3}
fresh = {"hess_interval": 3, "hess_bs": 32, "beta2": 0.97}
soap = best["adamw"] | short | {"optimizer_name": "soap", "beta1": 0.95}
optimizers = {
    "same": same,
    "nesterov": nesterov,
    "nesterov4_rho3": nesterov4 | {"rho": 3.0},
    "nesterov4": nesterov4,
    "fresh": nesterov | fresh,
    "fresh4": nesterov4 | fresh,
    "soap2": soap | {"learning_rate": 2e-3},
    "soap4": soap | {"learning_rate": 4e-3},
}
