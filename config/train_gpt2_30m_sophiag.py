# GPT-2 with 30M parameters on OpenWebText with Sophia-G: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_sophiag.py config/train_gpt2_30m_sophiag.py

from config.train_gpt2_30m_adam import *

out_dir = "out/gpt2_30m_sophiag"

optimizer_name = "sophiag"
# Half of AdamW's rate; not tuned at this length.
learning_rate = 1e-3
weight_decay = 0.2
beta1 = 0.965
beta2 = 0.99
rho = 0.05
