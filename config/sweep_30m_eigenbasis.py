# Equal tuning, as in sweep_30m_python.py and with as many runs, of Sophia-G in the eigenbasis of its curvature
# (AdamW for the embeddings) and of SOAP, which has Adam in such a basis: the control without which the former says
# nothing of Sophia. The ranges lie around the best of a first look (assets/evidence/30m_eigenbasis_pilot/).
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_eigenbasis.py --out_dir=out/sweep_30m_eigenbasis

from pathlib import Path
from runpy import run_path

equal = run_path(str(Path(__file__).with_name("sweep_30m_python.py")))
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
