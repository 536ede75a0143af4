# GPT-2 with 1.5B parameters on OpenWebText with Sophia-G: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_gpt2_xl_sophiag.py

from config.train_gpt2_xl_adam import *

out_dir = "out/gpt2_xl_sophiag"

optimizer_name = "sophiag"
# Rate and weight decay of the official 1.5B run on the Pile; its rho is in other units, so 0.05 is a guess.
learning_rate = 2.5e-4
weight_decay = 0.15
beta1 = 0.965
beta2 = 0.99
rho = 0.05
