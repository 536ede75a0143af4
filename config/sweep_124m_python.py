# Whether the order at 30M holds at 124M: 2300 steps of 128 x 1024 tokens (301M tokens) of Python source text, one seed,
# of AdamW and of the four that were better at 30M. The settings are what was best there. The rate of matrices and
# vectors is halved since the width is doubled, as arXiv:2203.03466 scales Adam's for matrices; that of the embeddings
# is kept. Sequences are twice as long as there.
#   python data/python/prepare.py
#   python sweep.py config/sweep_124m_python.py --out_dir=out/sweep_124m_python

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
common = {"max_iters": [2300], "seed": [1]}
shape = {"total_bs": 128, "batch_size": 64, "block_size": 1024, "eval_interval": 575}
shape |= {"scale_attn_by_inverse_layer_idx": False}  # as at 30M
best = best_of("30m_python", max_iters=2300, only=("adamw", "muon"))
best |= best_of("30m_eigenbasis", max_iters=2300, only=("soap",))
best["sophiag_eigenbasis"] = best_of("30m_eigenbasis_fresh", max_iters=2300, only=("fresh",))["fresh"]
best |= best_of("30m_spectral", max_iters=2300)
optimizers = {
    name: settings
    | shape
    | {"config": settings["config"].replace("30m", "small"), "learning_rate": settings["learning_rate"] / 2}
    for name, settings in best.items()
}
