# A small character GPT on Shakespeare with Sophia-G, on a CPU: two minutes on two cores.
#   python train_sophiag.py config/train_shakespeare_char_sophiag.py

from config.train_shakespeare_char_adam import *

out_dir = "out/shakespeare_char_sophiag"

# Why not the settings of the large runs: beta1 = 0.965 and a curvature that starts at 0 and remembers 100 estimates
# (1000 steps) are made for runs of 100k steps. In a run this short AdamW's beta1, 0.9, makes nearly all of the
# difference; bias_correction lets the curvature count from its first estimate on.
optimizer_name = "sophiag"
learning_rate = 1.5e-3
weight_decay = 0.4
rho = 0.2  # of rates and rhos tried: 0.05 ended at 1.786 with 9% of the coordinates unclipped, 0.2 at 1.757 with 20%
bias_correction = True
