# The equal tuning of sweep_30m_python.py, with Muon's ranges, of Sophia-G's spectral step (Muon's in coordinates that
# the curvature whitens), with AdamW for embeddings and vectors as Muon has it: a random search of 16 runs of 780 steps
# of 128 x 512 tokens (51M tokens), at 30M.
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_spectral.py --out_dir=out/sweep_30m_spectral --seeds=3

from pathlib import Path
from runpy import run_path

python = run_path(str(Path(__file__).with_name("sweep_30m_python.py")))
runs, common, muon = python["runs"], python["common"], python["optimizers"]["muon"]
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
