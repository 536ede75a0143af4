# GPT-2 with 355M parameters on OpenWebText with Sophia-G: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_gpt2_medium_sophiag.py

from config.train_gpt2_medium_adam import *

out_dir = "out/gpt2_medium_sophiag"

optimizer_name = "sophiag"
learning_rate = 7e-4
weight_decay = 0.2
beta1 = 0.965
beta2 = 0.99
rho = 0.08
