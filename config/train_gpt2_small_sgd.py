# GPT-2 with 124M parameters on OpenWebText with SGD: 480 sequences of 1024 tokens a step, 100k steps (49B tokens).
#   torchrun --standalone --nproc_per_node=8 train_adam.py config/train_gpt2_small_sgd.py

from config.train_gpt2_small_adam import *

out_dir = "out/gpt2_small_sgd"

optimizer_name = "sgd"
# Not tuned: a place to start a sweep.
learning_rate = 0.3
weight_decay = 1e-4  # added to the gradient, not decoupled as in the other optimizers
momentum = 0.9  # Nesterov's
