# GPT-2 with 774M parameters on OpenWebText with Sophia-G: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_gpt2_large_sophiag.py

from config.train_gpt2_large_adam import *

out_dir = "out/gpt2_large_sophiag"

optimizer_name = "sophiag"
learning_rate = 3e-4
weight_decay = 0.2
beta1 = 0.965
beta2 = 0.99
rho = 0.05
