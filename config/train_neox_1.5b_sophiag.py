# GPT-NeoX with 1.51B parameters on the Pile with Sophia-G; train_neox_1.5b_adam.py has the shape and the data.
#   torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_neox_1.5b_sophiag.py

from pathlib import Path
from runpy import run_path

globals().update(run_path(Path(__file__).with_name("train_neox_1.5b_adam.py")))  # a dot forbids an import

out_dir = "out/neox_1.5b_sophiag"

optimizer_name = "sophiag"
# Learning rate, weight decay and rho of the authors' 1.5B run (github.com/Liuhong99/Sophia, issue 15); not tuned here.
learning_rate = 2e-4
weight_decay = 0.15
beta1 = 0.965
beta2 = 0.99
rho = 0.04
