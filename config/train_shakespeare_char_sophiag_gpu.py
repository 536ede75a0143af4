# A small character GPT on Shakespeare with Sophia-G, on one GPU.
#   python train_sophiag.py config/train_shakespeare_char_sophiag_gpu.py

from config.train_shakespeare_char_adam_gpu import *

out_dir = "out/shakespeare_char_sophiag_gpu"

# Why not the settings of the large runs: see train_shakespeare_char_sophiag.py.
optimizer_name = "sophiag"
learning_rate = 4e-4
weight_decay = 0.2
bias_correction = True
