# GPT-2 with 1.5B parameters on OpenWebText with AdamW: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_xl_adam.py

from config.train_gpt2_small_adam import *

out_dir = "out/gpt2_xl_adam"
batch_size = 2

n_layer = 48
n_head = 25
n_embd = 1600

# GPT-3's rate for 1.3B parameters (arXiv:2005.14165, table 2.1); not tuned here.
learning_rate = 2e-4
