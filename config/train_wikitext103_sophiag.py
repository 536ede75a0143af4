# GPT-2 with 124M parameters on WikiText-103 with Sophia-G: 7 epochs of about 1800 steps of 128 x 512 tokens.
#   python data/wikitext103/prepare.py     # needs the hub, or --source with your copy
#   python train_sophiag.py config/train_wikitext103_sophiag.py

from config.train_wikitext103_adam import *

out_dir = "out/wikitext103_sophiag"

optimizer_name = "sophiag"
# Not tuned: the settings of config/train_gpt2_small_sophiag.py, whose learning rate is AdamW's.
weight_decay = 0.2
beta1 = 0.965
beta2 = 0.99
