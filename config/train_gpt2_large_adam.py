# GPT-2 with 774M parameters on OpenWebText with AdamW: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_large_adam.py

from config.train_gpt2_small_adam import *

out_dir = "out/gpt2_large_adam"
batch_size = 5

n_layer = 36
n_head = 20
n_embd = 1280

learning_rate = 2e-4
