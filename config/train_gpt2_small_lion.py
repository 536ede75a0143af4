# GPT-2 with 124M parameters on OpenWebText with Lion: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_small_lion.py

from config.train_gpt2_small_adam import *

out_dir = "out/gpt2_small_lion"

optimizer_name = "lion"
# Not tuned: the Lion paper (arXiv:2302.06675) advises a rate 3 to 10 times below AdamW's, and a decay as much above.
learning_rate = 1e-4
weight_decay = 0.5
beta2 = 0.99
