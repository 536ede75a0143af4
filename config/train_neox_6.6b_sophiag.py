# GPT-NeoX with 6.86B parameters on the Pile with Sophia-G; train_neox_6.6b_adam.py has the shape.
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
