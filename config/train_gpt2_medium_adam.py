# GPT-2 with 355M parameters on OpenWebText with AdamW: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_medium_adam.py

from config.train_gpt2_small_adam import *

out_dir = "out/gpt2_medium_adam"
batch_size = 10

n_layer = 24
n_head = 16
n_embd = 1024

learning_rate = 3e-4
