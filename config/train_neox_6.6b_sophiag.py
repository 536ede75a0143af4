# GPT-NeoX (arXiv:2204.06745) with 6.86B parameters on the Pile with Sophia-G, in the shape of the Sophia paper's last
# version: 2048 sequences of 2048 tokens a step, 100k steps. With one embedding matrix for both ends, instead of
# GPT-NeoX's two, it would be 6.65B, the paper's 6.6B.
#   python data/text/prepare.py --source 'PILE/train/*.jsonl.zst' --out_dir data/pile      # your copy of the Pile
#   torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_neox_6.6b_sophiag.py

from pathlib import Path
from runpy import run_path

globals().update(run_path(Path(__file__).with_name("train_neox_6.6b_adam.py")))  # a dot forbids an import

out_dir = "out/neox_6.6b_sophiag"

optimizer_name = "sophiag"
# Half of AdamW's learning rate: a place to start a sweep. The rest is that of the 1.5B.
learning_rate = 6e-5
weight_decay = 0.15
beta1 = 0.965
beta2 = 0.99
rho = 0.04
hess_interval = 10
