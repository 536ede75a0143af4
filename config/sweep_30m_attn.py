# Whether AdamW or Sophia-G needs scale_attn_by_inverse_layer_idx, as the paper says of AdamW: the equal tuning's best
# settings with it, to be compared with sweep_30m_python_780.py's runs, which do without; 780 steps of 128 x 512 tokens.
#   python data/python/prepare.py
#   python sweep.py config/sweep_30m_attn.py --out_dir=out/sweep_30m_attn

from pathlib import Path
from runpy import run_path

best_of = run_path(str(Path(__file__).with_name("best.py")))["best_of"]
common = {"max_iters": 780, "scale_attn_by_inverse_layer_idx": [True], "seed": [1, 2, 3]}
optimizers = best_of("30m_python", max_iters=780, only=("adamw", "sophiag", "sophiag_adamw"))
