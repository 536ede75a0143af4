# GPT-NeoX with 6.86B parameters on the Pile with AdamW, in the shape of the Sophia paper's last version. With one
# embedding matrix for both ends, instead of GPT-NeoX's two, it would be 6.65B, the paper's 6.6B. The batches and the
# data are those of train_neox_1.5b_adam.py.
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_neox_6.6b_adam.py

from pathlib import Path
from runpy import run_path

globals().update(run_path(Path(__file__).with_name("train_neox_1.5b_adam.py")))  # a dot forbids an import

out_dir = "out/neox_6.6b_adam"
batch_size = 4

n_layer = 32
n_head = 32
n_embd = 4096
rope_dim = 32  # a quarter of each head

# Learning rate and weight decay stay: levanter's config of this shape has the same. Not tuned here.
activation_checkpointing = True
