# The model and the ten stages of train_yxanul_adam.py: AdamW in the first five, Sophia-G from then on.
#   python train_sophiag.py config/train_yxanul_hybrid.py          # one H100 or newer; FP8 needs the package torchao

from config.train_yxanul_adam import *

out_dir = "out/yxanul_hybrid"

optimizer_name = "sophiag"
# Not tuned: AdamW's learning rate and weight decay, for both optimizers.
sophia_start_iter = 10_000  # stage 6; AdamW before it has betas 0.9 and 0.95
beta1 = 0.965
beta2 = 0.99
hess_bs = 60  # a multiple of 3 too
