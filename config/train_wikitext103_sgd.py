# GPT-2 with 124M parameters on WikiText-103 with SGD: 7 epochs of about 1800 steps of 128 x 512 tokens.
#   python data/wikitext103/prepare.py     # needs the hub, or --source with your copy
#   python train_adam.py config/train_wikitext103_sgd.py

from config.train_wikitext103_adam import *

out_dir = "out/wikitext103_sgd"

optimizer_name = "sgd"
# Not tuned: a place to start a sweep.
learning_rate = 0.3
weight_decay = 1e-4  # added to the gradient, not decoupled as in the other optimizers
momentum = 0.9  # Nesterov's
