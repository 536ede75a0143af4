# A small character GPT on Shakespeare with Sophia-G, on one GPU.
#   python train_sophiag.py config/train_shakespeare_char_sophiag_gpu.py

from config.train_shakespeare_char_adam_gpu import *

out_dir = "out/shakespeare_char_sophiag_gpu"

# Why not the settings of the large runs: beta1 = 0.965 and a curvature that starts at 0 and remembers 100 estimates
# (1000 steps) are made for runs of 100k steps. In a run this short beta1 = 0.9 makes nearly all of the difference;
# bias_correction lets the curvature count from its first estimate on.
optimizer_name = "sophiag"
learning_rate = 4e-4
weight_decay = 0.2
beta1 = 0.9
beta2 = 0.99
rho = 0.05
hess_interval = 10
bias_correction = True
