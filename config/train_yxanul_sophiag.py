# A Llama-like model with 196M parameters (RMSNorm, RoPE, GQA, SwiGLU) in FP8, with Sophia-G.
# Ten stages of 2000 steps, from sequences of 8 tokens to 2048; 240 x 2048 tokens a step, 9.8B in all.
#   python train_sophiag.py config/train_yxanul_sophiag.py          # one H100 or newer; FP8 needs the package torchao

from config.train_yxanul_adam import *

out_dir = "out/yxanul_sophiag"

optimizer_name = "sophiag"
# Not tuned: the settings of config/train_gpt2_small_sophiag.py, whose learning rate is AdamW's.
weight_decay = 0.2
beta1 = 0.965
beta2 = 0.99
rho = 0.05
hess_interval = 10
hess_bs = 60  # a multiple of 3 too
