# Equal tuning, as in sweep_30m_python.py and with as many runs, of Sophia-G in the eigenbasis of its curvature
# (AdamW for the embeddings) and of SOAP, which has Adam in such a basis: the control without which the former says
# nothing of Sophia. The ranges lie around the best of a first look (assets/evidence/30m_eigenbasis_pilot/).
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_eigenbasis.py --out_dir=out/sweep_30m_eigenbasis

from pathlib import Path
from runpy import run_path

equal = run_path(str(Path(__file__).with_name("sweep_30m_python.py")))
runs = equal["runs"]
common = equal["common"] | {"warmup_iters": [78, 156, 312]}
optimizers = {
    "sophiag_eigenbasis": equal["optimizers"]["sophiag_adamw"]
    | {
        "eigenbasis": True,
        "learning_rate": [1e-3, 2e-3, 4e-3],
        "embedding_lr": [8e-3, 1.6e-2, 3.2e-2],
        "beta1": [0.9, 0.95],
        "nesterov": [False, True],
        "rho": [0.3, 1.0, 3.0],
    },
    "soap": equal["optimizers"]["adamw"]
    | {
        "optimizer_name": "soap",
        "learning_rate": [1e-3, 2e-3, 4e-3],
        "embedding_lr": [8e-3, 1.6e-2, 3.2e-2],
        "beta1": [0.9, 0.95],
        "beta2": [0.9, 0.95, 0.99],
    },
}
