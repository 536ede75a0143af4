# Whether the order at 30M holds at 124M: three optimizers, 2300 steps of 128 x 1024 tokens (301M tokens) of Python
# source text, one seed. Settings are the 30M tunings' best; the matrices' rate is halved since the width is doubled, as
# arXiv:2203.03466 scales Adam's, the embeddings' is kept.
#   python data/python/prepare.py
#   python sweep.py config/sweep_124m_python.py --out_dir=out/sweep_124m_python

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
three = best_of("30m_python_one_rate", "30m_python", max_iters=2300, only=("adamw", "sophiag_adamw", "muon"))
common = {"max_iters": [2300], "seed": [1]}
shape = {"total_bs": 128, "batch_size": 64, "block_size": 1024, "eval_interval": 575}
optimizers = {
    name: settings
    | shape
    | {
        "config": settings["config"].replace("30m", "small"),
        "learning_rate": settings["learning_rate"] / 2,
        "embedding_lr": settings.get("embedding_lr", settings["learning_rate"]),
    }
    for name, settings in three.items()
}
