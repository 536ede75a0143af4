# The model and the ten stages of train_yxanul_adam.py with Sophia-G.
#   python train_sophiag.py config/train_yxanul_sophiag.py          # one H100 or newer; FP8 needs the package torchao

from config.train_yxanul_adam import *

out_dir = "out/yxanul_sophiag"

optimizer_name = "sophiag"
# Not tuned: the settings of config/train_gpt2_small_sophiag.py, whose learning rate is AdamW's.
weight_decay = 0.2
beta1 = 0.965
beta2 = 0.99
hess_bs = 60  # a multiple of 3 too
