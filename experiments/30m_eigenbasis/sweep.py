# Equal tuning of Sophia-G in the eigenbasis of its curvature and of SOAP, the control: Adam in such a basis.

from experiments.best import sweep_of

equal = sweep_of("30m_tuning")
runs = equal["runs"]
common = equal["common"] | {
    "warmup_iters": [78, 156, 312],
    "beta1": [0.9, 0.95],
    "embedding_lr": [8e-3, 1.6e-2, 3.2e-2],
}
optimizers = {
    "sophiag_eigenbasis": equal["optimizers"]["sophiag_adamw"]
    | common
    | {
        "optimizer_name": "sophiag",
        "eigenbasis": True,
        "learning_rate": [5e-4, 1e-3, 2e-3],
        "rho": [0.1, 0.3, 1.0],
        "nesterov": [False, True],
        "hess_interval": [5, 10],
        "hess_bs": 16,
        "beta2": 0.98,
    },
    "soap": equal["optimizers"]["adamw"]
    | common
    | {
        "optimizer_name": "soap",
        "learning_rate": [2e-3, 4e-3, 8e-3],
        "beta2": [0.95, 0.99],
    },
}
